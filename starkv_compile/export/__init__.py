"""Export: the compacting decoder as ONNX graphs, and a runner for them.

    starkv export CHECKPOINT --budget 0.2 --max-seq 16384 -o DIR

`torch.export` captures the model, the graph passes rewrite what it captured, the ops of ours are
put in place by their bodies, and `torch.onnx` writes the result. See docs/guides/export.md.
"""
