"""Converts captured programs to ONNX models, and joins the parts of a prompt again."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch.export import ExportedProgram

from ...errors import UnsupportedModel, root_cause
from ..capture.capture import Captured, port_names
from ..capture.grouped import share_heads
from ..capture.ports import UINT4, GraphPorts, Port, Shapes, of_layer
from .graphs import ONNX_TYPES
from .translations import HAS_BLOCKS, NEWEST, translations
from .weights import Weights

OPSET = 20
DOMAIN, COMPACT = "starkv", "Compact"


def opset_for(shapes: Shapes) -> int:
    """The opset: the least that has TensorScatter, for buffers, or blocks, for few bits."""
    if shapes.slots:
        return NEWEST
    return OPSET if shapes.nbits == 16 else HAS_BLOCKS


def to_onnx(program: ExportedProgram, opset: int = OPSET) -> ir.Model:
    """The program in ONNX, with inputs and outputs named as in `capture.port_names`.

    Raises:
        UnsupportedModel: an operation has no translation.
    """
    share_heads(program.graph)
    inputs, outputs = port_names(program)
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=translations(opset),
                # Its rewrite rules treat 1e-12 as zero: `log(x + 1e-12)` would lose its guard.
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # torch's and onnxscript's have no base of their own
        raise UnsupportedModel(
            f"the model cannot be converted to ONNX ({root_cause(error)})"
        ) from error
    assert made is not None
    return tidy(made.model)


def prompt_model(captured: Captured, ports: GraphPorts, opset: int) -> ir.Model:
    """The prompt's graph: the answer, and a call of the cache part for every layer."""
    model = to_onnx(captured.answer, opset)
    function = _as_function(to_onnx(captured.compact, opset))
    arguments, fields = port_names(captured.compact)
    model.functions[function.identifier()] = function
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    found = {"logits": values["logits"]}
    for layer, call in enumerate(captured.calls):
        node = ir.node(
            COMPACT,
            [values[call[name]] for name in arguments],
            domain=DOMAIN,
            num_outputs=len(fields),
            name=f"compact.{layer}",
        )
        model.graph.append(node)
        found |= of_layer("present", layer, dict(zip(fields, node.outputs, strict=True)))
    for port in ports.outputs:
        value = found[port.name]
        value.name = port.name
        value.shape, value.dtype = ir.Shape(port.dims), ir.DataType(ONNX_TYPES[port.dtype])
    model.graph.outputs[:] = [found[port.name] for port in ports.outputs]
    name_lengths(model, ports.inputs)
    return tidy(model)


def name_lengths(model: ir.Model, inputs: Sequence[Port]) -> None:
    """Gives the inputs the dtypes in their ports, and lengths the names; tracing numbered them.

    Tracing saw the bytes of 4-bit numbers. ONNX Runtime has no Shape of these, so the graph takes
    the lengths of their ranges.
    """
    by_name = {port.name: port for port in inputs}
    values = {value.name: value for value in model.graph.inputs}
    for name, value in values.items():
        port = by_name[name]
        value.shape, value.dtype = ir.Shape(port.dims), ir.DataType(ONNX_TYPES[port.dtype])
        if port.dtype == UINT4:
            measured = [node for node in value.consumers() if node.op_type == "Shape"]
            for node in measured:
                node.replace_input_with(0, values[name.replace("_codes", "_ranges")])


def tidy(model: ir.Model) -> ir.Model:
    """Inlines functions, folds constants, and removes duplicates and unused parts.

    Without folded constants, TensorRT rejects sequences that M-RoPE's `split` leaves behind.
    """
    common.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    steps = ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=1 << 18),  # larger ones are weights
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    )
    return steps(model).model


def save(model: ir.Model, file: Path, weights: Weights) -> None:
    """Writes the model, with its weights in the folder's common file, and checks the file."""
    weights.move_out(model)
    ir.save(model, str(file))
    onnx.checker.check_model(str(file), full_check=True)


def _as_function(model: ir.Model) -> ir.Function:
    """The model's graph as a function. Constants replace its initializers: a function has none."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value}, name=f"constant.{name}")
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[name]
    for i, value in enumerate(graph.outputs):
        if value.is_graph_input():  # without a copy, inlining would rename the input
            graph.append(copy := ir.node("Identity", [value]))
            graph.outputs[i] = copy.outputs[0]
    return ir.Function(DOMAIN, COMPACT, graph=graph, attributes=[])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences exporters: they warn of a missing torchvision and of their own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
