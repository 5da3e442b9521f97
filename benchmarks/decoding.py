"""Times one decoded token's attention over kept tokens in 16, 8 and 4 bits.

    python -m benchmarks.decoding

The layer has the shape of Qwen2.5-VL-7B's: 28 query heads, 4 KV heads, head size 128. Of a prompt
of 13,500 tokens 2,700 are kept, and 12 of these are in the model's precision. All contenders are
compiled by Inductor, run in turn, and give the same answer up to rounding. Rivals are torch's
attention over the same kept tokens, and over the full cache; of its two ways with grouped heads the
faster one counts. The floor of each contender is the time in which this machine reads the bytes
that it stores.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from starkv_lab.environment import environment
from torch.nn.functional import scaled_dot_product_attention as sdpa

from starkv_compile.kernels.compiling import in_process
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.quantization import Quantized, centre_of, quantize

HEADS, GROUPS, DIM = 28, 4, 128
SEEN, KEPT, NEWER = 13_500, 2_700, 12
Tensor = torch.Tensor
Work = Callable[[], Tensor]


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sdpa(query, key, value, enable_gqa=True)


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    times = HEADS // GROUPS
    return sdpa(query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def coded(
    query: Tensor, key: Quantized, value: Quantized, newer_key: Tensor, newer_value: Tensor
) -> Tensor:
    scale = DIM**-0.5
    return STARKV.quantized_attention(query, *key, *value, newer_key, newer_value, None, scale)


def contenders(batch: int, dtype: torch.dtype) -> dict[str, tuple[Work, int]]:
    """Each contender with the bytes of keys and values that it reads."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, DIM, generator=generator).to(dtype)

    query, full = tensor(HEADS, 1), (tensor(GROUPS, SEEN), tensor(GROUPS, SEEN))
    kept = tuple(rows[:, :, -KEPT:].clone() for rows in full)
    compiled = {
        function: torch.compile(function, fullgraph=True, dynamic=False)
        for function in (grouped, repeated, coded)
    }
    found: dict[str, tuple[Work, int]] = {}
    for name, pair in (("full cache", full), ("kept, 16 bits", kept)):
        size = sum(rows.nbytes for rows in pair)
        for way, function in (("grouped", grouped), ("repeated", repeated)):
            found[f"{name}, {way}"] = partial(compiled[function], query, *pair), size
    older = [rows[:, :, :-NEWER].clone() for rows in kept]
    newer = [rows[:, :, -NEWER:].clone() for rows in kept]
    for nbits in (8, 4):
        codes = [quantize(rows, centre_of(rows), nbits) for rows in older]
        size = sum(code.nbytes for code in codes) + sum(rows.nbytes for rows in newer)
        found[f"kept, {nbits} bits"] = partial(compiled[coded], query, *codes, *newer), size
    return found


def bytes_a_second(size: int) -> float:
    """How fast this machine reads `size` bytes: the sum of as many, the best of ten."""
    numbers = torch.ones(size // 8, dtype=torch.int64)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / min(seconds)


def measure(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in a new order in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(works), len(works)):
            works[name]()  # what another contender left in the caches of the processor
            begin = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def decoding(batch: int, dtype: torch.dtype, rounds: int) -> None:
    torch._dynamo.reset()
    works = contenders(batch, dtype)
    answers = {name: work() for name, (work, _) in works.items()}
    for name in ("kept, 8 bits", "kept, 4 bits"):
        wrong = (answers[name] - answers["kept, 16 bits, grouped"]).float().norm()
        share = float(wrong / answers["kept, 16 bits, grouped"].float().norm())
        assert share < 0.3, (name, share)  # random values: rounding shows more than in a model
    seconds = measure({name: work for name, (work, _) in works.items()}, rounds)
    rival = min(seconds[f"kept, 16 bits, {way}"] for way in ("grouped", "repeated"))
    full = min(seconds[f"full cache, {way}"] for way in ("grouped", "repeated"))
    rate = bytes_a_second(works["full cache, grouped"][1])
    print(f"\nbatch {batch}, {dtype}, {torch.get_num_threads()} threads")
    print("| contender | MiB | times its floor | of 16 bits | of the full cache |")
    print("| --- | --- | --- | --- | --- |")
    for name, taken in seconds.items():
        size = works[name][1]
        floor = taken / (size / rate)
        print(
            f"| {name} | {size / 2**20:.2f} | {floor:.1f} | {taken / rival:.2f} "
            f"| {taken / full:.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    print(environment("cpu"))
    with torch.no_grad(), in_process():
        for dtype in (getattr(torch, name) for name in args.dtype):
            for batch in args.batch:
                decoding(batch, dtype, args.rounds)


if __name__ == "__main__":
    main()
