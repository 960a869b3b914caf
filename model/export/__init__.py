"""Checkpoints for other programs: ONNX, the Hugging Face Hub, imports and averages."""
