"""Small functions that read FX graphs: Dynamo's torch-level graphs and exported ATen graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import ops

aten = torch.ops.aten


def is_op(node: Any, names: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `names`."""
    return isinstance(node, Node) and node.op.startswith("call_") and node.target in names


def is_pointwise(node: Node) -> bool:
    """Whether a call computes each element of its result from those at the same place."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        packet = getattr(aten, name.rstrip("_"), None) if name else None
        overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else []
        target = getattr(packet, overloads[0]) if overloads else None
    return target is not None and torch.Tag.pointwise in target.tags


def value(node: Any) -> Any:
    """The example value of a node (`example_value` by Dynamo, `val` by export) or a `Computed`."""
    if not isinstance(node, Node):
        return getattr(node, "example", node)
    return node.meta.get("example_value", node.meta.get("val"))


def same(left: Any, right: Any) -> bool:
    """Whether two sizes are equal at every length that the graph serves."""
    return left is right or statically_known_true(left == right)


def shape(node: Any) -> tuple[Any, ...]:
    """Shape of a node's tensor; () where unknown. Dimensions may be symbolic."""
    tensor = value(node)
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()


def has_gradient(node: Node) -> bool:
    """Whether the node's tensor was differentiable when the graph was captured."""
    return bool(getattr(value(node), "requires_grad", False))


def bind(node: Node, *names: str) -> dict[str, Any]:
    """Positional and keyword arguments of a call under `names`; the absent ones are left out."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def schema_of(node: Node) -> Any:
    """The schema of the registered op that a node calls; None for any other target."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):  # as Dynamo has it
        target = getattr(target, "default", None) or getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def argument_names(node: Node) -> list[str]:
    """The names of a registered op's arguments; [] for any other target."""
    schema = schema_of(node)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def bind_schema(node: Node) -> dict[str, Any]:
    """Arguments of a call of a registered op, with the names of its schema as keys."""
    return bind(node, *argument_names(node))


def items_of(node: Node) -> list[tuple[Node, int]]:
    """Each node that reads one of the results of `node`, and the number of that result."""
    return [
        (user, user.args[1])  # type: ignore[misc]
        for user in node.users
        if user.target is operator.getitem
    ]


def operand(node: Node) -> Any:
    """What a call works on: its first argument, or the one it names `input`."""
    return bind(node, "input").get("input")


def operands(node: Node) -> tuple[Any, Any] | None:
    """(left, right) of a sum, a product and the like; None if it has other arguments as well."""
    args = bind(node, "input", "other")
    if "mat2" in args:  # as torch.bmm has it
        args["other"] = args.pop("mat2")
    if len(node.args) > 2 or set(args) != {"input", "other"}:
        return None
    return args["input"], args["other"]


def outputs(graph: torch.fx.Graph) -> list[Node]:
    """Nodes the graph returns, nested containers flattened."""
    found: list[Node] = []
    torch.fx.node.map_arg(graph.output_node().args, found.append)
    return found


def producers(node: Node) -> list[Node]:
    return list(node.all_input_nodes)


def through(node: Any, *steps: Callable[[Node], Node | None]) -> Iterator[Node]:
    """`node`, then what it is made of, as far as one of `steps` sees through it."""
    while isinstance(node, Node):
        yield node
        node = next((inner for step in steps if (inner := step(node)) is not None), None)


def newest(tokens: Node) -> Node:
    """Of cached and new tokens joined, the new ones."""
    while is_op(tokens, ops.CAT) and len(producers(tokens)) > 1:
        tokens = producers(tokens)[-1]
    return tokens


def scaled(node: Node) -> tuple[Node, float] | None:
    """(x, factor) of `x * factor`, `factor * x` or `x / divisor`."""
    sides = operands(node) if is_op(node, ops.MULTIPLY + ops.DIVIDE) else None
    if sides is None:
        return None
    left, right = sides
    if is_op(node, ops.MULTIPLY) and isinstance(right, Node):
        left, right = right, left
    if not isinstance(left, Node) or not isinstance(right, (int, float)):
        return None
    return left, float(right) if is_op(node, ops.MULTIPLY) else 1.0 / right


# Dynamo writes a packet from torch 2.15 on, and a getattr before.
_MATRIX_TRANSPOSES = (aten.mT, aten.mT.default)


