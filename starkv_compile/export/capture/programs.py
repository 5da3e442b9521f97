"""A prompt and a token as one exported program each, for compilers that take those.

The graphs in files are cut and put together again, so that each layer's scores are converted once.
Here they are in their places, as plain ATen operations: nothing of ours is left that a compiler
would have to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from ...config import StarKVConfig
from ...errors import UnsupportedModel
from ...kernels.reference.capacity import every_length
from ...passes import fx
from ..onnx.package import check_config
from ..tensorrt.profiles import Length, lengths
from .capture import bodies, cut_graph, export_program, port_names, put_in_place
from .decoder import Decode, Decoder, Prefill, describe, traceable
from .grouped import share_heads
from .ports import GraphPorts, Port, Shapes, decode_ports, prefill_ports


@dataclass(frozen=True)
class Program:
    """An exported program of all lengths, its inputs in the order of its arguments.

    ranges: least, usual and most of each length that the inputs name.
    """

    exported: ExportedProgram
    inputs: list[Port]
    outputs: list[Port]
    ranges: dict[str, Length]

    def run(
        self, module: Callable[..., Any], feeds: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What `module`, made from the program, returns: by the names of ports, as a graph does."""
        found = module(*(feeds[port.name] for port in self.inputs))
        return dict(zip((port.name for port in self.outputs), found, strict=True))


def export_programs(
    model: Any, config: StarKVConfig, max_seq: int, batch: int = 1
) -> dict[str, Program]:
    """`prefill` and `decode` of a Hugging Face model; docs/guides/export.md describes their ports.

    Selection is by threshold: torch-tensorrt leaves a TopK whose k is computed to PyTorch.

    Args:
        model: on the CPU. Its weights are not copied.
        max_seq: tokens that a session may see.
        batch: most rows.

    Raises:
        OptionError: an option that no exported graph has.
        UnsupportedModel: it cannot be exported.
    """
    check_config(config, max_seq)
    decoder = Decoder(model)
    device = decoder.embed.weight.device
    if device.type != "cpu":
        raise UnsupportedModel(
            f"the model is on {device}: programs are captured on the CPU and moved by "
            "compile_program; call model.cpu() first"
        )
    shapes = describe(model, decoder)
    ranges = lengths(max_seq, batch=batch)
    largest = {
        "batch": max(3, batch),
        "new": max_seq,
        "stored": max_seq,
        "on_frame": max_seq,
        "seen": 2 * max_seq,
        "budgeted": 2 * max_seq,
    }
    with traceable(decoder.decoder):
        return {
            "prefill": _prefill(decoder, shapes, config, max_seq, ranges, largest),
            "decode": _decode(decoder, shapes, ranges, largest),
        }


def _prefill(
    decoder: Decoder,
    shapes: Shapes,
    config: StarKVConfig,
    max_seq: int,
    ranges: dict[str, Length],
    largest: dict[str, int],
) -> Program:
    ports = prefill_ports(shapes)
    cut = cut_graph(Prefill(decoder, shapes).eval(), ports, config, largest)
    put_in_place(cut.whole, bodies("threshold", max_seq))
    return _program(cut.whole, cut.outputs, ports, ranges, largest)


def _decode(
    decoder: Decoder,
    shapes: Shapes,
    ranges: dict[str, Length],
    largest: dict[str, int],
) -> Program:
    ports = decode_ports(shapes)
    program = export_program(Decode(decoder, shapes).eval(), ports.inputs, largest=largest)
    _, outputs = port_names(program)
    return _program(program.module(check_guards=False), outputs, ports, ranges, largest)


def _program(
    module: GraphModule,
    outputs: list[str],
    ports: GraphPorts,
    ranges: dict[str, Length],
    largest: dict[str, int],
) -> Program:
    """Its inputs one by one, not as a dict: a new module, as the old one's hooks check for that.

    outputs: names of what the module returns, in order.
    """
    module.graph.set_codegen(CodeGen())
    with every_length():
        exported = export_program(
            GraphModule(module, module.graph), ports.inputs, one_by_one=True, largest=largest
        )
    _drop_assertions(exported.graph)
    share_heads(exported.graph)
    _say_lengths(exported.graph)
    by_name = {port.name: port for port in ports.outputs}
    return Program(exported, ports.inputs, [by_name[name] for name in outputs], ranges)


def _drop_assertions(graph: Graph) -> None:
    """Tracing asserts what held for the lengths it saw; the graph is right for others as well."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _say_lengths(graph: Graph) -> None:
    """In every reshape the number for -1, if it is one.

    TensorRT takes it for a length that varies, and refuses attention whose query heads vary.
    """
    for node in graph.nodes:
        if not fx.is_op(node, fx.RESHAPE) or -1 not in node.args[1]:
            continue
        place = node.args[1].index(-1)
        length = fx.shape(node)[place]
        if isinstance(length, int):
            node.args = (node.args[0], [*node.args[1][:place], length, *node.args[1][place + 1 :]])
