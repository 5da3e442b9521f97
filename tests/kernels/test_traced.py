"""Triton kernels inside a compiled graph, without a GPU: as far as code generation goes.

The ops are told to take the kernels, for CPU tensors too, and a stub stands in for the driver:
Dynamo, AOT autograd and Inductor then treat the launches as they would on a device.
"""

import re

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.graph import GraphLowering

from starkv_compile.kernels import ops
from starkv_compile.kernels.ops import STARKV

triton = pytest.importorskip("triton")
tools = pytest.importorskip("tools.kernel_resources")

G, H, D, W = 2, 4, 64, 8


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    from starkv_compile.kernels import triton as kernels

    monkeypatch.setattr(ops, "_kernels", lambda _: kernels)
    stub = tools.StubDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)
    return stub


def layer(query, key, value, mask=None, real=None):
    length = key.shape[2]
    scores = STARKV.window_attention(query, key, mask, 0.1, W, length // 5).mean(1)
    kept = STARKV.select_tokens(scores, real, length, W, length // 5)
    return STARKV.gather_kv(key, value, kept, real)


def tensors(length, batch=1):
    return [torch.empty(batch, heads, length, D, dtype=torch.bfloat16) for heads in (H, G, G)]


def test_one_graph_serves_every_length():
    compiled = []

    def forward(graph, _):
        compiled.append(graph)
        shapes = [node.meta["val"].shape for node in graph.graph.output_node().args[0]]
        return lambda *_: [torch.zeros([2] * len(shape)) for shape in shapes]

    run = torch.compile(layer, backend=aot_autograd(fw_compiler=forward), dynamic=True)
    with torch.no_grad():
        for length in (1_500, 2_900, 9_000, 40_000, 120_000):
            run(*tensors(length))
    assert len(compiled) == 1


def generated_code(function, *inputs):
    """What Inductor writes for `function`; it is not compiled."""
    written = []

    class Stop(Exception):
        pass

    generate = GraphLowering.codegen

    def stop(self):
        written.append(generate(self)[0].value)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(GraphLowering, "codegen", stop)
        with pytest.raises(Exception, match="Stop"):
            torch.compile(function, dynamic=True)(*inputs)
    return written[0]


@pytest.mark.slow
def test_a_padded_batch_is_compiled_without_copies_of_its_mask():
    """Left-padded rows: the mask and what is padding are values of the graph itself."""

    def padded(query, key, value, shown):
        length = key.shape[2]
        mask = shown & torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return layer(query, key, value, mask, mask[:, 0, -1])

    shown = torch.ones(2, 1, 1, 3_000, dtype=torch.bool)
    code = generated_code(padded, *tensors(3_000, batch=2), shown)
    for kernel in ("row_sums", "combine_sums", "score_keys", "write_kept", "gather_rows"):
        assert re.search(rf"{kernel}_\d+.run\(", code), kernel
    buffers = re.findall(r"empty_strided\w*\((\(.*?\), \(.*?\)), torch.(\w+)", code)
    assert buffers
    for layout, dtype in buffers:
        factors = re.split(r"[(),]", layout)
        squares = [f for f in factors if "**2" in f or re.search(r"(s\d+)\b.*\*\s*\1\b", f)]
        assert not squares, f"{dtype} of {layout}: quadratic in a length"
        shape = re.findall(r"s\d+", layout.split("),")[0])
        assert len(shape) == len(set(shape)), f"{dtype} of {layout}: quadratic in a length"


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_take_the_double_scale_of_a_compiled_graph(driver, target):
    """Inductor passes Python's floats as fp64; a launch from Python passes fp32."""
    case = tools.CASES[0]
    for name, kernel in tools.compiled(case, target, driver).items():
        source = kernel.src
        if "scale" not in source.signature:
            continue
        signature = {**source.signature, "scale": "fp64"}
        again = triton.compile(
            triton.compiler.ASTSource(source.fn, signature, source.constants, source.attrs),
            target=tools.TARGETS[target],
            options={"num_warps": 4, "num_stages": 2},
        )
        instructions = tools.measure(again, target)[-1]
        assert instructions < 1.1 * tools.measure(kernel, target)[-1], f"{name} in double precision"
