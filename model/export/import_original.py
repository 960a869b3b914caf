"""Convert the original project's `.pth` checkpoint to a checkpoint of this project.

Main entry: `import_file(file, run)` writes the checkpoint and returns its path, `run/step_0000000`.

- `file`: the `Path` of the `.pth` file. It is a dictionary of weights, or has one under the key
  `model`: a ConvNeXtV2-Base with timm's names and two outputs, 0 real and 1 fake. Only tensors are
  unpickled.
- `run`: the `Path` of the new run's folder, which must not exist. Its name is the run's name.

It raises `OriginalError` if `run` exists, or if the file cannot be read, contains more than tensors
or has no weights; `NetworkError` for weights of another network; `CheckpointError` if the
checkpoint cannot be written; and another `ValueError` if no run may have the name of `run` (such as
`step_0000001`).

Main entry: `fetch()`, without arguments, downloads the published file (`FILE` of `REPOSITORY` at
`REVISION`) into the hub's cache if it is not there, checks its SHA-256 and returns its path. It
raises `OriginalError` if the file cannot be downloaded or is not the published one. All these
errors are `ValueError`s.

`recipe_of(name)` returns a substitute (`ResolvedRecipe`) for the unknown recipe, for a run of this
name. `KNOWN_AGAINST` is a text, a known weakness of the published file. `import_file()` stores it
in the `meta.json` of the checkpoint if `file` is the published one.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from escape import reason_of
from model import checkpoint
from model.backbones.resolve import resolved
from model.network import build, load_weights
from model.recipe import Data, Network, Optim, Recipe, ResolvedRecipe, Run, step_folder
from pipeline.preprocess import Preprocess
from sharding.hub import ask_hub, hub_errors, in_hub_cache
from storage import sha256_of

REPOSITORY = "xRayon/convnext-ai-images-detector"
REVISION = "3fecc2d10e3812bc6d26de0c0fe359f219101e2c"
FILE = "AI Images Detector/checkpoints/checkpoint_phase2.pth"
SHA256 = "37f31776a241b575dc034ddded7afd12014ba453ac07cbe3725f808787717f0e"
"""Hash of the published file (1,052,834,809 bytes), as recorded by its users."""

KNOWN_AGAINST = (
    "in an outside audit, this published checkpoint called 15 of 32 real web photographs AI "
    "(47 %, LAION, threshold 0.65)"
)
"""Finding of a user's audit, which rejected the file with `SHA256`."""


class OriginalError(ValueError):
    """Raised for a file that is not the original's checkpoint; the message gives the reason."""


def recipe_of(name: str) -> ResolvedRecipe:
    """Return a substitute for the original's recipe: only network and preprocessing matter."""
    return resolved(
        Recipe(
            name=name,
            data=Data(train=[], validate=[], policy=""),
            augment={},
            network=Network(name="convnextv2_base", pretrained=False),
            optim=Optim(lr=1e-4),
            run=Run(epochs=1),
            preprocess=Preprocess(),
        )
    )


def fetch() -> Path:
    """Download the published checkpoint into the hub's cache, if needed. Check it and return it.

    Raises:
        OriginalError: the file cannot be downloaded, or has another hash.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url  # slow import, most of a second

    url = hf_hub_url(REPOSITORY, FILE, revision=REVISION)
    try:
        path = in_hub_cache(REPOSITORY, FILE, REVISION)
        if not path:
            ask_hub(REPOSITORY, FILE, REVISION)
            path = Path(hf_hub_download(REPOSITORY, FILE, revision=REVISION))
    except hub_errors() as error:
        raise OriginalError(
            f"{FILE} of {REPOSITORY} could not be downloaded ({reason_of(error)}); download it by "
            f"hand from {url}, then run `python -m model import FILE`"
        ) from error
    sha256 = sha256_of(path)
    if sha256 != SHA256:
        raise OriginalError(
            f"{path} has sha256 {sha256[:16]}..., expected {SHA256[:16]}...; it is not the "
            "published file, and is not used. Delete it and fetch again"
        )
    return path


def import_file(file: Path, run: Path) -> Path:
    """Convert `file` to a checkpoint in the run folder `run`, and return the checkpoint.

    Raises:
        OriginalError: the file contains more than tensors, or not the weights of a network; or the
            run exists.
    """
    if run.exists():
        raise OriginalError(f"{run} exists; name another run with --run")
    weights = _weights_in(file)
    recipe = recipe_of(run.name)
    net = build(recipe.network, pretrained=False)
    load_weights(net, weights, str(file))
    folder = run / step_folder(0)
    checkpoint.save(
        folder,
        net,
        recipe=recipe,
        state=None,
        record=checkpoint.Record(
            step=0,
            epoch=0.0,
            metrics={},
            selection=None,
            data={
                "train": [],
                "replay": [],
                "imported_from": file.name,
                "known_against": [KNOWN_AGAINST] if sha256_of(file) == SHA256 else [],
            },
        ),
    )
    return folder


def _weights_in(file: Path) -> dict[str, torch.Tensor]:
    """Return the network's weights by plain names. Only tensors are unpickled."""
    try:
        with warnings.catch_warnings():
            # Hide torch's warning about foreign pickles: they are refused anyway.
            warnings.simplefilter("ignore")
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OriginalError(
            f"{file} contains more than tensors, or is not a checkpoint; loading it could run "
            "code, so it is refused"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise OriginalError(f"{file} cannot be read: {reason_of(error)}") from error
    model = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not model:
        raise OriginalError(
            f"{file} contains {type(content).__name__}, expected a dictionary of weights"
        )
    weights = {_plain(str(name)): value for name, value in model.items()}
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        keys = ", ".join(map(str, list(model)[:5]))
        raise OriginalError(f"{file} contains {keys}, expected `model` with the network's weights")
    return weights


def _plain(name: str) -> str:
    """Remove the prefixes that torch.compile and DataParallel put before a name."""
    for prefix in ("_orig_mod.", "module."):
        name = name.removeprefix(prefix)
    return name
