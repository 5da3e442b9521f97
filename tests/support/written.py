"""One attention layer, written out in the many ways that people write it, and its kept tokens."""

import torch
from torch import nn
from torch.nn import functional as F

from starkv_compile.passes import apply
from tests.support.one_layer import CONFIG, D, E, G, H, S, X, capture

R = H // G
LATER = torch.ones(S, S, dtype=torch.bool).triu(1)
LOW = torch.zeros(S, S).masked_fill(LATER, -1e9)
"""Masks of what a query does not see: True there, or added."""
HOWS = ("dynamo", "export", "strict", "core")


class Written(nn.Module):
    """A layer that returns its output and what is to be cached.

    attend: attention of [B, S, H, D] queries and [B, S, G, D] keys and values. store: makes what is
    returned of those keys and values; None: nothing.
    """

    def __init__(self, attend, store=lambda k, v: (k.transpose(1, 2), v.transpose(1, 2))):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(E, H * D), nn.Linear(E, G * D), nn.Linear(E, G * D)
        self.attend, self.store = attend, store

    def forward(self, x):
        q, k, v = (f(x).view(x.shape[0], S, -1, D) for f in (self.q, self.k, self.v))
        k = k * 0.5 + torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1)
        y = self.attend(q, k, v)
        return (y, *self.store(k, v)) if self.store else y


def in_one_tensor(layers):
    """[layers, 2, B, G, S, D]."""
    return torch.stack([torch.stack(pair) for pair in layers])


class TwoLayers(Written):
    """Two layers that return their keys and values together.

    second: attention of the second layer. together: makes what is returned of both pairs.
    """

    def __init__(self, second, together=in_one_tensor):
        super().__init__(None)
        self.second, self.together = second, together

    def forward(self, x):
        q, k, v = (f(x).view(2, S, -1, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, ~LATER, enable_gqa=True)
        keys, values = k * 2.0, v.sin()
        y = y + self.second(q, keys, values)
        return y, self.together([(k, v), (keys, values)])


def heads_first(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def repeated(t):
    return t.repeat_interleave(R, dim=1)


def logits(q, k):
    """[B, H, S, S], scaled."""
    q, k = heads_first(q, k)
    return q @ repeated(k).mT * D**-0.5


def weighted(weights, v):
    return weights @ repeated(v.transpose(1, 2))


def sdpa(q, k, v):
    q, k, v = heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, ~LATER, enable_gqa=True)


def rewrite(module, how):
    """(what the rewritten graph returns, the report) for `X`."""
    torch.compiler.reset()
    with torch.no_grad():
        if how == "dynamo":
            return _compiled(module)
        if how == "strict":
            graph = torch.export.export(module.eval(), (X.clone(),), strict=True).module()
        else:
            graph = capture(module, X.clone(), how=how)
        report = apply(graph, CONFIG)
        return graph(X.clone()), report


def _compiled(module):
    reports = []

    def backend(graph, _):
        reports.append(apply(graph, CONFIG))
        return graph

    result = torch.compile(module.eval(), backend=backend, fullgraph=True)(X.clone())
    (report,) = reports
    return result, report


def kept_by_sdpa():
    """Keys and values [B, G, C, D] that the same layer keeps when it calls SDPA."""
    (_, key, value), report = rewrite(Written(sdpa), "export")
    assert report.rewritten == 1
    return key, value


def assert_kept(module, how, as_heads_first=lambda *stored: stored):
    """The layer is rewritten, computes the same, and keeps what SDPA keeps."""
    (y, *stored), report = rewrite(module, how)
    assert report.rewritten == 1, str(report)
    assert report.sites[0].note is None, "the key projection's input was found"
    with torch.no_grad():
        torch.testing.assert_close(y, module(X.clone())[0])
    for kept, expected in zip(as_heads_first(*stored), kept_by_sdpa(), strict=True):
        assert torch.equal(kept, expected)


def assert_left(module, how, reason):
    """The layer is refused with this reason, and returns what it returned."""
    results, report = rewrite(module, how)
    assert (report.found, report.rewritten) == (1, 0), str(report)
    assert reason in report.sites[0].reason
    with torch.no_grad():
        torch.testing.assert_close(results, module(X.clone()))
