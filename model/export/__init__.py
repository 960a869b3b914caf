"""Convert checkpoints: export to ONNX and the Hugging Face Hub, import, average."""
