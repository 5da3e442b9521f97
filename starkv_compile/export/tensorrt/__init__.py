"""TensorRT engines of exported graphs."""
