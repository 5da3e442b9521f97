"""Compiles a decoder's layers once: most of them are one graph, repeated.

The graph is split where one layer of the model ends and the next begins. Pieces that are equal, but
for the names of their symbolic lengths, share one compiled function. A graph runs the pieces in
order. So the time to compile does not grow with the number of layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sympy import Basic, Eq, Expr, Symbol, true
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.passes.split_module import split_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..passes import fx

Compiled = Callable[..., Any]
Compile = Callable[[GraphModule, list[Any]], Compiled]

_VARIABLE = re.compile(r"^\w\[[^\]]*\](\[\d+\])?")
"""The beginning of a path: L['self'], or L['args'][0]."""
_LAYER = re.compile(r".*?[.\[]\d+\]?(?=[.\[]|$)")
"""The part of a path up to the first number: .model.layers.0"""
_CALLS = ("call_function", "call_method", "call_module")
_KEEPS_WHOLE = frozenset(
    f"{name}_"
    for name in ("t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "as_strided")
) | {"resize_", "resize_as_", "set_", "_set_grad_enabled", "_sdpa_kernel"}
"""Functions after which an example value no longer has the node's shape, or that change a mode."""
WORTH_IT = 2 / 3
"""The largest share of the nodes that may be left to compile."""


def compile_by_region(module: GraphModule, inputs: Sequence[Any], compile_one: Compile) -> Compiled:
    """Compiles `module` piece by piece, or as a whole if no two pieces are alike.

    Args:
        module: a graph of Dynamo, with an example value for every node.
        inputs: example inputs of the whole graph.
        compile_one: compiles one graph for its example inputs.
    """
    try:
        pieces = _split(module)
    except Exception as error:  # the whole graph serves as well
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"starkv: the passes failed to split a graph by layers, and compile it as a whole "
            f"({reason}). Please open an issue with this text",
            stacklevel=2,
        )
        pieces = None
    if pieces is None:
        return compile_one(module, list(inputs))
    shared = _SharedPieces(_shape_env(module))
    for name, piece in _children(pieces):
        single = _return_tuple(piece)
        setattr(pieces, name, _Run(shared.compiled(piece, compile_one), single))
    pieces.recompile()
    return pieces.forward


class _Run(torch.nn.Module):
    """Puts a compiled function where the graph has a module. single: it returns one value."""

    def __init__(self, compiled: Compiled, single: bool) -> None:
        super().__init__()
        self.forward = (lambda *inputs: compiled(*inputs)[0]) if single else compiled


def _return_tuple(piece: GraphModule) -> bool:
    """Lets `piece` return a tuple, as compilers expect. Returns whether it returned one value."""
    (returned,) = piece.graph.output_node().args
    if isinstance(returned, tuple):
        return False
    piece.graph.output_node().args = ((returned,),)
    piece.recompile()
    return True


class _Known(NamedTuple):
    """A compiled piece, its symbols, what was known of their values, and conditions on them."""

    compiled: Compiled
    symbols: list[Symbol]
    ranges: list[Any]
    conditions: list[Expr]


class _SharedPieces:
    """Compiled pieces by their text.

    A piece that was compiled for other symbols is used again only if every condition on these holds
    for the new symbols too. Then the compiled graph has the same condition on the new ones.
    """

    def __init__(self, shape_env: ShapeEnv | None) -> None:
        self._env = shape_env
        self._known: dict[str, list[_Known]] = {}

    def compiled(self, piece: GraphModule, compile_one: Compile) -> Compiled:
        text, symbols = describe(piece)
        ranges = [self._env.var_to_range.get(s) for s in symbols] if self._env else []
        similar = self._known.setdefault(text, [])
        for known in similar:
            if self._fits(known, symbols, ranges):
                return known.compiled
        examples = [fx.value(node) for node in piece.graph.nodes if node.op == "placeholder"]
        compiled = compile_one(piece, examples)
        guards = [guard.expr for guard in self._env.guards] if self._env else []
        about = [one for one in guards if one.free_symbols <= set(symbols)]
        similar.append(_Known(compiled, symbols, ranges, about))
        return compiled

    def _fits(self, known: _Known, symbols: list[Symbol], ranges: list[Any]) -> bool:
        if self._env is None or known.symbols == symbols:
            return True
        pairs = zip(known.symbols, symbols, known.ranges, ranges, strict=True)
        if any(old != new and theirs != ours for old, new, theirs, ours in pairs):
            return False
        renamed = dict(zip(known.symbols, symbols, strict=True))
        conditions = [one.xreplace(renamed) for one in known.conditions]
        with self._env.suppress_guards():  # a question that is answered with no leaves no trace
            if not all(_holds(self._env, one) for one in conditions):
                return False
        return all(self._env.evaluate_expr(one) for one in conditions)


def _holds(env: ShapeEnv, condition: Expr) -> bool:
    """Whether a condition on lengths holds. An equation that is new would rename a length."""
    if isinstance(condition, Eq) and env.simplify(condition) != true:
        return False
    return bool(env.evaluate_expr(condition))


