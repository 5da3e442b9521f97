"""A prompt and a token as one exported program each, for compilers that take programs.

The graphs in files are cut and joined again, so that the scores are converted once for all layers.
In these programs the scores of each layer stay in place, as plain ATen operations. So a compiler
needs to know no op of starkv.
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
from ...errors import OptionError, UnsupportedModel
from ...kernels.reference.capacity import every_length
from ...passes import fx, ops
from ..capture.capture import bodies, cut_graph, export_program, port_names, put_in_place
from ..capture.decoder import Decode, Decoder, Prefill, describe, traceable
from ..capture.grouped import share_heads
from ..capture.ports import GraphPorts, Port, Shapes, decode_ports, prefill_ports
from ..onnx.package import check_config
from .profiles import Length, lengths


@dataclass(frozen=True)
class Program:
    """An exported program for all lengths.

    Attributes:
        exported: the program.
        inputs: ports of its arguments, in order.
        outputs: ports of its results, in order.
        ranges: least, usual and most of each length that the inputs name.
    """

    exported: ExportedProgram
    inputs: list[Port]
    outputs: list[Port]
    ranges: dict[str, Length]

    def run(
        self, module: Callable[..., Any], feeds: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the results of `module`, which was made from the program, with ports as keys."""
        found = module(*(feeds[port.name] for port in self.inputs))
        return dict(zip((port.name for port in self.outputs), found, strict=True))


def export_programs(
    model: Any, config: StarKVConfig, max_seq: int, batch: int = 1
) -> dict[str, Program]:
    """Exports `prefill` and `decode` of a Hugging Face model.

    docs/guides/export.md describes their ports. Selection is by threshold, because torch-tensorrt
    leaves a TopK with a computed k to PyTorch.

    Args:
        model: a model on the CPU. Its weights are not copied.
        config: the configuration.
        max_seq: most tokens that a session may see.
        batch: most rows.

    Raises:
        OptionError: exported graphs do not support an option.
        UnsupportedModel: the model cannot be exported.
    """
    check_config(config, max_seq)
    if config.nbits != 16:
        raise OptionError(
            f"nbits={config.nbits}: programs for torch-tensorrt store tokens in the model's "
            "precision; leave it out, or write ONNX files with export_checkpoint"
        )
    decoder = Decoder(model)
    device = decoder.embed.weight.device
    if device.type != "cpu":
        raise UnsupportedModel(
            f"the model is on {device}: programs are captured on the CPU, and compile_program "
            "moves them; call model.cpu() first"
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
    """The program of a module whose inputs come one by one, in place of a dict.

    It is made from a new module, because hooks of the old one expect the dict. outputs: names of
    what the module returns, in order.
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
    """Removes assertions about the lengths that tracing saw: the graph is right for others too."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _say_lengths(graph: Graph) -> None:
    """Replaces -1 in every reshape by its number, if that is fixed.

    TensorRT reads -1 as a length that varies, and refuses attention whose query heads vary.
    """
    for node in graph.nodes:
        if not fx.is_op(node, ops.RESHAPE) or -1 not in node.args[1]:
            continue
        place = node.args[1].index(-1)
        length = fx.shape(node)[place]
        if isinstance(length, int):
            node.args = (node.args[0], [*node.args[1][:place], length, *node.args[1][place + 1 :]])
