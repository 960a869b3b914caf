"""Export a checkpoint as ONNX files in fp32, fp16 and int8, and compare each file with PyTorch on
the same images.

Main entry: `export_onnx(checkpoint, out, images, on_images)` writes the three `FILES` and
`PARITY_FILE` into a folder.

- `checkpoint`: `Path` of a checkpoint's folder.
- `out`: `Path` of the output folder. It is created if it is missing; older files of the same names
  are replaced.
- `images`: `Path` of a folder of images, or of a shard set (packed images), for the comparison. At
  most `IMAGES` images are used. None (the default): `NOISE` noise images.
- `on_images`: a function, or None (the default). `on_images(n)` is called after each batch; n is
  the number of images compared since the last call.

It returns the content of `PARITY_FILE`, a dict. `compared` is the number of images, `unreadable` a
list with one text, name and reason, per image that could not be read. `files` is a list of dicts,
one per ONNX file, with the fields of `Parity`: `file`, `precision`, `same_pixels` (the networks on
equal pixels) and `from_files` (the preprocessing included; None for noise). The last two are dicts
with the fields of `Difference`: `max` and `mean` difference of the probability of fake, and
`verdicts`, the number of images with another verdict.

Errors, all `ValueError`s except `OSError`:

- `ExportError`: a library is missing or fails, no image can be read, a file is not valid ONNX, or
  a difference on equal pixels is above `TOLERANCE` or NaN. No file is written. An int8 file alone
  is left out, with a log line.
- `CheckpointError`: the checkpoint is missing, damaged or of another version. `RecipeError`: its
  recipe or the entry of its backbone has an unknown or wrong key. `BackboneError`: the backbone of
  a shipped detector was not fetched or is damaged. `NetworkError`: timm cannot build the network.
- `ShardError`: the index of the shard set is damaged or of another version.
- `OSError`: `out` cannot be written.

The graph takes `images`, uint8 (batch, height, width, 3) RGB, with height and width of
`Preprocess.shape`. If the network also reads a detail crop, this crop is below the first one in the
same array, and the height includes both. The graph gives `probability` (of fake), float32 (batch,),
and `logits` (batch, 2). `DESCRIPTION` is a text that describes this input and these outputs.

`compare(net, preprocess, meta, files, images, on_images)` only compares existing ONNX `files` (a
list of `Path`) with their checkpoint: `net`, `preprocess` and `meta` are what `load_network()` in
`model/checkpoint.py` returns. It returns a list of `Parity` and a dict: `images` (their name),
`compared` and `unreadable`. `fitness_of(meta)` returns the entries of `meta["data"]` that are
reasons not to rely on the detector, as a dict, with the sets that it was trained on.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import console
from escape import as_json, typed_reason_of, without_paths
from imaging.decode import IMAGE_SUFFIXES, DecodeError, ImageFile, decode
from installed import why_not_imported
from model.checkpoint import load_network
from model.export.license import license_of
from model.inference.fitness import FITNESS_KEYS, generators_seen, sets_seen
from model.inference.onnx_detector import FORMAT_VERSION, META_KEYS, load_onnx, preprocess
from model.inference.prediction import ahead, as_file
from model.network import Detector
from model.verdict import band_of, probability, verdict
from pipeline import pil
from pipeline.preprocess import Preprocess
from pipeline.read import ReadError, ShardReader
from sharding.format import INDEX_FILE, open_shards
from storage import publish, temporary_folder

OPSET = 20
"""The first opset with GELU as a single operator. Needs ONNX Runtime 1.17 or newer."""

DESCRIPTION = (
    "Input: images, uint8 (batch, height, width, 3) RGB. Outputs: probability, float32 (batch,), "
    "of fake, after the checkpoint's temperature; logits, float32 (batch, 2) in the order of the "
    "classes, before the temperature. Normalization is part of the graph. The metadata contains "
    "everything else needed to use the file."
)
"""Stored in each file as its description."""

FILES = {
    "fp32": "detector.onnx", "fp16": "detector-fp16.onnx", "int8": "detector-int8.onnx",
}  # fmt: skip
PARITY_FILE = "parity.json"

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "int8": 0.1}
"""Maximum difference of an image's probability from PyTorch's, on identical pixels. An export with
a larger difference is refused. Rounding to 8 bits has no bound, so if only the int8 file exceeds
its limit, only this file is not written."""

IMAGES = 200
"""Number of images to compare, evenly spread over the given images."""

NOISE = 16
"""Number of noise images to compare if no images are given."""

_BATCH = 8

_LIBRARIES = ("torch", "onnx", "onnxruntime", "onnxscript")


class ExportError(ValueError):
    """Raised for a checkpoint that cannot be exported; the message gives the reason."""


class _Graph(nn.Module):
    """The exported graph; see the module docstring."""

    def __init__(self, net: Detector, temperature: float):
        super().__init__()
        self.net, self.temperature = net, temperature

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.net(images.permute(0, 3, 1, 2))
        real, fake = logits.unbind(1)
        return torch.sigmoid((fake - real) / self.temperature), logits


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of the probability of fake, over all images. `verdicts` is the number of images
    with another verdict.
    """

    max: float
    mean: float
    verdicts: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences of one exported file from PyTorch in fp32 on a CPU.

    `same_pixels` compares only the networks, on identical pixels. `from_files` also includes the
    preprocessing: Pillow's resize (as in `predict.py --onnx`) against torch's; None for noise.
    """

    file: str
    precision: str
    same_pixels: Difference
    from_files: Difference | None


def export_onnx(
    checkpoint: Path,
    out: Path,
    images: Path | None = None,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write `FILES` and `PARITY_FILE` into the folder `out`, and return the content of
    `PARITY_FILE`.

    `images` is a folder of images or a shard set to compare on; None: noise. `on_images(n)` is
    called after every n compared images.

    Raises:
        ExportError: a library is missing or fails, no image can be read, or a file differs too
            much from PyTorch. Then nothing is written.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"an export needs the libraries onnxruntime and onnxscript; "
            f"{why_not_imported(error, 'export')}"
        ) from error
    net, preprocess, meta = load_network(checkpoint)
    with temporary_folder(out) as partial:
        _write_files(net, preprocess, meta, partial)
        files = [partial / name for name in FILES.values()]
        parities, seen = compare(net, preprocess, meta, files, images, on_images)
        for parity in parities:
            if parity.precision != "int8":
                _refuse_if_far(parity)
        parities = [parity for parity in parities if not _is_dropped(parity)]
        written = [parity.file for parity in parities]
        report = {
            "run": meta["recipe"]["name"],
            "step": meta["step"],
            **seen,
            "reference": "PyTorch, fp32, CPU",
            "tolerance": TOLERANCE,
            "files": [asdict(parity) for parity in parities],
            "versions": {name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime")},
        }
        text = as_json(report, indent=1, sort_keys=True) + "\n"
        (partial / PARITY_FILE).write_text(text, encoding="utf-8")
        out.mkdir(parents=True, exist_ok=True)
        for name in (*written, PARITY_FILE):
            publish(partial / name, out / name)
        for name in set(FILES.values()) - {*written}:
            (out / name).unlink(missing_ok=True)  # a file of an earlier export
    return report


def _write_files(
    net: Detector, preprocess: Preprocess, meta: Mapping[str, Any], folder: Path
) -> None:
    """Convert the network to each precision and write `FILES`, after ONNX's full check, which
    infers the types of all values as other programs do.

    Raises:
        ExportError: the libraries cannot convert the network, or a file is not valid.
    """
    import onnx

    name = FILES["fp32"]
    try:
        graph = _graph_of(net, preprocess, meta["temperature"])
        for precision, name in FILES.items():
            model = _CONVERT[precision](graph)
            onnx.helper.set_model_props(model, _metadata(meta, precision))
            onnx.checker.check_model(model, full_check=True)
            onnx.save(model, folder / name)
    except OSError:  # an error of the disk
        raise
    except Exception as error:  # any type, for example if versions do not match
        versions = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
        raise ExportError(
            f"{name} could not be made ({typed_reason_of(error.__cause__ or error)}); nothing was "
            f"written. Found {versions}; install the newest versions of these"
        ) from error


def _graph_of(net: Detector, preprocess: Preprocess, temperature: float) -> Any:
    """Convert the network to an ONNX model in fp32, without paths of this machine."""
    example = torch.zeros((2, *preprocess.shape, 3), dtype=torch.uint8)
    program = torch.onnx.export(
        _Graph(net.eval(), temperature).eval(),
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["probability", "logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # set if `dynamo`
    model = program.model_proto
    for node in model.graph.node:  # remove stack traces, which contain paths
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.doc_string = DESCRIPTION
    return model


def _halved(graph: Any) -> Any:
    """Convert the model to fp16 weights and arithmetic.

    Operations that would lose precision or overflow stay in fp32: pixel normalization, the
    classifier and all after it, and sums of squares (the norm in ConvNeXtV2's GRN, over 4,096
    positions). torch's autocast also computes these norms in fp32.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxscript import ir

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    nodes = copy.graph.node
    weighted = [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")]
    ends = [node.name for node in (*nodes[: weighted[0]], *nodes[weighted[-1] :])]
    halved = ir.from_proto(
        convert_float_to_float16(
            copy,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, "ReduceL2", "ReduceSumSquare"],
            node_block_list=ends,
        )
    )
    halved.graph.sort()  # the converter appends the casts
    model = ir.to_proto(halved)
    model.graph.ClearField("value_info")  # its types are those before the casts
    return model