def _children(pieces: GraphModule) -> list[tuple[str, GraphModule]]:
    return [
        (name, piece)
        for name, piece in pieces.named_children()
        if isinstance(piece, GraphModule) and name.startswith("submod_")
    ]


def _split(module: GraphModule) -> GraphModule | None:
    """A graph that calls a module for each piece; None if that would not be right, or no use."""
    numbers = dict(_numbered(module))
    if len(set(numbers.values())) < 3 or any(_stays_whole(node) for node in module.graph.nodes):
        return None
    crossing = [
        node.meta.get("example_value", NotImplemented)
        for node, number in numbers.items()
        if any(numbers.get(user) != number for user in node.users)
    ]
    storages = [storage for value in crossing if (storage := _storage(value)) is not None]
    if not all(map(_can_cross, crossing)) or len(set(storages)) < len(storages):
        return None
    pieces = split_module(module, module, numbers.__getitem__, keep_original_order=True)
    sizes = [(describe(piece)[0], len(piece.graph.nodes)) for _, piece in _children(pieces)]
    left, whole = sum(dict(sizes).values()), sum(size for _, size in sizes)
    return pieces if left <= WORTH_IT * whole else None


def _numbered(module: GraphModule) -> Iterator[tuple[Node, int]]:
    """Each node that computes, with the number of its piece. The numbers only grow."""
    number, region = 0, ""
    for node in module.graph.nodes:
        if node.op in _CALLS:
            here = _region(node, region)
            number, region = number + (here != region), here
            yield node, number


def _region(node: Node, before: str) -> str:
    """The path of the layer that the node belongs to; "" outside of all layers.

    A layer is a module that has a number among its siblings; one inside another belongs to it. A
    node that a pass inserted belongs where the node before it does.
    """
    if "stack_trace" not in node.meta:
        return before
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        layer = _LAYER.match(_VARIABLE.sub("", path))
        if layer is not None:
            return layer[0]
    return ""


def _stays_whole(node: Node) -> bool:
    """Whether a graph with this node is not split."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in _CALLS and name in _KEEPS_WHOLE


def _can_cross(value: Any) -> bool:
    """Whether a piece can return the value to another one, as compilers take inputs."""
    if isinstance(value, torch.Tensor) and (value.is_conj() or value.is_neg()):
        return False
    return isinstance(value, (torch.Tensor, torch.SymInt)) and not free_unbacked_symbols(value)


def _storage(value: Any) -> int | None:
    """An id of the memory that the example of a tensor stands for."""
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return None
    return value.untyped_storage()._cdata


def _shape_env(module: GraphModule) -> ShapeEnv | None:
    examples = (fx.value(node) for node in module.graph.nodes)
    modes = (each.fake_mode for each in examples if isinstance(each, FakeTensor))
    return next((mode.shape_env for mode in modes if mode.shape_env is not None), None)


def describe(piece: GraphModule) -> tuple[str, list[Symbol]]:
    """Everything that compilation depends on, as text, and the symbols in order.

    Symbols have numbers in the text, so two pieces have one text if they differ in symbols' names.
    """
    symbols: dict[Symbol, Symbol] = {}
    storages: dict[int | None, int] = {}
    names: dict[Node, str] = {}

    def length(value: Any) -> str:
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        expression = value.node.expr if symbolic else value
        if not isinstance(expression, Basic):
            return repr(expression)
        for symbol in sorted(expression.free_symbols, key=str):
            symbols.setdefault(symbol, Symbol(f"s{len(symbols)}", **symbol.assumptions0))
        return str(expression.xreplace(symbols))

    def example(value: Any) -> str:
        if is_traceable_wrapper_subclass(value):
            inner, context = value.__tensor_flatten__()
            parts = ", ".join(f"{name}: {example(getattr(value, name))}" for name in inner)
            return f"{type(value)} {context!r} {length(value.shape)} ({parts})"
        if isinstance(value, torch.Tensor):
            sizes = [*value.shape, *value.stride(), value.storage_offset()]
            kind = (value.dtype, value.device, value.requires_grad, value.layout, type(value))
            return f"{[length(size) for size in sizes]} {kind}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(example, value))})"
        return length(value)

    def argument(value: Any) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, (tuple, list)):
            return f"{type(value).__name__}({', '.join(map(argument, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name}: {argument(one)}' for name, one in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({argument((value.start, value.stop, value.step))})"
        return length(value)

    lines = []
    for node in piece.graph.nodes:
        names[node] = f"%{len(names)}"
        if node.op == "placeholder":  # inputs that share memory
            storage = _storage(fx.value(node))
            lines.append(f"memory {storages.setdefault(storage, len(storages))}")
        parts = [argument(node.args), argument(node.kwargs), example(fx.value(node))]
        lines.append(" ".join([node.op, _target(piece, node), *parts]))
    return "\n".join(lines), list(symbols)


def _target(piece: GraphModule, node: Node) -> str:
    """What a node calls. Functions and constants are told apart by identity, not by name."""
    if node.op in ("placeholder", "output"):
        return node.op
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return f"{node.target} {id(node.target)}"
    owner: Any = piece
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return str(id(owner))
