"""Conversion of CLIP's ONNX file: names, numbers, reproducible bytes, refusals."""

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file

from model.shipped import clip_onnx
from model.shipped.fetch import write_safetensors
from tests.wheels import CLIP_WIDTH, clip_onnx_file


def test_timm_takes_the_names_and_nothing_is_missing(tmp_path) -> None:
    write_safetensors(tmp_path / "x.safetensors", clip_onnx.convert(clip_onnx_file()))
    net = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", num_classes=0, img_size=32, embed_dim=CLIP_WIDTH,
        depth=2, num_heads=2,
    )  # fmt: skip
    net.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)


def test_the_weights_equal_those_of_the_file() -> None:
    weights = clip_onnx.convert(clip_onnx_file())
    qkv = weights["blocks.1.attn.qkv.weight"]
    assert (qkv.shape, qkv.dtype) == ((3 * CLIP_WIDTH, CLIP_WIDTH), np.float32)
    rng = np.random.default_rng(1)  # as `clip_onnx_file` draws
    numbers = {}
    for layer in range(2):
        for part in ("q", "k", "v", "out"):
            numbers[layer, part] = rng.integers(-127, 128, (CLIP_WIDTH, CLIP_WIDTH), np.int8)
        rng.integers(-127, 128, (CLIP_WIDTH, 4 * CLIP_WIDTH), np.int8)
        rng.integers(-127, 128, (4 * CLIP_WIDTH, CLIP_WIDTH), np.int8)
    scale = np.arange(1, CLIP_WIDTH + 1, dtype=np.float32)[:, None] / 256
    for at, part in enumerate("qkv"):  # (in, out) in the file, (out, in) here, zero point 3
        expected = (numbers[1, part].T.astype(np.float32) - 3) * scale
        np.testing.assert_array_equal(qkv[at * CLIP_WIDTH : (at + 1) * CLIP_WIDTH], expected)
    expected = (numbers[1, "out"].T.astype(np.float32) - 3) * scale
    np.testing.assert_array_equal(weights["blocks.1.attn.proj.weight"], expected)
    assert weights["cls_token"].shape == (1, 1, CLIP_WIDTH)
    assert not any(
        "proj" in name and "blocks" not in name and "patch" not in name for name in weights
    )


def test_the_same_file_gives_the_same_bytes(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    weights = clip_onnx.convert(clip_onnx_file())
    write_safetensors(one, weights)
    write_safetensors(two, dict(reversed(weights.items())))
    assert one.read_bytes() == two.read_bytes()
    loaded = load_file(one)
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[n], torch.from_numpy(w.copy())) for n, w in weights.items())
    assert int.from_bytes(one.read_bytes()[:8], "little") % 8 == 0  # values are aligned


def without_scale() -> bytes:
    """Return the file of CLIP without the scale of one quantized layer."""
    model = onnx.load_from_string(clip_onnx_file())
    arrays = model.graph.initializer
    arrays.remove(next(one for one in arrays if one.name.endswith("_scale")))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"\xff\xffno onnx", "the file is not ONNX"), (b"", "the file has no"),
     (clip_onnx_file(without="vision_model.pre_layrnorm.bias"), "no vision_model.pre_layrnorm"),
     (without_scale(), r"the file has no onnx::MatMul_\S*_scale")],
)  # fmt: skip
def test_another_file_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(clip_onnx.ConvertError, match=said):
        clip_onnx.convert(data)