def order_of_dims(node: Node) -> list[int]:
    """Which dimension of its first argument each of the node's is; [] if it is no transpose."""
    order = list(range(len(shape(node))))
    if node.target in _MATRIX_TRANSPOSES or (node.target is getattr and node.args[1] == "mT"):
        return [*order[:-2], *order[:-3:-1]]
    if is_op(node, ops.MOVE_DIM) and all(isinstance(dim, int) for dim in node.args[1:]):
        moved: Any = node.args[1:]
        source, place = (dim % len(order) for dim in moved)
        order.remove(source)
        order.insert(place, source)
        return order
    if not is_op(node, ops.TRANSPOSE + ops.PERMUTE) or not order:
        return []
    named = [dim for name, dim in node.kwargs.items() if name != "input"]
    given: Any = [*node.args[1:], *named]  # two to exchange, in either order; or all
    dims = [dim % len(order) for dim in (given if isinstance(given[0], int) else given[0])]
    if is_op(node, ops.PERMUTE):
        return dims
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return order


def see_through_copies(node: Node) -> Node | None:
    """The source of a cast or copy."""
    return operand(node) if is_op(node, ops.CAST + ops.COPY) else None


def see_through_overwriting(node: Node) -> Node | None:
    """What a tensor was overwritten with, if with a tensor of its own shape."""
    source: Any = None
    if is_op(node, ops.OVERWRITE + ops.SLICE_SCATTER):
        source = node.args[1] if len(node.args) > 1 else node.kwargs.get("src")
    elif is_op(node, ops.SET_ITEM):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        source = node.args[2] if all(i is ... or isinstance(i, slice) for i in index) else None
    new, old = shape(node), shape(source)
    alike = bool(old) and len(new) == len(old) and all(map(same, new, old))
    return source if alike else None


def see_through_padding(node: Node) -> Node | None:
    """The source of vectors made longer by zeros, which no product notices."""
    if not is_op(node, ops.PAD):
        return None
    args = bind(node, "input", "pad", "mode", "value")
    if node.target is aten.constant_pad_nd.default:
        args = bind(node, "input", "pad", "value")
    plain = len(args["pad"]) == 2 and args["pad"][0] == 0 and not args.get("value")
    return args["input"] if plain and args.get("mode", "constant") == "constant" else None


def see_through_repeat_kv(node: Node) -> Node | None:
    """The source of keys or values repeated once per query head of a group.

    `repeat_interleave(x, n, dim=1)`, or unsqueeze / index with None, expand, reshape back to 4-D:
    [B, G, L, D] becomes [B, G, 1, L, D], [B, G, r, L, D], [B, G * r, L, D]. Heads laid out as whole
    sets one after another (from [B, 1, G, L, D]) are others: query head h reads h % G, not h // r.
    """
    if is_op(node, ops.REPEAT):
        return _see_through_repeat(node)
    if not is_op(node, ops.RESHAPE) or len(shape(node)) != 4:
        return None
    copies = through(operand(node), see_through_copies)
    expanded = next((n for n in copies if is_op(n, ops.EXPAND) and len(shape(n)) == 5), None)
    if expanded is None:
        return None
    widened = operand(expanded)
    source = next((n for n in through(widened, _see_through_widening) if len(shape(n)) == 4), None)
    if source is None:
        return None
    batch, groups, length, dim = shape(source)
    beside_heads = all(
        (shape(n)[0], *shape(n)[-2:]) == (batch, length, dim) for n in (expanded, node)
    )
    return source if beside_heads and shape(widened) == (batch, groups, 1, length, dim) else None


def _see_through_repeat(node: Node) -> Node | None:
    """The source of an even repeat along the heads, which are the third dimension from last."""
    args = bind(node, "input", "repeats", "dim")
    dim, rank = args.get("dim"), len(shape(node))
    often = isinstance(value(args.get("repeats")), (int, torch.SymInt))
    along_heads = isinstance(dim, int) and rank >= 3 and dim % rank == rank - 3
    return args["input"] if often and along_heads else None


def _see_through_widening(node: Node) -> Node | None:
    """The source of a tensor given further dimensions of size 1, its elements in their order."""
    if node.target is operator.getitem or node.target == "__getitem__":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        plain = all(i is None or i is ... or isinstance(i, slice) for i in index)
        return operand(node) if plain else None
    whole = is_op(node, ops.SLICE) and shape(node) == shape(operand(node))
    return operand(node) if whole or is_op(node, ops.UNSQUEEZE + ops.RESHAPE + ops.COPY) else None
