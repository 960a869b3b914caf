"""ONNX export: the same results as the checkpoint, and prediction without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import evaluate
import predict
from model import checkpoint, load_detector
from model.__main__ import main
from model.evaluation.scores import read_scores
from model.export import import_original
from model.export import onnx as export
from model.inference.onnx_detector import (
    FORMAT_VERSION,
    META_KEYS,
    OnnxError,
    load_onnx,
    preprocess,
)
from model.network import build
from model.recipe import Network
from pipeline import pil
from pipeline.preprocess import Preprocess
from sharding.format import CLASSES
from tests.builders import PREPROCESS, ROOT, photo

# torch's resize has weights of 16 bits, Pillow's of 22 bits, so values near the middle between two
# levels can round differently. Measured: up to 1.5 % of values, by one level.
LEVELS, SHARE = 1, 0.03


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("count", [1, 5])
def test_the_graph_computes_what_the_network_computes(
    precision: str, limit: float, count: int, exported: Path, tiny_checkpoint: Path
) -> None:
    """For any number of images. `probability` includes the temperature, `logits` do not."""
    net, preprocess, _ = checkpoint.load_network(tiny_checkpoint)
    pixels = np.stack([pil.preprocess(photo(seed, 64, 64), preprocess) for seed in range(count)])
    with torch.inference_mode():
        expected = net(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    detector = load_onnx(exported / export.FILES[precision], device="cpu")
    probabilities, logits = detector.session.run(["probability", "logits"], {"images": pixels})
    assert (probabilities.dtype, logits.dtype) == (np.float32, np.float32)
    assert np.abs(logits - expected.numpy()).max() < 10 * limit
    fake = torch.sigmoid((expected[:, 1] - expected[:, 0]) / 1.7).numpy()
    assert np.ptp(fake) > 1e-3 or count == 1  # the images have different scores
    assert np.abs(probabilities - fake).max() < limit


@pytest.mark.parametrize("precision", export.FILES)
def test_every_file_passes_the_full_check_of_onnx(exported: Path, precision: str) -> None:
    model = onnx.load(exported / export.FILES[precision])
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_the_weights_of_fp16_are_halved(exported: Path) -> None:
    kinds = {}
    for precision in ("fp32", "fp16"):
        weights = onnx.load(exported / export.FILES[precision]).graph.initializer
        large = [weight for weight in weights if np.prod(weight.dims) > 100]
        kinds[precision] = {weight.data_type for weight in large}
    assert kinds == {"fp32": {onnx.TensorProto.FLOAT}, "fp16": {onnx.TensorProto.FLOAT16}}


def test_the_linear_layers_of_int8_are_quantized(exported: Path) -> None:
    kinds, sizes = {}, {}
    for precision, name in export.FILES.items():
        graph = onnx.load(exported / name).graph
        kinds[precision] = {node.op_type for node in graph.node}
        sizes[precision] = sum(w.data_type == onnx.TensorProto.INT8 for w in graph.initializer)
    assert "MatMulInteger" in kinds["int8"] and "MatMulInteger" not in kinds["fp32"]
    assert not {"ConvInteger", "MatMul", "Gemm"} & kinds["int8"]
    assert sizes["int8"] and not sizes["fp32"]


def test_parity_is_written(exported: Path) -> None:
    parity = json.loads((exported / "parity.json").read_text())
    assert (parity["compared"], len(parity["unreadable"])) == (12, 1)
    assert parity["unreadable"][0].startswith("broken.jpg: ")
    assert [entry["precision"] for entry in parity["files"]] == ["fp32", "fp16", "int8"]
    for entry in parity["files"]:
        limit = parity["tolerance"][entry["precision"]]
        assert 0 < entry["same_pixels"]["mean"] <= entry["same_pixels"]["max"] <= limit
        assert entry["from_files"]["verdicts"] == 0 or entry["precision"] == "int8"
    one, two, three = (entry["same_pixels"]["max"] for entry in parity["files"])
    assert one < two < three


def test_the_metadata_describes_the_file(exported: Path, tiny_checkpoint: Path) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint)
    loaded = load_onnx(exported / "detector.onnx", device="cpu")
    assert set(loaded.meta) == {*META_KEYS, "sha256"}
    for key in ("classes", "preprocess", "temperature", "threshold", "calibration", "step"):
        assert loaded.meta[key] == meta[key]
    assert loaded.meta["data"] == export.fitness_of(meta)
    assert (loaded.preprocess, loaded.band, loaded.threshold) == (PREPROCESS, (0.3, 0.6), 0.6)
    assert repr(loaded).startswith("OnnxDetector('onnx/detector.onnx ")
    assert (loaded.backend, loaded.reason) == ("pil", "ONNX Runtime, CPUExecutionProvider")
    assert loaded.meta["license"].startswith("CC-BY-NC-4.0")
    assert load_onnx(exported / "detector.onnx", threshold=0.9).band == (0.9, 0.9)


def test_notices_are_stored_in_the_file(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported / "detector.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    data = {"sources": ["a"], "synthetic_sources": ["a"], "titles": {"a": "drawings"},
            "train": ["no part of it"], "set_sha256": {"x": "b"},
            "generators": ["sdxl"]}  # fmt: skip
    meta = {key: json.loads(properties.get(key, "null")) for key in META_KEYS} | {"data": data}
    known = export.fitness_of(meta)
    assert known.pop("earlier_sets") == {"b": "x"}
    assert known.pop("earlier_generators") == ["sdxl"]
    assert known == {"sources": ["a"], "synthetic_sources": ["a"], "titles": {"a": "drawings"}}
    properties["data"] = json.dumps(known)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, tmp_path / "x.onnx")
    loaded = load_onnx(tmp_path / "x.onnx", device="cpu")
    assert [notice.kind for notice in loaded.notices] == ["synthetic"]


def test_its_identity_covers_the_weights(exported: Path, tmp_path: Path) -> None:
    """So results of other weights cannot be resumed, even if the metadata is equal."""
    file = exported / export.FILES["fp32"]
    model = onnx.load(file)
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights.flat[0] += 1
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(weights, model.graph.initializer[0].name)
    )
    (tmp_path / file.parent.name).mkdir()
    onnx.save(model, other := tmp_path / file.parent.name / file.name)
    one, two = load_onnx(file, device="cpu"), load_onnx(other, device="cpu")
    assert {**one.meta, "sha256": ""} == {**two.meta, "sha256": ""}
    assert one.identity == load_onnx(file, device="cpu").identity != two.identity


def test_the_files_contain_no_path_of_this_machine(exported: Path, images: Path) -> None:
    for path in exported.iterdir():
        data = path.read_bytes()
        for trace in (str(ROOT), str(images.parent), ".py"):
            assert trace.encode() not in data, f"{path.name} holds {trace}"


def test_it_predicts_what_the_checkpoint_predicts(
    exported: Path, tiny_checkpoint: Path, images: Path
) -> None:
    files = sorted(images.iterdir())
    expected = load_detector(tiny_checkpoint, device="cpu", backend="pil").predict(files)
    predictions = list(
        load_onnx(exported / "detector.onnx", device="cpu").predict(files, batch_size=4)
    )
    assert [(f.name, f.verdict, f.error) for f in predictions] == [
        (e.name, e.verdict, e.error) for e in expected
    ]
    pairs = [(f.probability, e.probability) for f, e in zip(predictions, expected, strict=True)]
    assert max(abs(f - e) for f, e in pairs if e is not None) < 2e-3


@pytest.mark.parametrize("side", [17, 47, 48, 49, 54, 60, 83, 131, 300, 999])
def test_both_resizes_agree(side: int) -> None:
    """torch's resize and Pillow's, with the same center crop."""
    pixels = photo(side, side, side + 7)
    one, two = (f(pixels, PREPROCESS).astype(np.int16) for f in (pil.preprocess, preprocess))
    assert one.shape == two.shape == (PREPROCESS.crop_size, PREPROCESS.crop_size, 3)
    assert np.abs(one - two).max() <= LEVELS
    assert (one != two).mean() <= SHARE


def test_it_runs_without_torch(exported: Path, images: Path) -> None:
    program = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import evaluate
import predict
predict.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "--onnx", str(exported / "detector.onnx"),
         "--format", "csv", str(images)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # one image is unreadable
    assert "1 of 13 images have no verdict" in done.stderr
    assert len(done.stdout.splitlines()) == 14 and "blocked" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--checkpoint", "x"],
        ["--heatmap", "x"],
        ["--backend", "dali"],
        ["--trust"],
        ["--fake-label", "x"],
    ],
)
def test_options_that_need_torch_are_refused_with_onnx(
    arguments: list[str], exported: Path, images: Path
) -> None:
    file = str(exported / "detector.onnx")
    result = CliRunner().invoke(predict.main, [str(images), "--onnx", file, *arguments])
    assert result.exit_code == 2 and "--onnx cannot be combined" in result.output


def foreign(path: Path, **metadata: str) -> Path:
    """Write an ONNX file that is not an export: its output is its input."""
    pixels = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n"])
    same = onnx.helper.make_tensor_value_info("same", onnx.TensorProto.UINT8, ["n"])
    node = onnx.helper.make_node("Identity", ["images"], ["same"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "foreign", [pixels], [same]),
        opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not ONNX at all")
    known = dict.fromkeys(META_KEYS, "null")
    whole = known | {
        "format_version": str(FORMAT_VERSION), "classes": json.dumps(CLASSES), "threshold": "0.5",
        "temperature": "1", "preprocess": '{"crop_size": 16, "resize_size": 16}',
    }  # fmt: skip
    cases = {
        tmp_path / "missing.onnx": "there is no file",
        tmp_path / "text.onnx": "cannot be opened as ONNX",
        foreign(tmp_path / "bare.onnx"): "has no format_version, classes",
        foreign(
            tmp_path / "new.onnx", **(known | {"format_version": "9"})
        ): f"has version 9, expected {FORMAT_VERSION}; export",
        foreign(
            tmp_path / "other.onnx",
            **(known | {"format_version": str(FORMAT_VERSION), "classes": '["cat"]'}),
        ): r"has the classes \['cat'\]",
        foreign(
            tmp_path / "none.onnx", **(known | {"format_version": str(FORMAT_VERSION)})
        ): "has the classes None",
        **{
            foreign(tmp_path / f"{number}.onnx", **(whole | {key: value})): said
            for number, (key, value, said) in enumerate(
                [
                    (
                        "preprocess",
                        '{"crop_size": 16, "resize_size": 16, "interpolation": "wavelet"}',
                        "interpolation",
                    ),
                    ("preprocess", '{"crop_size": 16, "resize_size": 16, "later": 1}', "later"),
                    ("preprocess", "[]", "preprocess"),
                    ("calibration", "[]", "calibration"),
                    ("calibration", '{"band": 0.5}', "calibration.band takes a list, got"),
                    ("calibration", "{}", "calibration.band is missing in its metadata"),
                    ("data", "[1]", "data"),
                    ("temperature", '"warm"', "temperature"),
                    ("temperature", "-1", "temperature takes a finite number above 0, got -1"),
                    ("threshold", "1.5", "threshold takes a number from 0 to 1, got 1.5"),
                    ("calibration", '{"band": [0.9, 0.1]}', "the lower one first, got .*in"),
                    (
                        "calibration",
                        '{"band": [0.1, 0.9], "at_fpr": [1]}',
                        "calibration.at_fpr.0 takes a list",
                    ),
                    (
                        "calibration",
                        '{"band": [0.1, 0.9], "method": 3}',
                        "calibration.method takes a text",
                    ),
                    ("threshold", "NaN", "not finite|threshold"),
                ]
            )
        },
        foreign(tmp_path / "cut.onnx", **(known | {"classes": '["real"'})): "not JSON .Expecting",
        foreign(
            tmp_path / "deep.onnx", **(known | {"preprocess": "[" * 100_000})
        ): "nested too deep",
    }
    for path, said in cases.items():
        with pytest.raises(OnnxError, match=said):
            load_onnx(path, device="cpu")


def test_a_wrong_device_or_threshold_is_refused(exported: Path) -> None:
    for device in ("tpu", "cpu:1", "cuda:x", "cuda:²", "auto:"):
        with pytest.raises(ValueError, match=f"no such device: {device}; use auto, cpu, cuda or"):
            load_onnx(exported / "detector.onnx", device=device)
    with pytest.raises(ValueError, match="a threshold is a probability"):
        load_onnx(exported / "detector.onnx", threshold=1.5)


def test_a_result_that_is_not_finite_is_far_from_every_verdict() -> None:
    apart = export._difference(np.array([0.2, 0.9]), np.array([0.2, np.nan]), (0.4, 0.6))
    assert np.isnan(apart.max) and apart.verdicts == 1


@pytest.mark.parametrize("step", ["_graph_of", "_metadata"])
def test_a_library_that_fails_is_one_line(
    step: str, exported: Path, tiny_checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Such as versions that do not fit together. The cause says more than the libraries' text."""

    def fails(*_arguments: object) -> None:
        raise RuntimeError("failed to export.\n# Python 3.11") from ImportError("no opset23")

    monkeypatch.setattr(export, "_graph_of", lambda *_: onnx.load(exported / "detector.onnx"))
    monkeypatch.setattr(export, step, fails)
    arguments = ["export", "--onnx", "--checkpoint", str(tiny_checkpoint)]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "onnx")])
    assert result.exit_code == 1
    said = "Error: detector.onnx could not be made (ImportError: no opset23); nothing was written."
    assert f"{said} Found torch {torch.__version__.partition('+')[0]}" in result.stderr
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())


