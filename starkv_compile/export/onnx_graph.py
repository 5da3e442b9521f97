"""Captured programs as ONNX models, the parts of a prompt put together again."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20 as op
from onnxscript import optimizer
from torch.export import ExportedProgram

from .capture import Captured
from .ports import Port
from .weights import Weights

OPSET = 20
DOMAIN, COMPACT = "starkv", "Compact"


def sort_stable(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable: ONNX's TopK over everything gives ties to the lowest index."""
    length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, length, axis=dim, largest=descending, sorted=True)


def conv3d(
    values: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """aten.conv3d: onnxscript's gives one without a bias (Qwen2-VL's) zeros of a wrong shape.

    In float32 where it is bfloat16, which Conv has in later opsets only.
    """
    wide = values.dtype == ir.DataType.BFLOAT16
    given = [values, weight, bias]
    if wide:
        given = [v if v is None else op.Cast(v, to=ir.DataType.FLOAT) for v in given]
    found = op.Conv(
        *given, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation),
        group=groups,
    )  # fmt: skip
    return op.Cast(found, to=ir.DataType.BFLOAT16) if wide else found


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.conv3d.default: conv3d,
}


def to_onnx(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The program in ONNX, its ports named."""
    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table=TRANSLATIONS,
            # Its rewrite rules take 1e-12 for zero: `log(x + 1e-12)` would lose its guard.
            optimize=False,
            verbose=False,
        )
    assert made is not None
    return tidy(made.model)


def prompt_model(captured: Captured, inputs: Sequence[Port], outputs: Sequence[Port]) -> ir.Model:
    """The prompt's graph: the answer, and a call of the cache part for every layer."""
    names = [port.name for port in inputs]
    model = to_onnx(captured.answer, names, captured.answer_outputs)
    each = (len(outputs) - 1) // len(captured.calls)
    compact = to_onnx(captured.compact, captured.compact_inputs, [f"out_{i}" for i in range(each)])
    function = _as_function(compact)
    model.functions[function.identifier()] = function
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    found = [model.graph.outputs[0]]
    for layer, call in enumerate(captured.calls):
        node = ir.node(
            COMPACT, [values[name] for name in call], domain=DOMAIN, num_outputs=each,
            name=f"compact.{layer}",
        )  # fmt: skip
        model.graph.append(node)
        found += node.outputs
    for value, port in zip(found, outputs, strict=True):
        value.name = port.name
        value.shape, value.dtype = ir.Shape(port.dims), ir.DataType[_ONNX_TYPES[port.dtype]]
    model.graph.outputs[:] = found
    name_lengths(model, inputs)
    return tidy(model)


def name_lengths(model: ir.Model, inputs: Sequence[Port]) -> None:
    """Call the lengths of the inputs what the ports call them; tracing numbered them."""
    for value, port in zip(model.graph.inputs, inputs, strict=True):
        value.shape = ir.Shape(port.dims)


def tidy(model: ir.Model) -> ir.Model:
    """Functions inlined, constants folded, doubles and what nobody reads removed.

    Without the fold TensorRT rejects sequences that M-RoPE's `split` leaves behind.
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
    """Its weights with those of the folder's other graphs. Checked once written."""
    weights.move_out(model)
    ir.save(model, str(file))
    onnx.checker.check_model(str(file), full_check=True)


_ONNX_TYPES = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64", torch.bool: "BOOL",
}  # fmt: skip


def _as_function(model: ir.Model) -> ir.Function:
    """The model's graph as a function, which cannot have initializers: constants in their place."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value}, name=f"constant.{name}")
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[name]
    return ir.Function(DOMAIN, COMPACT, graph=graph, attributes=[])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters write about torchvision, which is not needed, and their own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
