"""Small functions that read FX graphs: Dynamo's torch-level graphs and exported ATen graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from ..kernels.ops import STARKV

aten = torch.ops.aten

# Each operation with all its names: torch functions, tensor methods, ATen overloads.
SDPA = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
FLEX = (torch.ops.higher_order.flex_attention,)
LINEAR = (F.linear, torch._C._nn.linear, aten.linear.default, aten.addmm.default, aten.mm.default)
MATMUL = (
    torch.matmul,
    operator.matmul,
    torch.bmm,
    "matmul",
    "bmm",
    "__matmul__",
    aten.matmul.default,
    aten.bmm.default,
)
BADDBMM = (torch.baddbmm, "baddbmm", aten.baddbmm.default)
SOFTMAX = (
    F.softmax,
    torch.softmax,
    "softmax",
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
)
DROPOUT = (F.dropout, torch.dropout, "dropout", aten.dropout.default)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", aten.add.Tensor)
SUBTRACT = (operator.sub, torch.sub, "sub", aten.sub.Tensor)
MULTIPLY = (operator.mul, torch.mul, "mul", "__mul__", aten.mul.Tensor, aten.mul.Scalar)
DIVIDE = (operator.truediv, torch.div, "div", "__truediv__", aten.div.Tensor, aten.div.Scalar)
IN_PLACE = (operator.imul, operator.itruediv, "mul_", "div_")
EXP = (torch.exp, "exp", aten.exp.default)
SUM = (torch.sum, "sum", aten.sum.dim_IntList)
MASKED_FILL = (torch.masked_fill, "masked_fill", aten.masked_fill.Scalar)
WHERE = (torch.where, "where", aten.where.self, aten.where.ScalarOther)
FULL = (
    torch.full,
    torch.full_like,
    torch.zeros_like,
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.scalar_tensor.default,
)
CAST = ("to", "type_as", "float", aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)
COPY = ("contiguous", "clone", torch.clone, aten.clone.default, aten.contiguous.default)
TRANSPOSE = (torch.transpose, torch.swapaxes, "transpose", "swapaxes", aten.transpose.int)
PERMUTE = (torch.permute, "permute", aten.permute.default)
PAD = (F.pad, aten.pad.default, aten.constant_pad_nd.default)
SLICE = (operator.getitem, aten.slice.Tensor)
EXPAND = (torch.Tensor.expand, "expand", aten.expand.default)
RESHAPE = (
    "reshape",
    "view",
    torch.reshape,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
)
UNSQUEEZE = ("unsqueeze", torch.unsqueeze, aten.unsqueeze.default, "__getitem__")
REPEAT = (torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int)
TANH = (torch.tanh, "tanh", aten.tanh.default)
LOG_SUM_EXP = (torch.logsumexp, "logsumexp", aten.logsumexp.default, torch.logaddexp)
CAT = (torch.cat, torch.concat, aten.cat.default)
MASKED_SCATTER = ("masked_scatter", torch.masked_scatter, aten.masked_scatter.default)
CACHE_WRITE = (STARKV.cache_write, STARKV.cache_write.default)


def is_op(node: Any, names: tuple[Any, ...]) -> bool:
    """Whether `node` calls one of `names`."""
    return isinstance(node, Node) and node.op.startswith("call_") and node.target in names


def value(node: Any) -> Any:
    """The example value recorded for a node (`example_value` by Dynamo, `val` by export)."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


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