def _quantized(graph: Any) -> Any:
    """Convert the weights of linear layers to int8, with one scale per output channel. Their inputs
    are rounded to 8 bits at run time, scaled by the range in each batch. Convolutions stay in fp32.
    The weights use 7 bits: sums of 8-bit products overflow on CPUs without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantized.onnx")
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        copy.graph.ClearField("value_info")  # the quantizer infers the shapes itself
        # Without this entry the quantizer logs useless advice to pre-process the model.
        onnx.helper.set_model_props(copy, {"onnx.quant.pre_process": "onnxruntime.quant"})
        quantize_dynamic(
            copy, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8, reduce_range=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip
        return onnx.load(path)


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "fp32": lambda graph: graph, "fp16": _halved, "int8": _quantized,
}  # fmt: skip


def fitness_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a checkpoint's `data` that are reasons not to rely on it, and the
    sets and generators that it was trained on.
    """
    data = meta["data"] or {}
    known = {key: data[key] for key in FITNESS_KEYS if key in data}
    return known | {"earlier_sets": sets_seen(meta), "earlier_generators": generators_seen(meta)}


def _metadata(meta: Mapping[str, Any], precision: str) -> dict[str, str]:
    """Return the metadata of an ONNX file: each of `META_KEYS` as JSON text, without paths of this
    machine.
    """
    preprocess = Preprocess(**meta["preprocess"])
    size, (height, width) = preprocess.crop_size, preprocess.shape
    detail = (
        f"; below it the center square of {size} pixels of that square before its resizing, or all "
        f"of a smaller one, resized to {size}"
    )
    values = {
        "format_version": FORMAT_VERSION,
        "classes": meta["classes"],
        "preprocess": meta["preprocess"],
        "temperature": meta["temperature"],
        "threshold": meta["threshold"],
        "calibration": meta["calibration"],
        "data": fitness_of(meta),
        "precision": precision,
        "run": meta["recipe"]["name"],
        "step": meta["step"],
        "network": meta["recipe"]["network"]["name"],
        "license": license_of(meta).text,
        "input": f"images: uint8 (batch, {height}, {width}, 3) RGB, 0 to 255, upright; the center "
        "square, cut out and then resized to crop_size "
        f"(antialiased {preprocess.interpolation}): side = shorter side * crop_size / resize_size, "
        "rounded half to even, at least 1; left = floor((width - side) / 2), top likewise"
        + (detail if preprocess.detail_crop else ""),
        "outputs": "probability: float32 (batch,), of fake, after the temperature; logits: float32 "
        "(batch, 2), in the order of classes, before the temperature",
    }
    public = without_paths(values)
    return {key: json.dumps(public[key], ensure_ascii=False) for key in META_KEYS}


