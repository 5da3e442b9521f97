"""Reasons of the passes that name a way out: it is taken, and then the layer is compressed."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from starkv_compile.passes import apply
from tests.support.one_layer import CONFIG, D, E, G, S, X
from tests.support.written import (
    LOW,
    TwoLayers,
    Written,
    assert_kept,
    assert_left,
    heads_first,
    logits,
    repeated,
    rewrite,
    sdpa,
    weighted,
)


def changed_weights(q, k, v):
    weights = (logits(q, k) + LOW).softmax(-1)
    return weighted(weights * weights, v)


def clamped_logits(q, k, v):
    return weighted((logits(q, k).clamp(-5, 5) + LOW).softmax(-1), v)


def changed_keys(q, k, v):
    q, k, v = heads_first(q, k, v)
    keys = repeated(k)
    weights = (q @ keys.mT * D**-0.5 + LOW).softmax(-1)
    keys.zero_()
    return weights @ repeated(v) + keys.sum() * 0


def scored_in_flex(q, k, v):
    q, k, v = heads_first(q, k, v)
    return flex_attention(
        q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j) * 0.1, enable_gqa=True
    )


def rooted_weights(q, k, v):
    return weighted((logits(q, k) + LOW).softmax(-1).sqrt(), v)


BY_SDPA = {
    changed_weights: "the weights are changed between softmax and values",
    rooted_weights: "the weights are changed between softmax and values (sqrt",
    clamped_logits: "the logits are more than a scaled product and masks",
    scored_in_flex: "flex_attention with a score_mod or a sink is not supported",
}


@pytest.mark.parametrize("attend", BY_SDPA, ids=lambda attend: attend.__name__)
def test_attention_by_sdpa(attend):
    how = "dynamo" if attend is scored_in_flex else "export"
    assert_left(Written(attend), how, BY_SDPA[attend])
    assert_left(Written(attend), how, "torch.nn.functional.scaled_dot_product_attention")
    assert_kept(Written(sdpa), how)


def test_keys_and_values_that_are_not_returned():
    reason = "the graph does not return the keys and values that attention reads"
    assert_left(Written(sdpa, store=None), "export", reason)
    assert_left(Written(sdpa, lambda k, v: (k * 2, v)), "export", "let it return them")
    assert_kept(Written(sdpa), "export")


def test_a_layer_that_stays_whole_in_one_tensor_with_another():
    def unread(q, k, v):
        return q

    _, report = rewrite(TwoLayers(unread), "export")
    assert report.rewritten == 0
    assert "let it return each layer's by themselves" in report.sites[0].reason
    apart = TwoLayers(unread, lambda layers: [torch.stack(pair) for pair in layers])
    (_, stored), report = rewrite(apart, "export")
    assert report.rewritten == 1
    assert [tuple(x.shape) for x in stored] == [(2, 2, G, S // 2, D), (2, 2, G, S, D)]


class OneHead(nn.Module):
    """rank: dimensions of what attention gets."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(E, D) for _ in range(3))
        self.rank = rank

    def forward(self, x):
        q, k, v = (f(x) if self.rank == 3 else f(x)[:, None] for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v


def test_attention_of_three_dimensions():
    graph = torch.export.export(OneHead(3).eval(), (X,)).module()
    report = apply(graph, CONFIG)
    assert report.rewritten == 0
    assert any("pass four dimensions to attention" in str(line) for line in str(report).split("\n"))
    graph = torch.export.export(OneHead(4).eval(), (X,)).module()
    assert apply(graph, CONFIG).rewritten == 1
    assert graph(X)[1].shape == (2, 1, S // 2, D)


def test_a_graph_without_example_values():
    graph = torch.fx.symbolic_trace(OneHead(4).eval())
    report = apply(graph, CONFIG)
    assert report.rewritten == 0
    assert "torch.fx.passes.fake_tensor_prop.FakeTensorProp" in str(report)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        FakeTensorProp(graph, mode).propagate(X)
    assert apply(graph, CONFIG).rewritten == 1
    assert graph(X)[1].shape == (2, 1, S // 2, D)
