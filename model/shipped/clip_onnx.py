"""Convert CLIP's image encoder from an 8-bit ONNX file to float32 weights with timm's names.

Main entry: `convert(data)` takes the bytes of the ONNX file and returns a dict, name -> float32
array. It raises `ConvertError` (a `ValueError`) if the bytes are no ONNX file or lack a parameter,
inside or outside of the layers. It does not notice if whole layers are missing.

The input is ONNX Runtime's dynamic quantization of transformers' `CLIPVisionModel`: each linear
layer has int8 weights (in, out) with a scale and a zero point per output channel; all other
parameters are float32. The output has the names of timm's `VisionTransformer`, without the
projection to the joint image-text space.

`dequantized(whole, scale, zero)` converts the integers (in, out) of one layer to float32 (out, in).
`timm_names(arrays)` takes all arrays by transformers' names and returns them by timm's; it raises
`KeyError` if one is missing. Two dicts map transformers' names to timm's: `RENAMED` those of the
parameters outside of the layers, `IN_LAYER` those of the modules in a layer. `LAYERS` is the
beginning of transformers' names in the layers.
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
"""Parameters outside the layers: transformers' name -> timm's name."""

IN_LAYER = {
    "layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
"""Modules of a layer: transformers' name -> timm's name. Query, key and value are merged
separately.
"""

_LINEAR = re.compile(r"/vision_model/encoder/layers\.(\d+)/([\w/]+)/MatMul_quant")


class ConvertError(ValueError):
    """An ONNX file that is not such an export. The message names the missing part."""


def convert(data: bytes) -> dict[str, np.ndarray]:
    """Convert the bytes of the ONNX file to float32 weights with timm's names. The same bytes give
    the same numbers on every machine.

    Raises:
        ConvertError: `data` is no ONNX file, or lacks a parameter.
    """
    import onnx  # a slow import
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_from_string(data).graph
    except DecodeError as error:
        raise ConvertError("the file is not ONNX") from error
    arrays = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in graph.initializer
        if not one.name.startswith("onnx::")
    }
    quantized = {one.name: one for one in graph.initializer if one.name.startswith("onnx::")}
    try:
        for node in graph.node:
            if (matched := _LINEAR.fullmatch(node.name)) and node.op_type == "MatMulInteger":
                base = node.input[1].removesuffix("_quantized")
                whole, scale, zero = (
                    onnx.numpy_helper.to_array(quantized[base + part])
                    for part in ("_quantized", "_scale", "_zero_point")
                )
                module = matched[2].replace("/", ".")
                arrays[f"{LAYERS}{matched[1]}.{module}.weight"] = dequantized(whole, scale, zero)
        return timm_names(arrays)
    except KeyError as error:
        raise ConvertError(
            f"the file has no {error.args[0]}, so it is not the expected export of CLIP"
        ) from error


def dequantized(whole: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Convert integers (in, out) to float32 (out, in), with the scale and zero point of each
    output.
    """
    difference = whole.astype(np.float32) - zero.astype(np.float32)
    return np.ascontiguousarray((difference * scale.astype(np.float32)).T)


def timm_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename parameters from transformers' names to timm's, and merge query, key and value.

    Raises:
        KeyError: a parameter is missing; the argument is its name.
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