def _refuse_if_far(parity: Parity) -> None:
    limit = TOLERANCE[parity.precision]
    if not parity.same_pixels.max <= limit:  # true for NaN
        raise ExportError(
            f"{parity.file} differs from PyTorch by up to {parity.same_pixels.max:.2g} in "
            f"probability, more than {limit:g}; nothing was written. Check the versions of torch, "
            "onnx and onnxruntime"
        )


def _is_dropped(parity: Parity) -> bool:
    """Return whether an int8 file is not written, because it differs too much from PyTorch."""
    if parity.precision != "int8" or parity.same_pixels.max <= TOLERANCE["int8"]:
        return False
    console.log.warning(
        "%s differs from PyTorch by up to %.2g in probability (%d other verdicts), more than %g: "
        "it is not written",
        parity.file, parity.same_pixels.max, parity.same_pixels.verdicts, TOLERANCE["int8"],
    )  # fmt: skip
    return True


def compare(
    net: Detector,
    preprocess: Preprocess,
    meta: Mapping[str, Any],
    files: Sequence[Path],
    images: Path | None,
    on_images: Callable[[int], None] | None = None,
) -> tuple[list[Parity], dict[str, Any]]:
    """Compare ONNX files with their network, on a CPU. Return the `Parity` of each file, and which
    images were compared (the keys `images`, `compared`, `unreadable` of `parity.json`).
    """
    detectors = [load_onnx(file, device="cpu") for file in files]
    probabilities: list[list[np.ndarray]] = [[] for _ in range(1 + 2 * len(files))]
    unreadable: list[str] = []
    for by_torch, by_pillow in _preprocessed(images, preprocess, unreadable):
        with torch.inference_mode():
            real, fake = net(torch.from_numpy(by_torch).permute(0, 3, 1, 2)).unbind(1)
        probabilities[0].append(probability((fake - real).numpy(), meta["temperature"]))
        for index, detector in enumerate(detectors):
            probabilities[2 * index + 1].append(detector.score(by_torch))
            if by_pillow is not None:
                probabilities[2 * index + 2].append(detector.score(by_pillow))
        if on_images:
            on_images(len(by_torch))
    if not probabilities[0]:
        first = f" (first: {unreadable[0]})" if unreadable else ""
        raise ExportError(f"no image to compare on in {images}{first}")
    expected, *others = [np.concatenate(parts) if parts else np.empty(0) for parts in probabilities]
    band = band_of(meta)
    parities = [
        Parity(
            file=detector.checkpoint.name,
            precision=detector.meta["precision"],
            same_pixels=_difference(expected, others[2 * index], band),
            from_files=None
            if images is None
            else _difference(expected, others[2 * index + 1], band),
        )
        for index, detector in enumerate(detectors)
    ]
    seen = {
        "images": "noise" if images is None else images.name,
        "compared": len(expected),
        "unreadable": unreadable,
    }
    return parities, seen