def test_a_file_that_differs_too_much_is_not_written(
    exported: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Existing files are copied instead of exported, to save time; only the comparison runs."""
    model = onnx.load(exported / "detector.onnx")
    monkeypatch.setattr(export, "_graph_of", lambda *_: model)
    monkeypatch.setitem(export.TOLERANCE, "fp32", 1e-12)
    arguments = ["export", "--onnx", "--checkpoint", str(tiny_checkpoint)]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "onnx")])
    assert result.exit_code == 1
    assert "detector.onnx differs from PyTorch by up to" in result.output
    assert not list(tmp_path.iterdir())


def test_an_int8_file_that_differs_too_much_is_left_out_alone(
    exported: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:  # fmt: skip
    model = onnx.load(exported / "detector.onnx")
    monkeypatch.setattr(export, "_graph_of", lambda *_: model)
    out = tmp_path / "onnx"
    export.export_onnx(tiny_checkpoint, out)
    assert (out / "detector-int8.onnx").exists()
    monkeypatch.setitem(export.TOLERANCE, "int8", 1e-12)
    report = export.export_onnx(tiny_checkpoint, out)
    assert [entry["precision"] for entry in report["files"]] == ["fp32", "fp16"]
    assert sorted(path.name for path in out.iterdir()) == [
        "detector-fp16.onnx", "detector.onnx", "parity.json",
    ]  # fmt: skip
    assert any("detector-int8.onnx differs from PyTorch by up to" in line for line in logged)


def test_without_images_noise_is_compared(
    exported: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:  # fmt: skip
    model = onnx.load(exported / "detector.onnx")
    monkeypatch.setattr(export, "_graph_of", lambda *_: model)
    report = export.export_onnx(tiny_checkpoint, tmp_path / "onnx")
    assert (report["images"], report["compared"]) == ("noise", export.NOISE)
    assert all(entry["from_files"] is None for entry in report["files"])


def test_a_shard_set_is_compared_too(exported: Path, tiny_checkpoint: Path, data: Path) -> None:
    net, preprocess, meta = checkpoint.load_network(tiny_checkpoint)
    files = [exported / "detector.onnx"]
    (parity,), seen = export.compare(net, preprocess, meta, files, data / "val")
    assert seen["images"] == "val" and seen["compared"] > 10 and not seen["unreadable"]
    assert parity.same_pixels.max < 1e-5


def test_no_image_is_an_error(exported: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    net, preprocess, meta = checkpoint.load_network(tiny_checkpoint)
    with pytest.raises(export.ExportError, match=r"no image to compare on .*first: broken.png"):
        export.compare(net, preprocess, meta, [exported / "detector.onnx"], tmp_path)


def test_export_needs_an_option_for_the_format() -> None:
    result = CliRunner().invoke(main, ["export"])
    assert result.exit_code == 2 and "--onnx, --hub FOLDER or --head FOLDER" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("export --hub NEW --images DIR", "--images and --out are for --onnx"),
        ("export --hub NEW --out DIR", "--images and --out are for --onnx"),
        ("export --onnx --report FILE", "--report is for --hub FOLDER or --head FOLDER"),
        ("embed --recipe FILE --jobs 2", "add --engine ray"),
        ("fetch original --file FILE", "type `python -m model import FILE` instead"),
        ("fetch clip --trust-list", "--trust-list fetches no detector: leave out clip"),
        ("fetch clip --run mine", "--run names the run of the original's checkpoint"),
        ("fetch --trust-list --run mine", "--run names the run of the original's checkpoint"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    Path("FILE").write_text("[[")  # nothing reads it
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_onnx_is_opened_whatever_its_suffix(exported: Path, images: Path, tmp_path: Path) -> None:
    for name in ("detector", "detector.py"):
        file = tmp_path / name
        file.write_bytes((exported / "detector.onnx").read_bytes())
        result = CliRunner().invoke(predict.main, ["--onnx", str(file), str(images / "00.jpeg")])
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_original_network_can_be_exported(images: Path, tmp_path: Path) -> None:
    """ConvNeXtV2-Base with random weights, imported like the published file."""
    torch.manual_seed(0)
    base = Network(name="convnextv2_base", pretrained=False, init="fan_in")
    net = build(base, pretrained=False)
    torch.save({"model": net.backbone.state_dict()}, tmp_path / "checkpoint_phase2.pth")
    folder = import_original.import_file(tmp_path / "checkpoint_phase2.pth", tmp_path / "original")
    report = export.export_onnx(folder, tmp_path / "onnx", images)
    assert report["files"][0]["same_pixels"]["max"] < 1e-4
    loaded = load_onnx(tmp_path / "onnx" / "detector.onnx")
    assert (
        loaded.preprocess == Preprocess(crop_size=256, resize_size=288)
        and "its card says MIT" in loaded.meta["license"]
    )


def test_evaluate_scores_sets_with_an_onnx_file(
    exported: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """The scores differ from the checkpoint's only by the rounding of Pillow's resize."""
    file = exported / export.FILES["fp32"]
    ask = ["--shards", "val", "--data", str(data), "--device", "cpu", "--runs", str(tmp_path)]
    tables = []
    for name, detector in (("onnx", file), ("torch", tiny_checkpoint)):
        out = ["--out", str(tmp_path / name), "--detector", str(detector)]
        result = CliRunner().invoke(evaluate.main, [*ask, *out])
        assert result.exit_code == 0, result.output
        tables.append(read_scores(tmp_path / name / "scores.parquet"))
    first, second = (table.numbers("probability") for table in tables)
    np.testing.assert_allclose(first, second, atol=0.02)
    assert np.ptp(second) > 0.02 and tables[0].evaluation["threshold"] == 0.6
    assert [table.evaluation["detector"]["kind"] for table in tables] == ["onnx", "checkpoint"]
    refused = CliRunner().invoke(
        evaluate.main, ["calibrate", *ask[:6], "--runs", str(tmp_path), "--detector", str(file)]
    )
    assert refused.exit_code == 1 and "contains its calibration" in refused.stderr
    shown = CliRunner().invoke(evaluate.main, ["calibrate", "--help"]).stdout
    assert "An ONNX file is refused: calibrate its checkpoint" in " ".join(shown.split())
    page = (ROOT / "docs/detectors.md").read_text(encoding="utf-8")
    assert "`calibrate` refuses an ONNX file: calibrate its checkpoint" in page
