"""Make damaged image files by changing bytes in a valid file of each format that the project reads.

    python -m benchmarks.mutations FOLDER COUNT

Main entry: `mutations(count, seed)` takes the number of files in total and a random seed (int,
default 0; an equal seed gives equal files). It yields (name, bytes) of each damaged file, from all
formats in turn, with names such as `000000-jpeg`. It writes nothing. A file gets up to four faults:
changed bytes, extreme numbers, deleted, repeated or copied parts, or a missing end. About 3 of 100
files get none.

`seeds()` returns the valid files (name of the format -> bytes), images of `SIDE` x `SIDE` pixels,
and `mutated(seed, rng)` takes the bytes of one of these files and a NumPy
generator, and returns a damaged copy. The command writes COUNT files in total, not per format, to
FOLDER, with the random seed 0, as input of `benchmarks.hostile`.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from PIL import Image

import cli
import console
import imaging.decode  # noqa: F401  registers HEIF with Pillow

SIDE = 40
"""Side of a seed image in pixels; small, so that most bytes are headers and decoding is fast."""


def picture(seed: int = 0) -> Image.Image:
    """Make an RGB image of smooth colors with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def seeds() -> dict[str, bytes]:
    """Return a valid file of each format, and of each variant that decoders treat differently."""
    image, exif = picture(), Image.Exif()
    exif[0x0112] = 6
    gray, palette, cmyk = image.convert("L"), image.convert("P"), image.convert("CMYK")
    frames = [picture(seed).convert("P") for seed in range(1, 4)]
    more = {"save_all": True, "append_images": frames}
    deep = Image.fromarray(np.asarray(gray, np.uint16) * 257)
    real = Image.fromarray(np.asarray(gray, np.float32) / 255)
    return {
        "jpeg": encode(image, "JPEG", quality=80),
        "jpeg-exif": encode(image, "JPEG", exif=exif, comment=b"a comment"),
        "jpeg-progressive": encode(image, "JPEG", progressive=True),
        "jpeg-restarts": encode(image, "JPEG", restart_marker_blocks=2),
        "jpeg-cmyk": encode(cmyk, "JPEG"),
        "mpo": encode(image, "MPO", save_all=True, append_images=[picture(9)]),
        "png": encode(image, "PNG", exif=exif),
        "png-palette": encode(palette, "PNG", transparency=3),
        "png-deep": encode(deep, "PNG"),
        "apng": encode(palette, "PNG", **more),
        "webp": encode(image, "WEBP", exif=exif),
        "webp-lossless": encode(image, "WEBP", lossless=True),
        "webp-animated": encode(image, "WEBP", **more),
        "avif": encode(image, "AVIF", exif=exif),
        "heif": encode(image, "HEIF", save_all=True, append_images=[picture(9)]),
        "gif": encode(palette, "GIF", **more),
        "tiff": encode(image, "TIFF", exif=exif),
        "tiff-pages": encode(palette, "TIFF", **more),
        "tiff-lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff-float": encode(real, "TIFF"),
        "tiff-deep": encode(deep, "TIFF", compression="tiff_deflate"),
        "bmp": encode(image, "BMP"),
        "dib": encode(image, "DIB"),
        "jpeg2000": encode(image, "JPEG2000"),
        "ppm": encode(image, "PPM"),
        "pgm-deep": encode(deep, "PPM"),
        "qoi": encode(image, "QOI"),
        "tga": encode(image, "TGA", compression="tga_rle"),
    }


def mutated(seed: bytes, rng: np.random.Generator) -> bytes:
    """Copy a file with one to four faults, most of them in the first 400 bytes, where headers are.

    A fault changes a byte, sets four bytes to an extreme number, deletes, repeats or moves a part,
    or cuts off the end.
    """
    data = bytearray(seed)
    for _ in range(rng.integers(1, 5)):
        reach = len(data) if rng.random() < 0.4 else min(len(data), 400)
        at, size = int(rng.integers(0, max(1, reach))), int(rng.integers(1, 33))
        match rng.integers(7):
            case 0 | 1:
                data[at : at + 1] = rng.bytes(1)
            case 2:
                data[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff")[
                    rng.integers(3)
                ]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                part = data[at : at + size]
                to = int(rng.integers(0, len(data) + 1))
                data[to : to + size] = part
            case 6 if rng.random() < 0.4:
                del data[max(4, int(rng.integers(0, len(data) + 1))) :]
    return bytes(data)


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield `count` names and damaged files, of all formats in turn; the same for equal `seed`."""
    rng = np.random.default_rng(seed)
    kinds = list(seeds().items())
    for number in range(count):
        kind, whole = kinds[number % len(kinds)]
        yield f"{number:06d}-{kind}", mutated(whole, rng)


@click.command(cls=console.Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("count", type=click.IntRange(min=1))
@cli.options()
def main(folder: Path, count: int) -> None:
    """Write COUNT damaged files to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in mutations(count):
        (folder / f"{name}.{name.partition('-')[2].partition('-')[0]}").write_bytes(data)
    console.say(f"{count:,} files in {folder}")


if __name__ == "__main__":
    main()
