"""Small readers of FX graphs, for Dynamo's torch-level graphs and exported ATen ones alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional as F

from ..kernels.ops import STARKV

aten = torch.ops.aten

# Each operation under all its names: torch functions, tensor methods, ATen overloads.
SDPA = (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)
FLEX = (torch.ops.higher_order.flex_attention,)
LINEAR = (F.linear, torch._C._nn.linear, aten.linear.default, aten.addmm.default, aten.mm.default)
MATMUL = (torch.matmul, torch.bmm, "matmul", aten.matmul.default, aten.bmm.default)
SOFTMAX = (F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default)
DROPOUT = (F.dropout, torch.dropout, "dropout", aten.dropout.default)
CAST = ("to", "type_as", "float", aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)
COPY = ("contiguous", "clone", torch.clone, aten.clone.default, aten.contiguous.default)
TRANSPOSE = (
    torch.transpose,
    "transpose",
    "permute",
    aten.transpose.int,
    aten.permute.default,
)
EXPAND = (torch.Tensor.expand, "expand", aten.expand.default)
RESHAPE = ("reshape", "view", torch.reshape, aten.reshape.default, aten.view.default,
           aten._unsafe_view.default)  # fmt: skip
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


def bind(node: Node, *names: str) -> dict[str, Any]:
    """Positional and keyword arguments of a call under `names`; the absent ones are left out."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


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


def see_through_copies(node: Node) -> Node | None:
    """The source of a cast or copy."""
    return node.args[0] if is_op(node, CAST + COPY) else None  # type: ignore[return-value]


def see_through_repeat_kv(node: Node) -> Node | None:
    """The source of keys or values repeated once per query head of a group.

    `repeat_interleave(x, n, dim=1)`, or unsqueeze / index with None, expand, reshape back to 4-D.
    Told apart from any other reshape by the shapes: [B, G, L, D] becomes [B, G * r, L, D].
    """
    if is_op(node, REPEAT):
        return node.args[0]  # type: ignore[return-value]
    if not is_op(node, RESHAPE) or len(shape(node)) != 4:
        return None
    expanded = node.args[0]
    if not (is_op(expanded, EXPAND) or is_op(expanded, COPY)) or len(shape(expanded)) != 5:
        return None
    source = next((n for n in through(expanded, _first_input) if len(shape(n)) == 4), None)
    if source is None:
        return None
    batch, _, length, dim = shape(source)
    if shape(node)[0] == batch and shape(node)[2:] == (length, dim):
        return source
    return None


def _first_input(node: Node) -> Node | None:
    inputs = producers(node)
    return inputs[0] if inputs else None
