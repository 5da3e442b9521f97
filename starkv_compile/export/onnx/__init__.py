"""ONNX files of captured graphs."""
