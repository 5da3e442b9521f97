"""NVIDIA's own parser and builder on exported graphs: `make test-trt` installs TensorRT-RTX for it.

It builds for GPUs that are not there. What it builds is not run: no figure follows from it.
"""

import functools

import pytest
import torch

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="make test-trt installs TensorRT-RTX")
onnx = pytest.importorskip("onnx", reason="pip install '.[export]'")

from onnx import TensorProto, helper  # noqa: E402

from starkv_compile import StarKVConfig  # noqa: E402
from starkv_compile.export.capture.select import TENSORRT_TOPK  # noqa: E402
from starkv_compile.export.onnx.package import ExportOptions, export_model  # noqa: E402
from starkv_compile.export.tensorrt.engine import EngineError, serialized  # noqa: E402
from starkv_compile.export.tensorrt.profiles import lengths, profile  # noqa: E402
from starkv_compile.testing import tiny_model  # noqa: E402

STARKV = functools.partial(StarKVConfig, policy="starkv")
CASES = [
    ("qwen2_vl", 2, "topk", "float16", TENSORRT_TOPK, "dynamic", StarKVConfig(budget=0.2)),
    ("qwen2_vl", 2, "threshold", "bfloat16", 131072, "dynamic", StarKVConfig(budget=0.2)),
    ("qwen3_vl", 1, "topk", "bfloat16", TENSORRT_TOPK, "dynamic", StarKVConfig.paper(budget=0.2)),
    ("qwen3_vl", 1, "threshold", "float16", 131072, "dynamic", STARKV(budget_tokens=20000)),
    ("qwen3_vl", 1, "threshold", "float32", 65536, "dynamic", StarKVConfig(budget=0.05)),
    ("qwen2_vl", 2, "topk", "float16", TENSORRT_TOPK, "static", StarKVConfig(budget=0.2)),
    ("qwen3_vl", 1, "threshold", "bfloat16", 131072, "static", StarKVConfig(budget=0.2)),
    ("qwen2_vl", 1, "threshold", "float32", 16384, "static", STARKV(budget=0.2)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case[:6])))
def exported(request, tmp_path_factory):
    family, layers, form, dtype, max_seq, cache, config = request.param
    model = tiny_model(family, num_hidden_layers=layers).to(getattr(torch, dtype))
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model.config.save_pretrained(checkpoint)
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path_factory.mktemp("exported") / "folder",
        config=config,
        max_seq=max_seq,
        dtype=dtype,
        select=form,
        cache=cache,
    )
    ranges = lengths(max_seq, slots=options.room, batch=4)
    return export_model(model, options, lambda text: None), ranges


@pytest.mark.parametrize("graph", ["prefill", "decode", "visual"])
def test_is_built_for_the_widest_profile(exported, graph):
    folder, ranges = exported
    file = folder / f"{graph}.onnx"
    engine = serialized(rtx, file, profile(file, ranges))
    assert engine.nbytes > 100_000


def one_node(folder, node, inputs, outputs, constants=()):
    graph = helper.make_graph([node], "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid(d, v) for d, v in {"": 20, node.domain: 20}.items()]
    file = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def line(name, kind=TensorProto.FLOAT, dims=("batch", "seen")):
    return helper.make_tensor_value_info(name, kind, dims)


def test_an_operation_that_it_does_not_know(tmp_path):
    node = helper.make_node("Compact", ["in"], ["out"], domain="starkv")
    file = one_node(tmp_path, node, [line("in")], [line("out")])
    with pytest.raises(EngineError, match="Plugin not found"):
        serialized(rtx, file, profile(file, lengths(1024)))


def top(folder, share):
    """TopK of a share of the tokens, computed as exported graphs do."""
    nodes = [
        helper.make_node("Shape", ["in"], ["n"], start=1),
        helper.make_node("Div", ["n", "share"], ["k"]),
        helper.make_node("TopK", ["in", "k"], ["values", "places"]),
    ]
    constant = helper.make_tensor("share", TensorProto.INT64, [1], [share])
    outputs = [line("values", dims=None), line("places", TensorProto.INT64, dims=None)]
    graph = helper.make_graph(nodes, "g", [line("in")], outputs, [constant])
    file = folder / "graph.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def test_a_k_that_only_the_largest_prompt_exceeds(tmp_path):
    """The builder merely warns of it, and the engine would fail in use."""
    file = top(tmp_path, 2)
    most = 2 * TENSORRT_TOPK
    assert serialized(rtx, file, profile(file, lengths(most))).nbytes > 0
    with pytest.raises(EngineError, match="not self-consistent"):
        serialized(rtx, file, profile(file, lengths(most + 2)))
