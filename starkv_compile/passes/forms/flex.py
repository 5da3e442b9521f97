"""flex_attention(q, k, v, score_mod, block_mask), where score_mod changes nothing"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from .. import fx, ops
from ..sites import Attention
from .operands import SDPA_WAY_OUT, as_given, read_sides, scale_of


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls flex_attention, whose mask is a function of places."""
    if not fx.is_op(node, ops.FLEX):
        return None
    arguments: Any = node.args
    query, key, value, score, block_mask, scale, _, _, inputs = arguments
    if not _changes_nothing(score) or not isinstance(block_mask, tuple) or _has_sink(node):
        return None
    sides = query, key, value
    found = read_sides(node, *sides, scale, grouped=True) or as_given(*sides)
    return Attention(
        node=node,
        form="flex",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=None,
        causal=False,
        scale=scale_of(scale, query, found.factor),
        mask_function=(block_mask[-1], *inputs),
    )


def why_not(node: Node) -> str | None:
    """A score function, or a sink made of the log-sum-exp."""
    if fx.is_op(node, ops.FLEX):
        return f"flex_attention with a score_mod or a sink is not supported; {SDPA_WAY_OUT}"
    return None


def _changes_nothing(function: Any) -> bool:
    """Whether a `score_mod(score, batch, head, query, key)` returns the score itself."""
    graph = function.graph.owning_module.get_submodule(function.target).graph
    first = next(iter(graph.find_nodes(op="placeholder")))
    returned = torch.fx.node.map_arg(graph.output_node().args[0], lambda n: n)
    return returned in (first, (first,), [first])


def _has_sink(node: Node) -> bool:
    """Whether flex_attention's second result, the log-sum-exp, is joined with something."""
    queue = [user for user in node.users if user.args[1:] == (1,)]
    while queue:
        user = queue.pop()
        if fx.is_op(user, ops.CAT + ops.LOG_SUM_EXP):
            return True
        if user.target is operator.getitem or fx.is_op(user, ops.CAST + ops.UNSQUEEZE):
            queue += user.users
    return False
