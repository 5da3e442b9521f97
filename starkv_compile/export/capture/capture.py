"""Captures a module, rewrites it by the passes, and replaces starkv's ops: ready for ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_unflatten

from ...config import StarKVConfig
from ...errors import UnsupportedModel, root_cause
from ...kernels.compiling import portable
from ...kernels.ops import BODIES, scores_counting_by
from ...kernels.reference import novelty
from ...kernels.reference.capacity import every_length
from ...kernels.reference.spatial import Counting
from ...passes import Pipeline, fx
from ...reporting import GraphReport
from . import codes
from .carve import Part, carve
from .counting import RANKS, information_by_table
from .ports import GraphPorts, Port
from .select import SELECTIONS, best_by_threshold

EXAMPLE_SIZES = {
    "batch": 2,
    "new": 41,
    "stored": 53,
    "coded": 37,
    "seen": 127,
    "budgeted": 109,
    "on_frame": 17,
}
"""Lengths to trace with. All differ, so that tracing does not confuse them; none is 0 or 1."""

SHORTEST = {"seen": 6}
"""The least that tracing assumes: two of each kind of token, new, stored and in few bits."""


@dataclass(frozen=True)
class Captured:
    """A prompt's graph in two parts.

    calls: for each layer, which input or output of the answer is each input of the cache part.
    """

    answer: ExportedProgram
    compact: ExportedProgram
    calls: list[dict[str, str]]
    report: GraphReport


def export_program(
    module: torch.nn.Module,
    ports: Sequence[Port],
    *,
    one_by_one: bool = False,
    sizes: dict[str, int] = EXAMPLE_SIZES,
    multiples: dict[str, int] | None = None,
    largest: Mapping[str, int] | None = None,
) -> ExportedProgram:
    """Calls `torch.export` on a module that takes `ports`, for all lengths.

    Args:
        module: takes a dict of tensors with names of ports as keys.
        ports: its ports.
        one_by_one: whether the module takes the tensors as arguments, in their order, instead.
        sizes: lengths of the tensors to trace with; only their shapes and dtypes matter.
        multiples: for a length, the number that it is a multiple of.
        largest: for a length, its maximum.

    Raises:
        UnsupportedModel: torch cannot capture it.
    """
    names = dict.fromkeys(d for port in ports for d in port.dims if isinstance(d, str))
    most = largest or {}
    dims: dict[str, Any] = {
        name: Dim(name, min=SHORTEST.get(name, 0), max=most.get(name)) for name in names
    }
    for name, unit in (multiples or {}).items():
        dims[name] = unit * Dim(f"{name}_by_{unit}") if unit > 1 else dims[name]
    shapes = {
        port.name: {i: dims[d] for i, d in enumerate(port.dims) if isinstance(d, str)}
        for port in ports
    }
    inputs = {port.name: port.zeros(sizes) for port in ports}
    with warnings.catch_warnings(), torch.no_grad(), portable():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(
                module,
                tuple(inputs.values()) if one_by_one else (inputs,),
                dynamic_shapes=tuple(shapes.values()) if one_by_one else (shapes,),
                strict=False,
                # Without it, torch refuses lengths for which k could be 0 or 1. ONNX takes them.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except Exception as error:  # of any kind: the model's own code runs here
            raise UnsupportedModel(
                f"torch.export cannot capture the model for all lengths ({root_cause(error)})"
            ) from error


def port_names(program: ExportedProgram) -> tuple[list[str], list[str]]:
    """Names of a program's inputs and of its outputs, each in the order of its graph.

    The program's module takes a dict with names of ports as keys, and returns one.
    """
    takes, returns = program.call_spec.in_spec, program.call_spec.out_spec
    assert takes is not None
    assert returns is not None
    (inputs,), _ = tree_unflatten([None] * takes.num_leaves, takes)
    return list(inputs), list(tree_unflatten([None] * returns.num_leaves, returns))


def capture_decode(module: torch.nn.Module, ports: GraphPorts, nbits: int) -> ExportedProgram:
    """Captures a module that decodes a token. Its attention reads codes of `nbits`, 16 for none."""
    program = export_program(module, ports.inputs)
    if nbits == 16:
        return program
    reading: GraphModule = program.module(check_guards=False)
    config = StarKVConfig(budget=1.0, nbits=nbits, inner="eager")
    Pipeline(config).run(reading, cache="marked", every_length=True)
    put_in_place(reading, codes.bodies(nbits))
    return export_program(reading, ports.inputs)


@dataclass(frozen=True)
class CutGraph:
    """A prompt's graph, rewritten and cut. outputs: names of what it returns, in order. answer: the
    first part. parts: for each layer, what only its cache reads; the same function in all."""

    whole: GraphModule
    outputs: list[str]
    answer: Part
    parts: list[Part]
    report: GraphReport


def cut_graph(
    module: torch.nn.Module,
    ports: GraphPorts,
    config: StarKVConfig,
    largest: Mapping[str, int] | None = None,
) -> CutGraph:
    """Captures a prompt's program, compacts its cache writes by the graph passes, and cuts it.

    Args:
        module: `decoder.Prefill` or one like it.
        ports: its ports.
        largest: see `export_program`.

    Raises:
        UnsupportedModel: a layer is not compacted, or the layers differ.
    """
    program = export_program(module, ports.inputs, largest=largest)
    whole: GraphModule = program.module(check_guards=False)
    takes, returns = port_names(program)
    # The order that passes insert for Inductor has no use in a graph that Inductor never sees.
    report = Pipeline(replace(config, inner="eager")).run(whole, cache="marked", every_length=True)
    _check(report)
    inputs = dict(zip(takes, whole.graph.find_nodes(op="placeholder"), strict=True))
    outputs = dict(zip(returns, fx.outputs(whole.graph), strict=True))
    logits = {"logits": outputs["logits"]}
    layers = [{name: outputs[p.name] for name, p in layer.items()} for layer in ports.layers]
    answer, parts = carve(whole, inputs, logits, layers)
    for layer, part in enumerate(parts):
        if not part.same_as(parts[0]):
            raise UnsupportedModel(
                f"the graph that scores layer {layer} differs from that of layer 0; export needs a "
                "model whose layers are alike"
            )
    return CutGraph(whole, returns, answer, parts, report)


def capture_prompt(
    module: torch.nn.Module,
    ports: GraphPorts,
    config: StarKVConfig,
    select: str,
    max_seq: int,
) -> Captured:
    """Returns the parts of `cut_graph` as programs.

    Args:
        module: as in `cut_graph`.
        ports: as in `cut_graph`.
        config: the configuration.
        select: the form of selection, a name in `select.SELECTIONS`.
        max_seq: most tokens that a session may see.
    """
    cut = cut_graph(module, ports, config)
    answer, compact = cut.answer, cut.parts[0]
    names = {node: name for name, node in (*answer.reads.items(), *answer.gives.items())}
    lengths = _names_of_lengths(answer.reads, ports.inputs)
    put_in_place(compact.module, bodies(select, max_seq))
    reads = [_port(name, node, lengths) for name, node in compact.reads.items()]
    with every_length():
        compact_program = export_program(compact.module, reads)
    return Captured(
        answer=export_program(answer.module, ports.inputs),
        compact=compact_program,
        calls=[{name: names[node] for name, node in part.reads.items()} for part in cut.parts],
        report=cut.report,
    )


def bodies(select: str, max_seq: int) -> dict[str, Callable[..., Any]]:
    """The function that replaces each op of starkv. A frame has fewer tokens than a session."""
    counting = Counting(RANKS[select], information_by_table(max_seq))

    def star_scores(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return scores_counting_by(counting, *arguments)

    def share_out(*arguments: Any) -> torch.Tensor:
        return novelty.share_out(*arguments, best=best_by_threshold)

    return {
        **BODIES,
        "select_tokens": SELECTIONS[select],
        "star_scores": star_scores,
        "share_out": share_out,
    }


def _check(report: GraphReport) -> None:
    left = sorted({site.reason for site in report.sites if site.reason})
    if left or report.rewritten != report.found:
        raise UnsupportedModel(
            f"only {report.rewritten} of {report.found} attentions can be compacted: "
            f"{'; '.join(left)}"
        )


def _names_of_lengths(nodes: Mapping[str, Node], ports: Sequence[Port]) -> dict[str, str]:
    """The name of each length, with the symbol that tracing gave it as key."""
    return {
        str(length): dim
        for port in ports
        for length, dim in zip(fx.shape(nodes[port.name]), port.dims, strict=True)
        if isinstance(dim, str)
    }


def _port(name: str, node: Node, lengths: dict[str, str]) -> Port:
    tensor = fx.value(node)
    dims = tuple(n if isinstance(n, int) else lengths[str(n)] for n in tensor.shape)
    return Port(name, dims, tensor.dtype)


def put_in_place(module: GraphModule, bodies: dict[str, Callable[..., Any]]) -> None:
    """Replaces every `torch.ops.starkv` call by a call of its body."""
    for node in module.graph.nodes:
        name = _name_of_ours(node.target) if node.op == "call_function" else None
        if name is not None:
            node.target = bodies[name]
    module.recompile()


def _name_of_ours(target: Any) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return None
    namespace, _, name = target._qualified_op_name.partition("::")
    return name if namespace == "starkv" else None
