"""Runs everything that needs a GPU, in some minutes: `python -m benchmarks.gpu`.

The command checks the kernels on the device against float64 on the host, proves that scoring and
compaction never wait for the device, and compares the time of each kernel with its floor. It stops
at the first fault. `python -m benchmarks` and `python -m benchmarks.whole_model` measure layers and
models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from starkv_lab.environment import environment
from torch.nn import functional as F

from starkv_compile.kernels import reference
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.quantization import centre_of, dequantize, quantize

from . import exact
from .contenders import CONTENDERS
from .layers import LAYERS, Size, make_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if not torch.cuda.is_available():
        print(
            "no CUDA device: these checks need one; `make test-kernels` checks the kernels "
            "without it"
        )
        return 2
    print(environment("cuda"))
    with torch.no_grad():
        for name, check in (
            ("window attention", check_window_attention),
            ("selection, ranks, compaction", check_selection),
            ("attention over codes", check_quantized_attention),
            ("no waiting for the device", check_no_synchronisation),
        ):
            print(f"{name}: {check()} cases right", flush=True)
        bandwidth, rate = floors()
        print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 products {rate / 1e12:.0f} TFLOP/s")
        print(f"{'kernel':44s} {'us':>9s} {'floor':>9s} {'x floor':>8s}")
        for name, work, floor in chain(kernels(bandwidth, rate), decoding(bandwidth)):
            microseconds = microseconds_of(work)
            print(
                f"{name:44s} {microseconds:9.1f} {floor:9.1f} {microseconds / floor:8.2f}",
                flush=True,
            )
    return 0


def check_window_attention() -> int:
    """Checks dtypes, head sizes, group sizes, windows and masks against float64."""
    count = 0
    compiled = torch.compile(STARKV.window_attention, fullgraph=True, dynamic=True)
    for dtype in DTYPES:
        for dim in (64, 80, 96, 128, 256):
            for heads, groups, window, masked in (
                (28, 4, 8, False),
                (32, 8, 32, False),
                (7, 1, 64, True),
                (4, 4, 1, True),
            ):
                length = 1031
                query = torch.randn(2, heads, length, dim, device="cuda", dtype=dtype)
                key = torch.randn(2, groups, length, dim, device="cuda", dtype=dtype)
                mask = None
                if masked:
                    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device="cuda").tril()
                    mask[1, :, :, :100] = False
                arguments = (query, key, mask, dim**-0.5, window, 300)
                scores = exact.window_attention(query, key, mask, dim**-0.5, window)
                expected = exact.by_group(scores, groups)
                ops = [STARKV.window_attention]
                if dim == 128:  # only one head size is compiled, because each takes seconds
                    torch._dynamo.reset()
                    ops.append(compiled)
                for op in ops:
                    ours = op(*arguments).double()
                    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)
                    count += 1
    return count


def check_selection() -> int:
    """Checks that the results equal the reference on the host, bit for bit."""
    count = 0
    for past in (300, 4096, 13447, 131072):
        for kind in ("random", "ties", "equal"):
            scores = torch.randn(2, past, device="cuda")
            scores = scores.round() if kind == "ties" else scores * (kind != "equal")
            real = torch.rand(2, past + 8, device="cuda") < 0.9
            for shown in (None, real):
                for capacity in (past // 20 + 10, past // 2):
                    arguments = (past + 8, 8, capacity)
                    kept = STARKV.select_tokens(scores, shown, *arguments)
                    host = None if shown is None else shown.cpu()
                    expected = reference.select_tokens(scores.cpu(), host, *arguments)
                    assert torch.equal(kept.cpu(), expected), (past, kind, capacity)
                    for dtype in DTYPES:
                        key = torch.randn(2, 2, past + 8, 80, device="cuda").to(dtype)
                        pair = STARKV.gather_kv(key, key, kept, shown)
                        wanted = reference.gather_kv(key, key, kept, shown)
                        assert torch.equal(pair[0], wanted[0])
                        assert torch.equal(pair[1], wanted[1])
                        count += 1
    return count


def check_quantized_attention() -> int:
    """Checks attention over codes against float64 over what the codes stand for."""
    count = 0
    for dtype in DTYPES:
        for dim in (64, 80, 128, 256):
            for heads, groups, nbits, masked in (
                (28, 4, 4, False),
                (8, 8, 8, True),
                (7, 1, 4, True),
            ):
                query = torch.randn(2, heads, 1, dim, device="cuda", dtype=dtype)
                older = torch.randn(2, groups, 1031, dim, device="cuda", dtype=dtype) + 2
                newer = torch.randn(2, groups, 12, dim, device="cuda", dtype=dtype)
                codes = quantize(older, centre_of(older), nbits)
                mask = torch.rand(2, 1, 1, 1043, device="cuda") < 0.8 if masked else None
                scale = dim**-0.5
                arguments = (query, *codes, *codes, newer, newer, mask, scale)
                rows = torch.cat([dequantize(*codes, torch.float64), newer.double()], 2)
                expected = F.scaled_dot_product_attention(
                    query.double(), rows, rows, attn_mask=mask, scale=scale, enable_gqa=True
                )
                ours = STARKV.quantized_attention(*arguments).double()
                # Queries are rounded as in TF32, and results as the model's numbers are.
                torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
                count += 1
    return count


def check_no_synchronisation() -> int:
    """Runs the whole work of one layer. Any value that the host reads back raises an error."""
    size = Size(LAYERS["qwen2.5-vl-7b"], "1080p", 5, 8, 0.2, torch.bfloat16)
    inputs = make_inputs(size, "cuda")
    names = [name for name, contender in CONTENDERS.items() if contender.role == "ours"]
    for name in names:
        work: Any = CONTENDERS[name].make(size, inputs)
        work()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(names)


def floors() -> tuple[float, float]:
    """Returns bytes per second of a copy, and operations per second of a large bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(source)
    bandwidth = 2 * source.numel() / microseconds_of(lambda: out.copy_(source)) * 1e6
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / microseconds_of(lambda: square @ square) * 1e6
    return bandwidth, rate


def kernels(bandwidth: float, rate: float) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Yields (name, work, floor in microseconds): the bytes to move, or the products to compute."""
    layer = LAYERS["qwen2.5-vl-7b"]
    for length in (8_192, 32_768, 131_072):
        generator = {"device": "cuda", "dtype": torch.bfloat16}
        query = torch.randn(1, layer.heads, length, layer.dim, **generator)
        key = torch.randn(1, layer.groups, length, layer.dim, **generator)
        total = torch.randn(1, layer.heads, length, device="cuda") + 10
        for window in (8, 32, 64):
            arguments = (query, key, None, layer.dim**-0.5, window, length // 5)
            operations = 2 * layer.heads * window * layer.dim * length
            floor = max(key.nbytes / bandwidth, operations / rate) * 1e6
            yield (
                f"scores, two passes, {length} keys, window {window}",
                lambda a=arguments: STARKV.window_attention(*a),
                max(key.nbytes / bandwidth, 2 * operations / rate) * 1e6,
            )
            yield (
                f"scores, sum given, {length} keys, window {window}",
                lambda a=arguments, t=total: STARKV.window_attention(*a, False, t),
                floor,
            )
        scores = torch.randn(1, length - 8, device="cuda")
        kept_bytes = 5 * scores.nbytes  # each of five launches reads them
        selection = (None, length, 8, length // 5)
        yield (
            f"selection by radix, {length}",
            lambda s=scores, a=selection: STARKV.select_tokens(s, *a),
            kept_bytes / bandwidth * 1e6,
        )
        yield (
            f"selection by sorting, {length}",
            lambda s=scores, a=selection: reference.select_tokens(s, *a),
            kept_bytes / bandwidth * 1e6,
        )
        kept = STARKV.select_tokens(scores, *selection)
        moved = 2 * 2 * key.nbytes * kept.shape[1] / length
        for name, gather in (("kernel", STARKV.gather_kv), ("index_select", reference.gather_kv)):
            yield (
                f"compaction by {name}, {length}",
                lambda g=gather, k=key, i=kept: g(k, k, i, None),
                moved / bandwidth * 1e6,
            )


def decoding(bandwidth: float) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Yields (name, work, floor) of a decoded token's attention over kept tokens."""
    layer = LAYERS["qwen2.5-vl-7b"]
    for batch, tokens in ((1, 2_700), (8, 2_700), (1, 27_000)):
        generator = {"device": "cuda", "dtype": torch.bfloat16}
        query = torch.randn(batch, layer.heads, 1, layer.dim, **generator)
        key = torch.randn(batch, layer.groups, tokens, layer.dim, **generator)
        newer = torch.randn(batch, layer.groups, 12, layer.dim, **generator)
        yield (
            f"decoding, 16 bits by SDPA, {batch} x {tokens} tokens",
            lambda q=query, k=key: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
            2 * key.nbytes / bandwidth * 1e6,
        )
        for nbits in (8, 4):
            codes = quantize(key, centre_of(key), nbits)
            arguments = (query, *codes, *codes, newer, newer, None, layer.dim**-0.5)
            yield (
                f"decoding, {nbits} bits, {batch} x {tokens} tokens",
                lambda a=arguments: STARKV.quantized_attention(*a),
                2 * (codes.nbytes + newer.nbytes) / bandwidth * 1e6,
            )


def microseconds_of(work: Callable[[], Any]) -> float:
    """Returns the median of replayed CUDA graphs. Eager launches would take longer than kernels."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(work, rep=50, return_mode="median")) * 1e3


if __name__ == "__main__":
    sys.exit(main())
