"""`python -m pipeline preview | order`: look at what the loader gives, and in which order."""

from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

import console
import recipes
from imaging.decode import decode_image
from pipeline.augment import AugmentPolicy, Preprocess
from pipeline.batch import Request
from pipeline.loader import LoadError, choose_backend
from pipeline.order import mixing_of, training_epoch
from pipeline.params import train_params
from pipeline.pil import decode_request
from pipeline.preview import Row, picture_of
from pipeline.read import ReadError, ShardReader
from sharding.format import CLASSES, ShardSet, open_shards
from storage import AnyPath


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The part of a recipe that says what is done to images."""

    augment: dict[str, AugmentPolicy]
    preprocess: Preprocess = field(default_factory=Preprocess)


@click.group(cls=console.Group)
def main() -> None:
    """Look at what the loader gives."""


@main.command()
@click.argument("shards", type=console.AnyAddress())
@click.option(
    "--out",
    type=console.LocalPath(dir_okay=False),
    default=Path("grid.png"),
    show_default=True,
    help="PNG to write.",
)
@click.option(
    "--recipe",
    "path",
    type=console.LocalPath(),
    default=recipes.FOLDER / "phase1.toml",
    help="Recipe whose policies and preprocessing are shown. Default: that of phase 1.",
)
@click.option(
    "--policy", help="Policy of sources that keep none of their own. Default: the recipe's."
)
@click.option("--count", type=click.IntRange(1, 64), default=8, show_default=True, help="Samples.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Another seed, other samples.",
)
@console.options()
def preview(
    shards: AnyPath, out: Path, path: Path, policy: str | None, count: int, seed: int
) -> None:
    """Draw what the network is fed of the set SHARDS, by both backends."""
    opened = open_shards([shards])
    values = recipes.read(path)
    policies = recipes.build(
        Policies,
        {key: values[key] for key in ("augment", "preprocess") if key in values},
        str(path),
    )
    policy = policy or values["data"]["policy"]
    samples = _spread(opened, count, seed)
    request = _request(opened, samples, policies, policy, seed)
    size = policies.preprocess.crop_size
    pil = decode_request(request, size)
    if pil.failures:
        row, reason = next(iter(pil.failures.items()))
        raise LoadError(f"{opened.name(samples[row])}: {reason}")
    dali = _by_dali(request, size)
    rows = [
        Row(
            whole=decode_image(data, request.formats[row], request.orientations[row]),
            params=params,
            pil=pil.images[row].numpy(),
            dali=None if dali is None else dali[row],
            lines=_lines(opened, sample, policy),
        )
        for row, (sample, data, params) in enumerate(
            zip(samples.tolist(), request.data, request.params.rows(), strict=True)
        )
    ]
    picture_of(rows).save(out, "PNG")
    if dali is not None:
        change = np.abs(dali.astype(np.int16) - pil.images.numpy())
        console.say(f"dali - pil: mean {change.mean():.2f}, at most {change.max()} gray levels")
    console.say(f"{len(rows)} samples of {shards}: {out}")


def _spread(shards: ShardSet, count: int, seed: int) -> np.ndarray:
    """`count` samples, the sources and classes in turn."""
    kinds = 2 * shards.codes("source")[0] + shards.column("label")
    shuffled = np.random.default_rng(seed).permutation(len(shards))
    kind = kinds[shuffled]
    turn = np.zeros(len(shards), np.int64)
    for code in np.unique(kind):
        here = kind == code
        turn[here] = np.arange(here.sum())
    return shuffled[np.lexsort((kind, turn))][:count]


def _request(
    shards: ShardSet, samples: np.ndarray, policies: Policies, policy: str, seed: int
) -> Request:
    params_for = train_params(shards, policies.augment, policy, policies.preprocess, seed, 0)
    data = []
    for sample, image in zip(samples.tolist(), ShardReader(shards).read(samples), strict=True):
        if isinstance(image, ReadError):
            raise LoadError(f"{shards.name(sample)}: {image}")
        data.append(image)
    return Request(
        data,
        shards.names("format", samples),
        shards.column("orientation")[samples].tolist(),
        params_for(samples, np.zeros(len(samples), np.int64)),
    )


def _by_dali(request: Request, size: int) -> np.ndarray | None:
    """The same by DALI, on the GPU where there is one; None, said in words, where it is missing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose_backend("dali", device)
    except LoadError as error:
        console.log.warning("%s: shown by pil alone", error)
        return None
    from pipeline.dali import DaliBackend

    (pixels,) = DaliBackend(size, len(request.data), device, threads=2).run([request])
    return pixels.images.cpu().numpy()


def _lines(shards: ShardSet, sample: int, policy: str) -> list[str]:
    (source,), (generator,) = (
        shards.names(name, np.array([sample])) for name in ("source", "generator")
    )
    label = CLASSES[int(shards.column("label")[sample])]
    kept = shards.sources[source]["policy"]
    return [shards.text("key", sample), f"{label}, {generator}", f"policy {kept or policy}"]


@main.command()
@click.argument("shards", type=console.AnyAddress())
@click.option("--batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Another seed, another order.",
)
@console.options()
def order(shards: AnyPath, batch: int, seed: int) -> None:
    """Measure how well each shuffle mixes the set SHARDS; 1 is as well as by chance."""
    opened = open_shards([shards])
    codes = opened.codes("source")[0]
    rows = []
    for shuffle in ("global", "block"):
        samples = training_epoch(
            np.arange(len(opened)), seed=seed, number=0, global_batch=batch, shuffle=shuffle
        ).samples
        mixing = mixing_of(samples, codes[samples], batch)
        rows.append([shuffle, mixing.distance, mixing.batches])
    columns = ["shuffle", "distance (1: random)", "sources per batch (1: random)"]
    console.table(f"{shards}: {len(opened):,} samples in batches of {batch}", columns, rows)


if __name__ == "__main__":
    main()