def argument_names(node: Node) -> list[str]:
    """The names of a registered op's arguments; [] for any other target."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):  # as Dynamo has it
        target = getattr(target, "default", None)
    if not isinstance(target, torch._ops.OpOverload):
        return []
    return [argument.name for argument in target._schema.arguments]


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


def agree(*shapes: tuple[str, Any]) -> bool:
    """Whether nodes have the shapes of their letters: one letter for each dimension, and the same
    size wherever a letter stands."""
    sizes: dict[str, Any] = {}
    for letters, node in shapes:
        dims = shape(node)
        if len(dims) != len(letters):
            return False
        for letter, size in zip(letters, dims, strict=True):
            if not bool(sizes.setdefault(letter, size) == size):
                return False
    return True


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
    if is_op(tokens, CAT) and len(producers(tokens)) > 1:
        return producers(tokens)[-1]
    return tokens


def scaled(node: Node) -> tuple[Node, float] | None:
    """(x, factor) of `x * factor`, `factor * x` or `x / divisor`."""
    sides = operands(node) if is_op(node, MULTIPLY + DIVIDE) else None
    if sides is None:
        return None
    left, right = sides
    if is_op(node, MULTIPLY) and isinstance(right, Node):
        left, right = right, left
    if not isinstance(left, Node) or not isinstance(right, (int, float)):
        return None
    return left, float(right) if is_op(node, MULTIPLY) else 1.0 / right


def swaps_last_two(node: Node) -> bool:
    """Whether `node` is its first argument with the last two dimensions exchanged."""
    if node.target is getattr or node.target is aten.mT.default:
        return node.target is not getattr or node.args[1] == "mT"
    order = order_of_dims(node)
    same = list(range(len(order)))
    return order != same and order[:-2] == same[:-2]


def order_of_dims(node: Node) -> list[int]:
    """Which dimension of its first argument each of the node's is; [] if it is no transpose."""
    if not is_op(node, TRANSPOSE + PERMUTE) or not shape(node):
        return []
    order = list(range(len(shape(node))))
    named = [dim for name, dim in node.kwargs.items() if name != "input"]
    given: Any = [*node.args[1:], *named]  # two to exchange, in either order; or all
    dims = [dim % len(order) for dim in (given if isinstance(given[0], int) else given[0])]
    if is_op(node, PERMUTE):
        return dims
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return order


def see_through_copies(node: Node) -> Node | None:
    """The source of a cast or copy."""
    return operand(node) if is_op(node, CAST + COPY) else None


def see_through_folding(node: Node) -> Node | None:
    """The source of a reshape of leading dimensions alone, or of an expand that adds nothing."""
    if not is_op(node, RESHAPE + EXPAND):
        return None
    source: Node = operand(node)
    new, old = shape(node), shape(source)
    if not old or not bool(new[-2:] == old[-2:]) or (is_op(node, EXPAND) and not bool(new == old)):
        return None
    return source


def see_through_padding(node: Node) -> Node | None:
    """The source of vectors made longer by zeros, which no product notices."""
    if not is_op(node, PAD):
        return None
    args = bind(node, "input", "pad", "mode", "value")
    if node.target is aten.constant_pad_nd.default:
        args = bind(node, "input", "pad", "value")
    plain = len(args["pad"]) == 2 and args["pad"][0] == 0 and not args.get("value")
    return args["input"] if plain and args.get("mode", "constant") == "constant" else None


def cached_of(chain: list[Node]) -> Node:
    """From a tensor and its sources, the cached one: marked or returned; else the last one."""
    for kept in (_is_marked, _is_returned):
        for node in chain:
            if kept(node):
                return node
    return chain[-1]


def _is_marked(node: Node) -> bool:
    return any(is_op(user, CACHE_WRITE) for user in node.users)


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def see_through_repeat_kv(node: Node) -> Node | None:
    """The source of keys or values repeated once per query head of a group.

    `repeat_interleave(x, n, dim=1)`, or unsqueeze / index with None, expand, reshape back to 4-D:
    [B, G, L, D] becomes [B, G, 1, L, D], [B, G, r, L, D], [B, G * r, L, D]. Heads laid out as whole
    sets one after another (from [B, 1, G, L, D]) are others: query head h reads h % G, not h // r.
    """
    if is_op(node, REPEAT):
        return _see_through_repeat(node)
    if not is_op(node, RESHAPE) or len(shape(node)) != 4:
        return None
    copies = through(operand(node), see_through_copies)
    expanded = next((n for n in copies if is_op(n, EXPAND) and len(shape(n)) == 5), None)
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
    whole = is_op(node, SLICE) and shape(node) == shape(operand(node))
    return operand(node) if whole or is_op(node, UNSQUEEZE + RESHAPE + COPY) else None
