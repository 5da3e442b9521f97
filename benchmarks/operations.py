"""Counts floating-point operations of the compression: `python -m benchmarks.operations`.

torch.utils.flop_counter counts the products of one layer. The rival is kvpress's SnapKV.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from starkv_compile.kernels import reference

from . import kvpress_peer
from .contenders import CONTENDERS, log_sum_exp
from .layers import LAYERS, Size, make_inputs

OURS = "ours"


def count(work: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main() -> None:
    for layer in LAYERS.values():
        size = Size(layer, "1080p", 5, 8, 0.2, torch.float32)
        inputs = make_inputs(size, "cpu")
        # All our products are in the window's attention. Its registered op hides them from the
        # counter, so we count the function behind the op.
        arguments = (inputs.query, inputs.key, None, layer.dim**-0.5, size.window, size.length)
        shared = partial(reference.window_attention, *arguments, False, log_sum_exp(inputs))
        found: dict[str, float] = {
            OURS: count(shared),
            "ours, log-sum-exp not shared": count(partial(reference.window_attention, *arguments)),
            "release, restated": count(CONTENDERS["release, restated"].make(size, inputs)),
        }
        peer = kvpress_peer.start(size)
        if peer is not None:
            found["kvpress SnapKV"] = peer.operations()
        print(size)
        for name, operations in found.items():
            ratio = operations / found[OURS]
            print(f"  {name:30s} {operations / 1e9:12.3f} GFLOP {ratio:12.4f} x ours")


if __name__ == "__main__":
    main()
