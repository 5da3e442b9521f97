"""What TensorRT's ONNX parser refuses, as rules over the nodes of a graph.

Each rule comes from a refusal by the parser or builder of TensorRT-RTX 1.7.1 for SM80 (which need
no GPU), or from the source that it names. A graph that passes the rules may still be refused: rules
cover only the refusals that we met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

RTX = "TensorRT-RTX 1.7.1"
TOPK = 3840
"""The largest K. A build with a larger K in its profile only warns, and then fails in use."""


@dataclass(frozen=True)
class Refusal:
    """One node that the parser or builder would not take."""

    node: str
    op: str
    reason: str
    seen_with: str


@dataclass
class Graph:
    """Facts about a graph for the rules. longest: tokens of the profile's largest length."""

    longest: int
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    types: dict[str, int] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)


Fault = Callable[[NodeProto, Graph], str | None]


@dataclass(frozen=True)
class Rule:
    """A reason to refuse nodes.

    ops: the rule is for nodes of these operators; empty: for all nodes. fault: returns the reason;
    None for a node that is accepted.
    """

    ops: tuple[str, ...]
    fault: Fault
    seen_with: str = RTX


def _always(reason: str) -> Fault:
    return lambda node, graph: reason


def _topk(node: NodeProto, graph: Graph) -> str | None:
    constant = graph.constants.get(node.input[1])
    k = graph.longest if constant is None else int(onnx.numpy_helper.to_array(constant).item())
    if k <= TOPK:
        return None
    how = "computed, up to all tokens of the profile:" if constant is None else "constant:"
    return f"K exceeds the maximum value allowed ({TOPK}); here it is {how} {k}"


def _custom(node: NodeProto, graph: Graph) -> str | None:
    return (
        f"no plugin {node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else None
    )


def _double(node: NodeProto, graph: Graph) -> str | None:
    named = [*node.input, *node.output]
    return "float64" if any(graph.types.get(n) == TensorProto.DOUBLE for n in named) else None


def _onehot(node: NodeProto, graph: Graph) -> str | None:
    return None if node.input[1] in graph.constants else "depth must be a build-time constant"


def _scatter(node: NodeProto, graph: Graph) -> str | None:
    reduction = _attribute(node, "reduction") or b"none"
    return None if reduction == b"none" else f"unsupported reduction type: {reduction.decode()}"


def _attention(node: NodeProto, graph: Graph) -> str | None:
    if sum(bool(name) for name in node.output) > 1:
        return "only Attention nodes with one output are supported"
    if graph.types.get(node.input[0]) == TensorProto.FLOAT and not _attribute(
        node, "TRT_decomposable"
    ):
        return (
            "no dedicated kernel for float32, and not marked TRT_decomposable, as --engine marks it"
        )
    return None


def _tensor_scatter(node: NodeProto, graph: Graph) -> str | None:
    if node.input[0] not in graph.inputs:
        return "the cache tensor must be a network input"
    if node.output[0] not in graph.outputs:
        return "the output tensor must be a network output"
    shape = graph.shapes.get(node.input[0])
    axis = _attribute(node, "axis")
    if shape is None or shape[-2 if axis is None else axis] is None:
        return "the cache must have a static sequence length dimension"
    return None


def _attribute(node: NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return None


RULES = (
    Rule(("TopK",), _topk),
    Rule(
        ("Sort", "Unique", "Compress", "BitwiseAnd", "BitShift", "CumProd"),
        _always("the parser has no such operator"),
    ),
    Rule(("BitCast",), _always("no plugin of this name")),
    Rule(("NonZero",), _always("no plugin creator (TensorRT proper has a layer for it)")),
    Rule(("SplitToSequence", "SequenceAt"), _always("the parser has no sequences")),
    Rule(("ScatterElements",), _scatter),
    Rule(("OneHot",), _onehot),
    Rule(("Hardmax",), _always("its depth would have to be a build-time constant")),
    Rule(("Attention",), _attention),
    Rule(("TensorScatter",), _tensor_scatter),
    Rule((), _custom),
    Rule((), _double, "TensorRT 11, documentation"),
)


def refused(model: onnx.ModelProto, longest: int) -> list[Refusal]:
    """Every node that a rule refuses, also in subgraphs and functions.

    Args:
        model: the model, with or without its weights.
        longest: tokens of the profile's largest length. A K that the graph computes counts as this.
    """
    typed = onnx.shape_inference.infer_shapes(model)
    graph = Graph(longest)
    graph.inputs = {port.name for port in typed.graph.input}
    graph.outputs = {port.name for port in typed.graph.output}
    nodes = list(_nodes(typed.graph.node))
    for function in typed.functions:
        nodes += _nodes(function.node)
    for part in [typed.graph, *_subgraphs(nodes)]:
        _describe(part, graph)
    for node in nodes:
        if node.op_type == "Constant" and (value := _attribute(node, "value")) is not None:
            graph.constants[node.output[0]] = value
            graph.types[node.output[0]] = value.data_type
    return [
        Refusal(node.name or node.output[0], node.op_type, reason, rule.seen_with)
        for node in nodes
        for rule in RULES
        if (not rule.ops or node.op_type in rule.ops)
        and (reason := rule.fault(node, graph)) is not None
    ]


def refused_lines(folder: Path, longest: int) -> list[str]:
    """A line for each kind of refused node in each graph of the folder."""
    lines = []
    for file in sorted(folder.glob("*.onnx")):
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for one in refused(onnx.load(str(file), load_external_data=False), longest):
            kinds.setdefault((one.op, one.reason, one.seen_with), []).append(one.node)
        for (op, reason, seen_with), names in kinds.items():
            lines.append(
                f"{file.name}: TensorRT would refuse {len(names)} {op} ({names[0]}, ...): {reason} "
                f"[{seen_with}]"
            )
    return lines


def _describe(part: GraphProto, graph: Graph) -> None:
    for tensor in part.initializer:
        graph.types[tensor.name] = tensor.data_type
        graph.constants[tensor.name] = tensor
    for value in [*part.input, *part.output, *part.value_info]:
        kind = value.type.tensor_type
        graph.types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            graph.shapes[value.name] = [
                d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
            ]


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for part in _subgraphs([node]):
            yield from _nodes(part.node)


def _subgraphs(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs
