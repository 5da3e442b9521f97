"""Runs kvpress in a separate process and environment, because it pins transformers below 5.3.

`STARKV_KVPRESS_PYTHON` is the Python of that environment (`pip install kvpress`). The parent
process asks for one run at a time, so the runs of both sides alternate.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layers import Size

VARIABLE = "STARKV_KVPRESS_PYTHON"


class Peer:
    """Holds a child process that compresses one layer on request."""

    def __init__(self, python: str, size: Size, threads: int):
        layer = size.layer
        numbers = (
            layer.heads,
            layer.groups,
            layer.dim,
            layer.hidden,
            size.length,
            size.window,
            size.budget,
            str(size.dtype).removeprefix("torch."),
            threads,
        )
        self.process = subprocess.Popen(
            [python, str(Path(__file__)), *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds()  # returns when the child is ready

    def seconds(self) -> float:
        """Returns the wall time of one compression, which the child measures."""
        return self._ask("run")

    def operations(self) -> float:
        """Returns the floating-point operations of its products."""
        return self._ask("count")

    def _ask(self, what: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __del__(self) -> None:
        self.process.kill()


def start(size: Size) -> Peer | None:
    """Starts a peer, or returns None where `STARKV_KVPRESS_PYTHON` is not set."""
    import torch

    python = os.environ.get(VARIABLE)
    return None if not python else Peer(python, size, torch.get_num_threads())


def _serve() -> None:
    """Runs in the child, on a Llama layer, because kvpress supports no Qwen2.5-VL or Qwen3-VL."""
    import torch
    from kvpress import SnapKVPress
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    heads, groups, dim, hidden, length, window = map(int, sys.argv[1:7])
    budget, dtype, threads = float(sys.argv[7]), getattr(torch, sys.argv[8]), int(sys.argv[9])
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=dim,
        max_position_embeddings=length,
    )
    layer = LlamaAttention(config, 0).to(device, dtype).eval()
    states = torch.randn(1, length, hidden, device=device, dtype=dtype)
    key = torch.randn(1, groups, length, dim, device=device, dtype=dtype)
    value = torch.randn_like(key)
    place = torch.arange(length, device=device)[None]
    positions = LlamaRotaryEmbedding(config).to(device)(states, place)
    press = SnapKVPress(compression_ratio=1 - budget, window_size=window)

    @torch.no_grad()
    def compress() -> None:
        press.compress(layer, states, key, value, None, {"position_embeddings": positions})
        if device == "cuda":
            torch.cuda.synchronize()

    for line in sys.stdin:
        if line.strip() == "count":
            with FlopCounterMode(display=False) as counter:
                compress()
            print(counter.get_total_flops(), flush=True)
            continue
        start = time.perf_counter()
        compress()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _serve()
