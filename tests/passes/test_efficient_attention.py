"""Memory-efficient attention, by a stand-in for xformers' op: same schema, run by SDPA."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from starkv_compile.passes import apply, forms
from tests.support.one_layer import CONFIG, D, G, H, S
from tests.support.written import HOWS, LOW, R, Written, assert_kept, assert_left

OPS = torch.library.Library("starkv_test_xformers", "DEF")
OPS.define(
    "efficient_attention_forward_cutlass(Tensor query, Tensor key, Tensor value, "
    "Tensor? attn_bias, Tensor? seqstart_q, Tensor? seqstart_k, int? max_seqlen_q_, "
    "float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale, "
    "Tensor? seqlen_k, int? window_size) -> (Tensor, Tensor, int, int)"
)


def forward(q, k, v, bias, start_q, start_k, longest, p, log_sum_exp, kind, scale, *more):
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if kind:
        seen = seen.tril(keys - queries if kind == 2 else 0)
    mask = torch.zeros(queries, keys).masked_fill(~seen, float("-inf"))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = mask if bias is None else mask + bias
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.transpose(1, 2).contiguous(), q.new_empty(0), 0, 0


OPS.impl("efficient_attention_forward_cutlass", forward, "CPU")
torch.library.register_fake(
    "starkv_test_xformers::efficient_attention_forward_cutlass",
    lambda q, *more: (torch.empty_like(q), q.new_empty(0), 0, 0),
)


def call(q, k, v, bias=None, kind=1, p=0.0, seqlen=None, window=None):
    """As xformers calls it: [B, S, H, D], heads of keys repeated."""
    k, v = (t[:, :, :, None].expand(-1, -1, -1, R, -1).flatten(2, 3) for t in (k, v))
    return torch.ops.starkv_test_xformers.efficient_attention_forward_cutlass(
        q, k, v, bias, None, None, None, p, True, kind, None, seqlen, window
    )[0].transpose(1, 2)


FORMS = {
    "causal": call,
    "causal to the last key": lambda q, k, v: call(q, k, v, kind=2),
    "a bias": lambda q, k, v: call(q, k, v, LOW.expand(2, H, S, S), 0),
    "a bias and causal": lambda q, k, v: call(q, k, v, torch.zeros(2, H, S, S), 1),
    "from [B, S, H, D] of heads first": lambda q, k, v: call(
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    ),
}
STORES = {
    "heads first": (lambda k, v: (k.transpose(1, 2), v.transpose(1, 2)), lambda k, v: (k, v)),
    "tokens first": (lambda k, v: (k, v), lambda k, v: (k.transpose(1, 2), v.transpose(1, 2))),
    "stacked": (lambda k, v: (torch.stack([k, v]),), lambda kv: kv.transpose(2, 3).unbind(0)),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", FORMS)
def test_it_keeps_what_sdpa_keeps(name, how):
    assert_kept(Written(FORMS[name]), how)


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", STORES)
def test_what_is_cached_keeps_its_layout(name, how):
    store, as_heads_first = STORES[name]
    assert_kept(Written(call, store), how, as_heads_first)


REFUSED = {
    "dropout": (lambda *t: call(*t, p=0.1), "dropout_p"),
    "lengths": (lambda *t: call(*t, seqlen=torch.full((2,), S)), "seqlen_k"),
    "a window": (lambda *t: call(*t, window=7), "window_size"),
    "another mask": (lambda *t: call(*t, kind=3), "custom_mask_type 0, 1 or 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_switched_on_is_refused_by_name(name):
    attend, reason = REFUSED[name]
    assert_left(Written(attend), "export", reason)


def test_atens_own_op():
    """Its call on tensors that only pretend to be on a GPU: nothing is computed."""

    class Kernel(nn.Module):
        def forward(self, q, k, v):
            out = torch.ops.aten._efficient_attention_forward(
                q, k, v, None, None, None, None, None, 0.0, 1, True
            )
            return out[0], k, v

    with FakeTensorMode():
        tensors = [torch.empty(2, S, G, D, dtype=torch.half, device="cuda") for _ in range(3)]
    graph = torch.export.export(Kernel(), tuple(tensors)).module()
    found = next(read for node in graph.graph.nodes if (read := forms.read(node)))
    assert (found.form, found.causal, found.scale) == ("efficient", True, 0.25)
    assert found.key.node is graph.graph.find_nodes(op="placeholder")[1]
    assert apply(graph, CONFIG).rewritten == 1
