"""Rewrites an `ExportedProgram` into a new one.

The passes insert calls of torch functions, tensor methods and starkv's ops. A program may hold
only operators, each with an example value. So each run of inserted nodes is traced to operators.
All other nodes stay, so the new program has the inputs, lengths, parameters and effects of the old
one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..kernels.compiling import no_new_guards
from ..kernels.reference.capacity import every_length
from ..reporting import GraphReport
from . import fx

Rewrite = Callable[[GraphModule], GraphReport]


def rewrite_program(
    program: ExportedProgram, rewrite: Rewrite
) -> tuple[ExportedProgram, GraphReport]:
    """Returns the program whose graph `rewrite` has changed in place, and the report.

    `program` stays as it is. `rewrite` sees what the caller of the program gets as the outputs of
    the graph. The buffers and inputs that the program changes are outputs as well; they keep their
    lengths.
    """
    module = GraphModule(program.graph_module, copy.deepcopy(program.graph))
    signature, output = program.graph_signature, module.graph.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    mine = [i for i, s in enumerate(signature.output_specs) if s.kind == OutputKind.USER_OUTPUT]
    output.args = (tuple(returned[i] for i in mine),)
    old = set(module.graph.nodes)
    mode = detect_fake_mode([fx.value(node) for node in old])
    with every_length(), no_new_guards(None if mode is None else mode.shape_env):
        report = rewrite(module)
        for inserted in list(_runs(module.graph, old)):
            _trace(module, inserted)
    for i, node in zip(mine, output.args[0], strict=True):
        returned[i] = node
    output.args = (tuple(returned),)
    module.recompile()
    new = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=_with_outputs(signature, list(output.args[0])),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return new, report


def _runs(graph: Graph, old: set[Node]) -> Iterator[list[Node]]:
    """The nodes that are not `old`, neighbours together."""
    run: list[Node] = []
    for node in graph.nodes:
        if node not in old:
            run.append(node)
        elif run:
            yield run
            run = []


def _trace(module: GraphModule, inserted: list[Node]) -> None:
    """Replaces neighbouring nodes by the operators that they come to."""
    graph = module.graph
    reads = list(dict.fromkeys(n for node in inserted for n in fx.producers(node)))
    reads = [node for node in reads if node not in inserted]
    gives = [node for node in inserted if any(user not in inserted for user in node.users)]
    part = Graph()
    copies = {node: part.placeholder(node.name) for node in reads}
    for node in inserted:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in gives])
    traced = make_fx(GraphModule(module, part), pre_dispatch=True)(*map(fx.value, reads))
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), reads, strict=True))
    with graph.inserting_before(inserted[0]):
        results: Any = graph.graph_copy(traced.graph, values)
    for node, result in zip(gives, results, strict=True):
        node.replace_all_uses_with(result)
    for node in reversed(inserted):
        graph.erase_node(node)


def _with_outputs(signature: ExportGraphSignature, nodes: list[Any]) -> ExportGraphSignature:
    """The signature of a graph that returns `nodes`."""
    specs = [
        replace(spec, arg=TensorArgument(name=node.name)) if _is_other(spec.arg, node) else spec
        for spec, node in zip(signature.output_specs, nodes, strict=True)
    ]
    return replace(signature, output_specs=specs)


def _is_other(argument: Any, node: Any) -> bool:
    return isinstance(argument, TensorArgument) and argument.name != node.name
