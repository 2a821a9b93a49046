"""Detectors for other code: Hugging Face directories, ONNX, the papers' codes."""
