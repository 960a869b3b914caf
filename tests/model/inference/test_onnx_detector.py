"""ONNX files of strangers: the metadata of an export with another network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import predict
from model.inference.onnx_detector import FORMAT_VERSION, META_KEYS, OnnxError, load_onnx
from sharding.format import CLASSES
from tests.builders import encode, photo

IMAGES = ("images", TensorProto.UINT8, ["batch", 16, 16, 3])
PROBABILITY = ("probability", TensorProto.FLOAT, ["batch"])
LOGITS = ("logits", TensorProto.FLOAT, ["batch", 2])


def network(
    path: Path,
    *,
    images: tuple[str, int, list[str | int]] = IMAGES,
    probability: tuple[str, int, list[str | int]] = PROBABILITY,
    logits: tuple[str, int, list[str | int]] = LOGITS,
    value: float = 0.25,
    extra: int = 0,
) -> Path:
    """Write a network with the metadata of an export. Its probability of each image is `value`; it
    gives `extra` more of them than images.
    """
    nodes = [
        helper.make_node("Shape", [images[0]], ["all"], start=0, end=1),
        helper.make_node("Constant", [], ["extra"], value_ints=[extra]),
        helper.make_node("Add", ["all", "extra"], ["more"]),
        helper.make_node("Constant", [], ["two"], value_ints=[2]),
        helper.make_node("Concat", ["all", "two"], ["pairs"], axis=0),
        *(
            helper.make_node(
                "ConstantOfShape", [size], [name],
                value=helper.make_tensor("", kind, [1], [number]),
            )
            for (name, kind, shape), number in ((probability, value), (logits, 0.5))
            for size in ["pairs" if len(shape) == 2 else "more"]
        ),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info(*of) for of in (probability, logits)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(*images)], outputs)
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    texts = dict.fromkeys(META_KEYS, "null") | {
        "format_version": str(FORMAT_VERSION), "classes": json.dumps(CLASSES), "threshold": "0.5",
        "temperature": "1", "preprocess": '{"crop_size": 16, "resize_size": 16}',
    }  # fmt: skip
    helper.set_model_props(model, texts)
    onnx.save(model, path)
    return path


def test_a_network_like_an_export_is_used(tmp_path: Path) -> None:
    detector = load_onnx(network(tmp_path / "a.onnx"), device="cpu")
    predictions = detector.predict([photo(1), photo(2)])
    assert [(one.probability, one.verdict) for one in predictions] == [(0.25, "no sign of AI")] * 2
    assert detector.logits([np.zeros((16, 16, 3), np.uint8)]).tolist() == [0]


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("images", ("pixels", *IMAGES[1:]), r"has pixels: tensor\(uint8\) .*expected images: "),
        ("images", ("images", TensorProto.FLOAT, IMAGES[2]), r"has images: tensor\(float\)"),
        ("images", (*IMAGES[:2], ["batch", 3, 16, 16]), r"\['batch', 3, 16, 16\], expected images"),
        ("images", (*IMAGES[:2], [1, 16, 16, 3]), r"has images: .* \[1, 16, 16, 3\], expected"),
        ("probability", (*PROBABILITY[:2], ["batch", 2]), r"has probability: .*\['batch', 2\]"),
        ("probability", ("score", *PROBABILITY[1:]), r"has score: .* expected probability"),
        ("logits", ("logits", TensorProto.DOUBLE, LOGITS[2]), r"logits: tensor\(double\)"),
    ],
)
def test_another_network_is_refused_before_any_image(
    part: str, value: tuple[str, int, list[str | int]], said: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "a.onnx", **{part: value})
    with pytest.raises(OnnxError, match=said) as caught:
        load_onnx(path, device="cpu")
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"value": 7.0}, "gives the probability 7, expected 0 to 1"),
        ({"value": -0.5}, "gives the probability -0.5, expected 0 to 1"),
        ({"extra": 2}, "gives probability of shape (3,), expected (1,)"),
    ],
)
def test_numbers_that_are_no_probabilities_end_the_run(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "a.onnx", **options)
    (tmp_path / "p.png").write_bytes(encode(photo(1), "PNG"))
    result = CliRunner().invoke(predict.main, [str(tmp_path / "p.png"), "--onnx", str(path)])
    assert result.exit_code and isinstance(result.exception, SystemExit)
    assert said in result.stderr and str(path) in result.stderr
    assert "likely AI  " not in result.stdout and "unreadable" not in result.output


def test_a_sigmoid_that_rounds_up_is_a_probability(tmp_path: Path) -> None:
    """As that of ONNX Runtime does, for some logits near 17.8."""
    detector = load_onnx(network(tmp_path / "a.onnx", value=1.0000001), device="cpu")
    assert detector.predict(photo(1)).probability == 1.0


def test_a_result_that_is_not_finite_is_a_failure_of_the_image(tmp_path: Path) -> None:
    detector = load_onnx(network(tmp_path / "a.onnx", value=float("nan")), device="cpu")
    assert "not a finite number" in detector.predict(photo(1)).error
