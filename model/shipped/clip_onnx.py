"""CLIP's image tower out of an ONNX file in 8 bits, as the plain fp32 weights that timm reads.

The file is what ONNX Runtime's dynamic quantization makes of transformers' `CLIPVisionModel`: each
linear layer holds int8 weights (in, out) with a scale and a zero point for each output channel, and
everything else is fp32. Names of transformers become those of timm's `VisionTransformer`; the
projection into the space of texts is left out.
"""

import re
from collections.abc import Mapping

import numpy as np

LAYERS = "vision_model.encoder.layers."

RENAMED = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "vision_model.pre_layrnorm.weight": "norm_pre.weight",
    "vision_model.pre_layrnorm.bias": "norm_pre.bias",
    "vision_model.post_layernorm.weight": "norm.weight",
    "vision_model.post_layernorm.bias": "norm.bias",
}
"""Parameters outside the layers -> their names in timm."""

IN_LAYER = {
    "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
"""Modules of a layer -> their names in timm; query, key and value become one."""

_LINEAR = re.compile(r"/vision_model/encoder/layers\.(\d+)/([\w/]+)/MatMul_quant")


class ConvertError(ValueError):
    """An ONNX file that is no such export; the message says what was missing."""


def convert(data: bytes) -> dict[str, np.ndarray]:
    """The weights by timm's names, float32, from the bytes of the ONNX file; the same bytes give
    the same numbers on every machine.

    Raises:
        ConvertError: it is no ONNX file, or lacks a parameter.
    """
    import onnx  # it takes most of a second
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_from_string(data).graph
    except DecodeError as error:
        raise ConvertError("it is no ONNX file") from error
    arrays = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in graph.initializer
        if not one.name.startswith("onnx::")
    }
    quantized = {one.name: one for one in graph.initializer if one.name.startswith("onnx::")}
    for node in graph.node:
        if (matched := _LINEAR.fullmatch(node.name)) and node.op_type == "MatMulInteger":
            base = node.input[1].removesuffix("_quantized")
            whole, scale, zero = (
                onnx.numpy_helper.to_array(quantized[base + part])
                for part in ("_quantized", "_scale", "_zero_point")
            )
            module = matched[2].replace("/", ".")
            arrays[f"{LAYERS}{matched[1]}.{module}.weight"] = dequantized(whole, scale, zero)
    try:
        return timm_names(arrays)
    except KeyError as error:
        raise ConvertError(f"it has no {error.args[0]}: it is no export of this kind") from error


def dequantized(whole: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Float32 (out, in) from integers (in, out), with scale and zero point of each output."""
    difference = whole.astype(np.float32) - zero.astype(np.float32)
    return np.ascontiguousarray((difference * scale.astype(np.float32)).T)


def timm_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by transformers' names as timm's, the three of attention in one.

    Raises:
        KeyError: the name of a parameter that is missing.
    """
    layers = {name.removeprefix(LAYERS).split(".")[0] for name in arrays if name.startswith(LAYERS)}
    named = {new: arrays[old] for old, new in RENAMED.items()}
    named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    named["pos_embed"] = named["pos_embed"][None]
    for layer in sorted(layers, key=int):
        for kind in ("weight", "bias"):
            parts = [arrays[f"{LAYERS}{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
            for old, new in IN_LAYER.items():
                named[f"blocks.{layer}.{new}.{kind}"] = arrays[f"{LAYERS}{layer}.{old}.{kind}"]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}
