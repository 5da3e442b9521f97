"""The rule table: planted bad graphs are caught, good ones pass, exported ones are looked at."""

import pytest

onnx = pytest.importorskip("onnx", reason="pip install '.[export]'")

from onnx import TensorProto, helper  # noqa: E402

from starkv_compile.export.tensorrt.trt_rules import refused, refused_lines  # noqa: E402


def model(op, inputs, outputs=1, constants=(), dtype=TensorProto.FLOAT, domain="", **attributes):
    names = [f"in_{i}" for i in range(inputs)]
    ports = [helper.make_tensor_value_info(n, dtype, ["batch", "seen"]) for n in names]
    initializers = [
        helper.make_tensor(f"c_{i}", TensorProto.INT64, [1], [c]) for i, c in enumerate(constants)
    ]
    given = [*names[:1], *(t.name for t in initializers), *names[1:]]
    results = [f"out_{i}" for i in range(outputs)]
    node = helper.make_node(op, given, results, name="planted", domain=domain, **attributes)
    found = [helper.make_tensor_value_info(n, dtype, None) for n in results]
    graph = helper.make_graph([node], "g", ports, found, initializers)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(d, v) for d, v in {"": 24, domain: 24}.items()]
    )


BAD = {
    "TopK": (model("TopK", 1, 2, [3841]), 100, "3840"),
    "TopK of a computed k": (model("TopK", 2, 2), 3841, "3840"),
    "Sort": (model("Sort", 1), 9, "no such operator"),
    "Unique": (model("Unique", 1), 9, "no such operator"),
    "NonZero": (model("NonZero", 1), 9, "no plugin creator"),
    "sequences": (model("SplitToSequence", 2), 9, "no sequences"),
    "Attention with scores": (model("Attention", 3, 4), 9, "one output"),
    "Attention in float32": (model("Attention", 3, 1), 9, "float32"),
    "OneHot": (model("OneHot", 3), 9, "build-time constant"),
    "custom": (model("Compact", 1, domain="starkv"), 9, "starkv::Compact"),
    "a scatter that adds": (model("ScatterElements", 3, reduction="add"), 9, "type: add"),
    "a scatter of maxima": (model("ScatterElements", 3, reduction="max"), 9, "type: max"),
    "float64": (model("Exp", 1, dtype=TensorProto.DOUBLE), 9, "float64"),
    "cache not a port": (model("TensorScatter", 2), 9, "static sequence length"),
}


@pytest.mark.parametrize(("planted", "longest", "said"), BAD.values(), ids=BAD)
def test_planted_nodes_are_caught(planted, longest, said):
    (one,) = refused(planted, longest)
    assert one.node == "planted"
    assert said in one.reason


GOOD = {
    "TopK": (model("TopK", 1, 2, [3840]), 9),
    "TopK of a computed k": (model("TopK", 2, 2), 3840),
    "ScatterElements": (model("ScatterElements", 3), 9),
    "OneHot": (model("OneHot", 2, 1, [5]), 9),
    "Attention in float16": (model("Attention", 3, 1, dtype=TensorProto.FLOAT16), 9),
}


@pytest.mark.parametrize(("graph", "longest"), GOOD.values(), ids=GOOD)
def test_what_is_accepted_passes(graph, longest):
    assert refused(graph, longest) == []


def test_nodes_of_subgraphs_are_looked_at():
    inner = model("NonZero", 1).graph
    del inner.input[:]
    node = helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=inner)
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    outer = helper.make_model(helper.make_graph([node], "g", [yes], [out]))
    assert [one.op for one in refused(outer, 9)] == ["NonZero", "NonZero"]


@pytest.mark.parametrize("exported", ["topk", "threshold"], indirect=True)
def test_nothing_is_against_exported_graphs(exported):
    assert refused_lines(exported.folder, 3840) == []


def test_topk_is_refused_beyond_its_limit(exported):
    lines = refused_lines(exported.folder, 3841)
    assert lines
    assert all(line.startswith("prefill") and "TopK" in line for line in lines)
