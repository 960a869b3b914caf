"""A VAE as diffusers keeps it: found in a folder or on the hub, checked, and run on whole images.

Only `config.json` and a `.safetensors` file are read: no pickles, and no code of a repository.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from installed import install_extra
from storage import sha256_of, text_fault

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
"""The autoencoders of diffusers that are run, as `_class_name` in `config.json` says them."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


class DecoderError(ValueError):
    """A decoder that cannot be used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Decoder:
    """A VAE. `reconstruct` turns (height, width, 3) uint8 RGB pixels into their reconstruction of
    the same shape; `sha256` is the hash of its weights, `name` what its images are called by.
    """

    name: str
    kind: str
    sha256: str
    factor: int
    reconstruct: Callable[[np.ndarray], np.ndarray]


def find_decoder(name: str) -> Path:
    """The folder of the decoder `name`: a folder of this machine, or OWNER/NAME of the Hugging Face
    hub, OWNER/NAME/FOLDER for a folder of a repository (`vae` in most).

    Raises:
        DecoderError: neither, or one without a `.safetensors` file.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(name):
            raise DecoderError(
                f"{name} is no folder and no name of the hub; expected a folder with {CONFIG_FILE} "
                f"and {WEIGHTS_FILE}, or OWNER/NAME or OWNER/NAME/vae"
            )
        folder = _from_hub(name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
            raise DecoderError(
                f"{name} has no {file} (there is {there}); expected a VAE as diffusers saves it, "
                "with weights as safetensors: pickles are not read"
            )
    return folder


def _from_hub(name: str) -> Path:
    """Fetch the two files of a decoder into the cache of the hub's library."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, repository, *inside = name.split("/")
    below = "/".join(inside)
    files = [f"{below}/{file}" if below else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        snapshot = snapshot_download(f"{owner}/{repository}", allow_patterns=files)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DecoderError(
            f"{name} is no folder here and did not come from the hub ({reason}); check the name "
            "and the network, or give a folder"
        ) from error
    folder = Path(snapshot) / below
    if not folder.is_dir():
        raise DecoderError(
            f"{owner}/{repository} on the hub has no folder {below} with {CONFIG_FILE}; look there "
            "for the folder of its VAE"
        )
    return folder


def load_decoder(name: str, device: str = "auto") -> Decoder:
    """Load a decoder on `device`: `cpu`, `cuda`, or `auto` for the second where there is one.

    Raises:
        DecoderError: diffusers is missing, no CUDA device, or no VAE of RGB images.
    """
    folder = find_decoder(name)
    kind = _kind_of(folder)
    try:
        import diffusers
    except ImportError as error:
        raise DecoderError(f"pairs need diffusers ({error}); {install_extra('pairs')}") from error
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise DecoderError("--device cuda: torch sees no CUDA device; use --device cpu")
    try:
        vae = getattr(diffusers, kind).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # of torch, safetensors, diffusers: whatever a file makes them raise
        reason = " ".join(str(error).split())[:200]
        raise DecoderError(
            f"{name} is no {kind} that diffusers loads ({type(error).__name__}: {reason})"
        ) from error
    if (channels := (vae.config.in_channels, vae.config.out_channels)) != (3, 3):
        raise DecoderError(f"{name} has {channels} channels in and out, expected RGB images: 3, 3")
    vae = vae.eval().to(device)
    levels = "block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"
    factor = 2 ** (len(vae.config[levels]) - 1)
    return Decoder(
        name=_last_part(name),
        kind=kind,
        sha256=sha256_of(folder / WEIGHTS_FILE),
        factor=factor,
        reconstruct=lambda pixels: _reconstruct(vae, pixels, factor, device),
    )


def _last_part(name: str) -> str:
    """What the images of a decoder are called by: the last part of its name, `vae` left out."""
    parts = [part for part in Path(name).parts if part not in ("vae", "/", ".", "..")]
    return re.sub(r"[^a-z0-9_.-]+", "_", parts[-1].lower()) if parts else "vae"


def _kind_of(folder: Path) -> str:
    """The class of a decoder, by its `config.json`."""
    path = folder / CONFIG_FILE
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DecoderError(f"{path} is no JSON ({text_fault(error)}); fetch it anew") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in CLASSES:
        raise DecoderError(f"{path}: _class_name is {kind!r}, expected {' or '.join(CLASSES)}")
    return kind


def _reconstruct(vae: Any, pixels: np.ndarray, factor: int, device: str) -> np.ndarray:
    """Encode and decode at the size as it is, filled up to a multiple of `factor` by repeating the
    last row and column, which are cut off again: neither scaling nor the seams of tiles may tell
    the two images of a pair apart. The latent is the mode, so that nothing is random.
    """
    import torch

    height, width = pixels.shape[:2]
    fill = [(0, -height % factor), (0, -width % factor), (0, 0)]
    padded = np.pad(pixels, fill, mode="edge").transpose(2, 0, 1)[None]
    image = torch.from_numpy(padded).to(device).float() / 127.5 - 1
    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            encoded = vae.encode(image)
            latent = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
            decoded = vae.decode(latent).sample[0]
    except torch.OutOfMemoryError as error:
        raise DecoderError(
            f"the decoder has no memory for {width} x {height} pixels; lower --max-megapixels"
        ) from error
    if decoded.shape != image.shape[1:] or not torch.isfinite(decoded).all():
        raise DecoderError(
            f"the decoder made {tuple(decoded.shape)} of {tuple(image.shape[1:])} values, expected "
            "as many, and finite ones; use another"
        )
    values = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()[:height, :width])