def _difference(
    expected: np.ndarray, exported: np.ndarray, band: tuple[float, float]
) -> Difference:
    change = np.abs(expected - exported)
    verdicts = [
        not math.isfinite(converted) or verdict(reference, band) != verdict(converted, band)
        for reference, converted in zip(expected.tolist(), exported.tolist(), strict=True)
    ]
    return Difference(max=float(change.max()), mean=float(change.mean()), verdicts=sum(verdicts))


def _preprocessed(
    images: Path | None, settings: Preprocess, unreadable: list[str]
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """Yield batches of preprocessed images: (by torch's resize, by Pillow's resize), each uint8
    (B, *shape, 3). Without `images`, yield noise and None, because noise is not resized.
    """
    if images is None:
        noise = np.random.default_rng(0).integers(0, 256, (NOISE, *settings.shape, 3), np.uint8)
        for first in range(0, NOISE, _BATCH):
            yield noise[first : first + _BATCH], None
        return

    def both(file: ImageFile) -> tuple[np.ndarray, np.ndarray]:
        pixels = decode(file.read())
        return pil.preprocess(pixels, settings), preprocess(pixels, settings)

    for names, results in ahead(_files_in(images), both, _BATCH):
        pairs = [result for result in results if not isinstance(result, str)]
        unreadable += [
            f"{name}: {result}"
            for name, result in zip(names, results, strict=True)
            if isinstance(result, str)
        ]
        if pairs:
            by_torch, by_pillow = zip(*pairs, strict=True)
            yield np.stack(by_torch), np.stack(by_pillow)


def _files_in(images: Path) -> list[ImageFile]:
    """Return at most `IMAGES` images, evenly spread over a folder or a shard set."""
    if not (images / INDEX_FILE).exists():
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        return [
            ImageFile(str(path.relative_to(images)), as_file(path).read)
            for path in (paths[row] for row in _spread(len(paths)))
        ]
    shards = open_shards([images])
    reader = ShardReader(shards)

    def read(sample: int) -> bytes:
        (data,) = reader.read([sample])
        if isinstance(data, ReadError):
            raise DecodeError(str(data))
        return data

    return [ImageFile(shards.name(row), partial(read, row)) for row in _spread(len(shards))]


def _spread(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, IMAGES)).astype(int)).tolist()
