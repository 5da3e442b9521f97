"""Gives scoring the log-sum-exp that the prompt's own attention computes."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from . import fx
from .base import Context, GraphPass
from .forms.kernels import FLASH

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class ShareLogSumExp(GraphPass):
    """Replaces `y = sdpa(q, k, v)` by the kernel that SDPA runs: `y, log_sum_exp = flash(q, k, v)`.

    It is the same kernel with the same arguments, so y does not change by a bit, and scoring saves
    one of its two passes over the keys. If SDPA would run anything else, or change its inputs
    first, nothing changes. For forms that return it already, the pass reads it.

    A graph for every length is an exported one, and shares nothing: torch's decomposition of the
    kernel for CPUs returns the attention weights in the place of the log-sum-exp.
    """

    def run(self, context: Context) -> None:
        if context.every_length:
            return
        for site in list(context.sites):
            attention = site.attention
            if attention.mask is not None:
                continue
            if attention.log_sum_exp is not None:
                result = (attention.node, attention.log_sum_exp)
                with context.graph.inserting_after(attention.node):
                    shared = context.graph.call_function(getitem, result)
                context.update(site, attention=attention.at(shared), log_sum_exp=shared)
                self.matched += 1
                continue
            if attention.form != "sdpa":
                continue
            call = _flash_call(attention.node)
            if call is None:
                continue
            with context.graph.inserting_before(attention.node):
                both = context.graph.call_function(*call)
                log_sum_exp = context.graph.call_function(getitem, (both, 1))
                out = context.graph.call_function(getitem, (both, 0))  # scores go after this
            out.meta = dict(attention.node.meta)
            attention.node.replace_all_uses_with(out)
            context.graph.erase_node(attention.node)
            context.update(site, attention=attention.at(out), log_sum_exp=log_sum_exp)
            self.matched += 1


class _Recorder(TorchDispatchMode):
    """Keeps the calls that a composite operation is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.prim.device.default:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _flash_call(node: Node) -> Call | None:
    """The single call that this SDPA node makes, with nodes in the place of example values."""
    inputs = {id(fx.value(n)): n for n in fx.producers(node)}
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), fx.value)
    with torch.no_grad(), _Recorder() as recorder:
        node.target(*args, **kwargs)  # type: ignore[operator]
    if len(recorder.calls) != 1 or recorder.calls[0][0] not in FLASH:
        return None
    func, args, kwargs = recorder.calls[0]
    if any(isinstance(a, torch.Tensor) and id(a) not in inputs for a in args):
        return None  # padded or expanded
    if any(isinstance(a, torch.SymFloat | torch.SymInt) for a in (*args, *kwargs.values())):
        return None
    return func, tuple(inputs.get(id(a), a) for a in args), kwargs
