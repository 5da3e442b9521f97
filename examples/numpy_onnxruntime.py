"""Runs an exported language model with numpy and ONNX Runtime, without PyTorch or starkv.

    starkv export CHECKPOINT --budget 0.2 -o DIR
    python examples/numpy_onnxruntime.py DIR 20 5 17 42 8

The numbers are the prompt's token ids. The program prints the ids of a greedy reply. export.json
names every input and output; docs/guides/export.md explains them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def reply(folder: Path, prompt: list[int], length: int) -> list[int]:
    """Returns `length` token ids that follow `prompt`."""
    ports = json.loads((folder / "export.json").read_text())["graphs"]
    prefill, decode = (onnxruntime.InferenceSession(folder / name) for name in ports)
    tokens = len(prompt)
    sizes = {"batch": 1, "stored": 0, "on_frame": 2, "new": tokens, "seen": tokens}
    sizes["budgeted"] = tokens
    feeds = {  # a new session: nothing is stored, and the scoring state is 0
        port["name"]: np.zeros([sizes.get(dim, dim) for dim in port["shape"]], port["dtype"])
        for port in ports["prefill.onnx"]["inputs"]
    }
    feeds["input_ids"][:] = prompt
    feeds["position_ids"][:] = np.arange(tokens)
    for name in ("attention_mask", "counted", "budgeted"):
        feeds[name][:] = 1
    for name in ("frame", "row", "column", "current"):
        feeds[name][:] = -1  # text: no token belongs to a screenshot
    names = [port["name"] for port in ports["prefill.onnx"]["outputs"]]
    found = dict(zip(names, prefill.run(names, feeds), strict=True))
    print(f"{found['present.0.key'].shape[2]} of {tokens} tokens stay cached", file=sys.stderr)
    said = [int(found["logits"].argmax())]
    wanted = [port["name"] for port in ports["decode.onnx"]["outputs"]]
    while len(said) < length:
        feeds = {
            port["name"]: found[port["name"].replace("past", "present")]
            for port in ports["decode.onnx"]["inputs"]
            if port["name"].startswith("past.")
        }
        feeds["input_ids"] = np.array([said[-1:]])
        # Positions count all tokens seen, also those that the cache dropped.
        feeds["position_ids"] = np.array([[tokens + len(said) - 1]])
        feeds["attention_mask"] = np.ones((1, tokens + len(said)), np.int64)
        found = dict(zip(wanted, decode.run(wanted, feeds), strict=True))
        said.append(int(found["logits"].argmax()))
    return said


if __name__ == "__main__":
    print(*reply(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]], 16))
