"""Make a tiny CLIP as an ONNX file, and a wheel that contains it."""

import io
import zipfile

import numpy as np

CLIP_WIDTH = 8
"""Number of channels of the tiny CLIP in `clip_onnx_file`."""


def clip_onnx_file(without: str = "") -> bytes:
    """Return an ONNX file with the tensor names of an 8-bit CLIP image tower: 2 layers, 32 pixels,
    seeded weights. Its nodes only name their inputs; they cannot be run.
    """
    import onnx

    width, rng = CLIP_WIDTH, np.random.default_rng(1)
    floats = np.random.default_rng(2)
    linear = {"mlp/fc1": (width, 4 * width), "mlp/fc2": (4 * width, width)}
    linear = {f"self_attn/{p}_proj": (width, width) for p in ("q", "k", "v", "out")} | linear
    start = "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.position_embedding.weight": (5, width),
        "embeddings.patch_embedding.weight": (width, 3, 16, 16),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    arrays, nodes = {}, []
    for layer in range(2):
        for module, (inputs, outputs) in linear.items():
            base = f"onnx::MatMul_{layer}_{module.replace('/', '_')}"
            whole = rng.integers(-127, 128, (inputs, outputs), np.int8)
            arrays |= {
                f"{base}_quantized": whole,
                f"{base}_scale": np.arange(1, outputs + 1, dtype=np.float32) / 256,
                f"{base}_zero_point": np.full(outputs, 3, np.int8),
            }
            name = f"/vision_model/encoder/layers.{layer}/{module}/MatMul_quant"
            inputs_of = ["x", f"{base}_quantized", "z", f"{base}_zero_point"]
            nodes.append(onnx.helper.make_node("MatMulInteger", inputs_of, ["y"], name=name))
            shapes[f"encoder.layers.{layer}.{module.replace('/', '.')}.bias"] = (outputs,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{layer}.{norm}.{k}": (width,) for k in ("weight", "bias")}
    for name, shape in shapes.items():
        arrays[start + name] = floats.normal(size=shape).astype(np.float32)
    arrays.pop(without, None)
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "clip", [], [], initializer=initializers)
    return onnx.helper.make_model(graph).SerializeToString()


def wheel_file(member: str, data: bytes, package: str = "tinyclip", version: str = "1.0") -> bytes:
    """Return a wheel with one file and the metadata that pip needs."""
    stream, info = io.BytesIO(), f"{package}-{version}.dist-info"
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return stream.getvalue()
