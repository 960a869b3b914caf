"""Load a VAE (an image autoencoder of the library diffusers), to reconstruct whole images with it.

Main entry: `load_decoder(name, device)` returns a `Decoder`. `name` is a text: a folder, or
OWNER/NAME or OWNER/NAME/FOLDER (mostly OWNER/NAME/vae) on the Hugging Face hub. `device` is "cpu",
"cuda", "cuda:N" or "auto" (the default: the GPU if there is one, else the CPU). The fields of a
`Decoder`:

- `reconstruct`: a function that takes pixels, uint8 (height, width, 3) RGB, and returns the pixels
  after encoding and decoding, of the same shape and type.
- `name`: the last part of the argument `name`, without a final `/vae`, in lower case. Each run of
  characters other than a-z, 0-9, `_`, `.` and `-` becomes one `_`.
- `kind`: one of `CLASSES`, the supported autoencoders.
- `sha256`: hash of the weights.
- `factor`: image pixels per latent pixel, in each direction.

`DecoderError` (a `ValueError`) is raised if `name` is no folder and the download fails; if
`config.json` or the weights are missing, or diffusers does not load them; if `config.json` names no
class of `CLASSES`, or the images have not three channels; if diffusers is not installed; or if the
memory of the GPU is too small. `reconstruct` raises it if the GPU memory is too small or a value of
the result is not finite. `OSError` is raised if `config.json` may not be read, and another
`ValueError` for a name that the hub does not allow, for another device, or if there is no such GPU.
`find_decoder(name)` returns the folder of the files, after a download to the cache of the hub
library if needed. Only `config.json` and a `.safetensors` file are read: no pickles, and no code of
a repository.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from devices import device_here, parse_device
from escape import reason_of, text_fault, typed_reason_of
from installed import why_not_imported
from sharding.hub import fetch_folder, hub_errors
from storage import parse_json, read_text, sha256_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
"""Supported autoencoders of diffusers, by `_class_name` in `config.json`."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)


class DecoderError(ValueError):
    """Error of a decoder that cannot be used; the message says what was found and what to do."""


@dataclass(frozen=True)
class Decoder:
    """A loaded VAE.

    `reconstruct` encodes and decodes (height, width, 3) uint8 RGB pixels; the result has the same
    shape and dtype. `sha256` is the hash of the weights. `name` is the generator of its images.
    """

    name: str
    kind: str
    sha256: str
    factor: int
    reconstruct: Callable[[np.ndarray], np.ndarray]


def find_decoder(name: str) -> Path:
    """Return the folder of the decoder `name`, fetched from the hub if necessary.

    `name` is a folder of this machine, OWNER/NAME of the Hugging Face hub, or OWNER/NAME/FOLDER for
    a folder of a repository (`vae` in most).

    Raises:
        DecoderError: `name` is neither, or the folder has no `.safetensors` file.
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
    """Fetch the two files of a decoder into the hub library's cache; returns their folder."""
    owner, repository, *inside = name.split("/")
    below = "/".join(inside)
    files = [f"{below}/{file}" if below else file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        snapshot = fetch_folder(f"{owner}/{repository}", None, files)
    except hub_errors() as error:
        reason = re.sub(r"\[Errno -?\d+\] ", "", reason_of(error))
        raise DecoderError(
            f"{name} is no folder here and did not come from the hub "
            f"({reason}); check the name and the network, or give a folder"
        ) from error
    folder = snapshot / below
    if not folder.is_dir():
        raise DecoderError(
            f"{owner}/{repository} on the hub has no folder {below} with {CONFIG_FILE}; look for "
            "the folder of its VAE there"
        )
    return folder


def load_decoder(name: str, device: str = "auto") -> Decoder:
    """Load a decoder on `device`: `cpu`, `cuda`, `cuda:N`, or `auto` (a GPU if there is one).

    Raises:
        DecoderError: diffusers is missing, or the file is no VAE for RGB images.
        ValueError: there is no such device, or the hub does not allow this `name`.
    """
    parse_device(device)  # checked before a download, as is the library
    try:
        import diffusers
    except ImportError as error:
        raise DecoderError(f"pairs need diffusers; {why_not_imported(error, 'pairs')}") from error
    import torch

    folder = find_decoder(name)
    kind = _kind_of(folder)

    device = device_here(device)
    try:
        vae = getattr(diffusers, kind).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # libraries raise many types for a bad file
        raise DecoderError(
            f"{name} is no {kind} that diffusers loads ({typed_reason_of(error)})"
        ) from error
    if (channels := (vae.config.in_channels, vae.config.out_channels)) != (3, 3):
        raise DecoderError(f"{name} has {channels} channels in and out, expected (3, 3) for RGB")
    try:
        vae = vae.eval().to(device)
    except torch.OutOfMemoryError as error:
        raise DecoderError(f"{name} does not fit on {device}; use --device cpu") from error
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
    """Return the last part of a decoder's name that is not `vae`, in characters of a generator."""
    parts = [part for part in Path(name).parts if part not in ("vae", "/", ".", "..")]
    return re.sub(r"[^a-z0-9_.-]+", "_", parts[-1].lower()) if parts else "vae"


def _kind_of(folder: Path) -> str:
    """Return the class name of a decoder, from its `config.json`."""
    path = folder / CONFIG_FILE
    try:
        config: Any = parse_json(read_text(path))
    except ValueError as error:
        raise DecoderError(f"{path} is no JSON ({text_fault(error)}); fetch it anew") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in CLASSES:
        raise DecoderError(f"{path}: _class_name is {kind!r}, expected {' or '.join(CLASSES)}")
    return kind


def _reconstruct(vae: Any, pixels: np.ndarray, factor: int, device: str) -> np.ndarray:
    """Encode and decode pixels at their own size.

    The last row and column are repeated up to a multiple of `factor`, and cut off again afterward:
    traces of scaling or tiles would distinguish the two images of a pair. The latent is the mode of
    its distribution, so the result is deterministic.
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
            f"not enough GPU memory for {width} x {height} pixels; lower --max-megapixels"
        ) from error
    if decoded.shape != image.shape[1:] or not torch.isfinite(decoded).all():
        raise DecoderError(
            f"the decoder returned values of shape {tuple(decoded.shape)}, expected finite ones of "
            f"shape {tuple(image.shape[1:])}; use another decoder"
        )
    values = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()[:height, :width])
