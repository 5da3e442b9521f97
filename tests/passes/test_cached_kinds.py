"""Layers that cache something else than their own keys and values of the tokens that ask."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starkv_compile import StarKVConfig, report
from starkv_compile.cache.layer import StarKVLayer
from starkv_compile.cache.state import SharedState
from starkv_compile.kernels import reference
from starkv_compile.kernels.reference.star import Layout, fresh_state, star_scores

H, D, R, E, S = 4, 16, 12, 64, 40
CONFIG = StarKVConfig(budget=0.5, policy="starkv", inner="eager")
X = torch.randn(2, S, E, generator=torch.Generator().manual_seed(1))


def heads(t, count=H):
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One attention over a `StarKVLayer`; `kind` says what is cached and who asks."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.q, self.k, self.v = (nn.Linear(E, H * D) for _ in range(3))
        self.down, self.up = nn.Linear(E, R + D // 2), nn.Linear(R, H * (D + D // 2))

    def forward(self, x, cache):
        return getattr(self, self.kind)(x, cache)

    def latent(self, x, cache):
        """Multi-head latent attention: half a key from a latent, half shared by all heads."""
        latent, shared = self.down(x)[:, None].split([R, D // 2], -1)
        latent, shared = cache.update(latent, shared)
        first, value = heads(self.up(latent[:, 0])).split([D // 2, D], -1)
        key = first.new_empty(*first.shape[:-1], D)
        key[..., : D // 2].copy_(first)
        key[..., D // 2 :].copy_(shared.expand(-1, H, -1, -1))
        query = heads(self.q(x))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out, query, key

    def prefix(self, x, cache):
        """A prompt that sees all of itself."""
        query = heads(self.q(x))
        key, value = cache.update(heads(self.k(x)), heads(self.v(x)))
        return F.scaled_dot_product_attention(query, key, value), query, key

    def cross(self, x, cache):
        """Keys of other tokens than the queries'."""
        query = heads(self.q(x[:, :17]))
        key, value = cache.update(heads(self.k(x)), heads(self.v(x)))
        shown = torch.ones(17, S, dtype=torch.bool)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=shown), query, key

    def shared(self, x, cache):
        """A second layer that reads the first one's keys and values."""
        query = heads(self.q(x))
        key, value = cache.update(heads(self.k(x)), heads(self.v(x)))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        again = F.scaled_dot_product_attention(query * 0.5, key, value, is_causal=True)
        return out + again, query, key


def run(kind):
    """Query, key, the cache after, and the graph's report; the output is checked against eager."""
    module = Layer(kind).eval()
    cache, plain = StarKVLayer(SharedState()), StarKVLayer(SharedState())
    options = {**CONFIG.to_options(), "shorten_outputs": True}
    compiled = torch.compile(module, backend="starkv", options=options, fullgraph=True)
    with torch.no_grad():
        out, query, key = compiled.forward(X, cache)
        expected = module(X, plain)
    torch.testing.assert_close(out, expected[0])
    return query, key, cache, report(module).graphs[0]


def expected_kept(query, key, mask, groups):
    """By the reference alone. query, key [B, H, S, D]; groups: heads that are stored."""
    capacity = CONFIG.capacity(S)
    attention = reference.window_attention(query, key, mask, D**-0.5, CONFIG.window, capacity)
    attention = attention.unflatten(1, (groups, -1)).mean(2)
    text = torch.full((2, S), -1)
    layout = Layout(text, text, text, text[:, :1])
    state = fresh_state(key[:, :groups], layout.current)
    scores = star_scores(attention, X, None, layout, state, CONFIG.policy).final
    return reference.select_tokens(scores, None, S, CONFIG.window, capacity)


def test_latents_are_kept_by_the_scores_of_the_keys_made_of_them():
    query, key, cache, _ = run("latent")
    assert cache.keys.shape == (2, 1, S // 2, R)
    assert cache.values.shape == (2, 1, S // 2, D // 2)
    assert torch.equal(cache.kept, expected_kept(query, key, None, groups=1))


def test_a_prompt_that_sees_all_of_itself():
    query, key, cache, _ = run("prefix")
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, S, S)
    assert torch.equal(cache.kept, expected_kept(query, key, everything, groups=H))


@pytest.mark.parametrize(
    ("kind", "rewritten", "reason"),
    [("cross", 0, "cross-attention"), ("shared", 1, "another layer's keys and values")],
)
def test_what_is_left_says_why(kind, rewritten, reason):
    _, _, cache, graph = run(kind)
    assert cache.keys.shape[2] == (S // 2 if rewritten else S)
    assert graph.rewritten == rewritten
    (left,) = [site for site in graph.sites if not site.rewritten]
    assert reason in left.reason
