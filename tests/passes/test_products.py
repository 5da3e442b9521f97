"""Products, groups, masks and what is returned, in every order of dimensions."""

import pytest
import torch
from torch.nn import functional as F

from starkv_compile import StarKVConfig
from starkv_compile.passes import Pipeline, apply
from tests.support.crossing import crossed, slow
from tests.support.one_layer import CONFIG, D, G, H, S, X, capture
from tests.support.written import (
    HOWS,
    LATER,
    LOW,
    R,
    TwoLayers,
    Written,
    assert_kept,
    assert_left,
    heads_first,
    kept_by_sdpa,
    logits,
    repeated,
    rewrite,
    weighted,
)

SEEN = (~LATER).float()


def einsum_heads_first(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = (torch.einsum("bhsd,bhld->bhsl", q, repeated(k)) * D**-0.5 + LOW).softmax(-1)
    return torch.einsum("bhsl,bhld->bhsd", weights, repeated(v))


def einsum_tokens_first(q, k, v):
    k, v = (t.repeat_interleave(R, dim=2) for t in (k, v))
    weights = torch.einsum("nqhc,nkhc->nhqk", q, k) * D**-0.5 + LOW
    return torch.einsum("nhqk,nkhc->nqhc", weights.softmax(-1), v).transpose(1, 2)


def einsum_in_groups(q, k, v):
    q, k, v = heads_first(q, k, v)
    q = q.reshape(-1, G, R, S, D)
    weights = (torch.einsum("bgrsd,bgld->bgrsl", q, k) * D**-0.5 + LOW).softmax(-1)
    return torch.einsum("bgrsl,bgld->bgrsd", weights, v).reshape(-1, H, S, D)


def einsum_in_groups_tokens_first(q, k, v):
    q = q.view(-1, S, G, R, D)
    weights = (torch.einsum("bsgrd,blgd->bgrsl", q, k) * D**-0.5 + LOW).softmax(-1)
    return torch.einsum("bgrsl,blgd->bgrsd", weights, v).reshape(-1, H, S, D)


def einsum_with_dots(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = torch.einsum("...id, ...jd -> ...ij", q, repeated(k)) * D**-0.5 + LOW
    return torch.einsum("...ij, ...jd -> ...id", weights.softmax(-1), repeated(v))


def einsum_queries_before_heads(q, k, v):
    k, v = (t.repeat_interleave(R, dim=2) for t in (k, v))
    weights = torch.einsum("bshd,blhd->bshl", q, k) * D**-0.5 + LOW[:, None]
    return torch.einsum("bshl,blhd->bhsd", weights.softmax(-1), v)


def groups_by_broadcast(q, k, v):
    q, k, v = heads_first(q, k, v)
    q, k, v = q.reshape(-1, G, R, S, D), k[:, :, None], v[:, :, None]
    return ((q @ k.mT * D**-0.5 + LOW).softmax(-1) @ v).reshape(-1, H, S, D)


def groups_in_rows(q, k, v):
    """The queries of a group are rows of one product."""
    q, k, v = heads_first(q, k, v)
    weights = (q.reshape(-1, G, R * S, D) @ k.mT * D**-0.5).view(-1, G, R, S, S) + LOW
    return (weights.softmax(-1).view(-1, G, R * S, S) @ v).view(-1, H, S, D)


def heads_in_the_batch(q, k, v):
    q, k, v = heads_first(q, k, v)
    q, k, v = (t.reshape(-1, S, D) for t in (q, repeated(k), repeated(v)))
    weights = (torch.bmm(q, k.transpose(1, 2)) * D**-0.5 + LOW).softmax(-1)
    return torch.bmm(weights, v).view(-1, H, S, D)


def keys_by_queries(q, k, v):
    q, k, v = heads_first(q, k, v)
    weights = (repeated(k) @ q.mT * D**-0.5).mT + LOW
    return (repeated(v).mT @ weights.softmax(-1).mT).mT


def tokens_moved(q, k, v):
    q, k, v = (torch.movedim(t, 1, 2) for t in (q, k, v))
    k, v = (t[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2) for t in (k, v))
    return (torch.matmul(q, k.permute(0, 1, 3, 2)) / D**0.5 + LOW).softmax(3) @ v


def grouped_sdpa(q, k, v):
    q, k, v = heads_first(q, k, v)
    q, k, v = q.reshape(-1, G, R, S, D), k[:, :, None], v[:, :, None]
    k, v = (t.expand(-1, -1, R, -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, ~LATER).reshape(-1, H, S, D)


PRODUCTS = (
    einsum_heads_first,
    einsum_tokens_first,
    einsum_in_groups,
    einsum_in_groups_tokens_first,
    einsum_with_dots,
    einsum_queries_before_heads,
    groups_by_broadcast,
    groups_in_rows,
    heads_in_the_batch,
    keys_by_queries,
    tokens_moved,
    grouped_sdpa,
)


@pytest.mark.parametrize(("attend", "how"), crossed([*PRODUCTS], [*HOWS, "steps"]))
def test_products_in_any_order_of_dimensions(attend, how):
    assert_kept(Written(attend), how)


def with_logits(masked):
    """Attention of logits that are not scaled yet."""
    return Written(lambda q, k, v: weighted(masked(logits(q, k) * D**0.5).softmax(-1), v))


def padding():
    return torch.zeros(2, 1, 1, S)


LOGITS = {
    "two masks": lambda w: w * D**-0.5 + LOW + padding(),
    "a mask and a filler": lambda w: (w * D**-0.5 + padding()).masked_fill(LATER, -1e9),
    "the mask before the scale": lambda w: (w + LOW) * D**-0.5,
    "a filler before the scale": lambda w: w.masked_fill(LATER, float("-inf")) / D**0.5,
    "a mask taken away": lambda w: w * D**-0.5 - (1.0 - SEEN) * 1e9,
    "times and minus, as in GPT-2": lambda w: w * D**-0.5 * SEEN - 1e10 * (1 - SEEN),
    "times and plus": lambda w: w * D**-0.5 * SEEN + (1 - SEEN) * -1e10,
    "a number for each query": lambda w: w * D**-0.5 + LOW + torch.ones(2, 1, S, 1),
}


@pytest.mark.parametrize(("name", "how"), crossed([*LOGITS], HOWS))
def test_masks_come_in_any_order(name, how):
    assert_kept(with_logits(LOGITS[name]), how)


def test_two_masks_hide_what_either_hides():
    """The first tokens of a row are padding: they go first."""
    hidden = torch.zeros(2, 1, 1, S)
    hidden[0, ..., :10] = -1e9

    def by_sdpa(q, k, v):
        q, k, v = heads_first(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, LOW + hidden, enable_gqa=True)

    (_, expected, _), report = rewrite(Written(by_sdpa), "export")
    assert report.rewritten == 1
    assert not torch.equal(expected, kept_by_sdpa()[0])
    for how in HOWS:
        added = with_logits(lambda w: w * D**-0.5 + LOW + hidden)
        (_, kept, _), report = rewrite(added, how)
        assert report.rewritten == 1
        assert torch.equal(kept, expected)


MORE_IN_THE_LOGITS = {
    "another factor for each key": lambda w: w * D**-0.5 * torch.linspace(0.5, 1.5, S) + LOW,
    "factors that hide nothing": lambda w: w * D**-0.5 * SEEN - 10.0 * (1 - SEEN) + LOW,
    "other factors than those hidden": lambda w: w * D**-0.5 * SEEN - 1e10 * (1 - SEEN.T) + LOW,
    "a filler too small before the scale": lambda w: w.masked_fill(LATER, -1e4) * D**-0.5,
    "a product in the place of a mask": lambda w: w * D**-0.5 + w @ LOW.exp() + LOW,
}


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", MORE_IN_THE_LOGITS)
def test_what_looks_like_a_mask_and_is_none_is_refused(name, how):
    assert_left(with_logits(MORE_IN_THE_LOGITS[name]), how, "more than a scaled product and masks")


def transposed(t):
    return t.permute(0, 2, 3, 1)


STORES = {
    "[B, S, G, D]": (lambda k, v: (k, v), lambda k, v: heads_first(k, v)),
    "keys [B, G, D, S]": (
        lambda k, v: (transposed(k), v.transpose(1, 2)),
        lambda k, v: (k.mT, v),
    ),
    "both [B, G, D, S], copied": (
        lambda k, v: (transposed(k).contiguous(), transposed(v).contiguous()),
        lambda k, v: (k.mT, v.mT),
    ),
    "[2, B, G, S, D]": (
        lambda k, v: (torch.stack(heads_first(k, v)),),
        lambda kv: kv.unbind(0),
    ),
    "[B, S, 2, G, D]": (
        lambda k, v: (torch.stack([k, v], dim=2),),
        lambda kv: heads_first(*kv.unbind(2)),
    ),
    "[B, G, S, 2 * D]": (
        lambda k, v: (torch.cat(heads_first(k, v), -1),),
        lambda kv: kv.chunk(2, -1),
    ),
    "[B * G, S, D]": (
        lambda k, v: [t.reshape(-1, S, D) for t in heads_first(k, v)],
        lambda k, v: [t.view(-1, G, *t.shape[1:]) for t in (k, v)],
    ),
    "[B, S, G * D]": (
        lambda k, v: (k.flatten(2), v.flatten(2)),
        lambda k, v: [t.unflatten(2, (G, D)).transpose(1, 2) for t in (k, v)],
    ),
    "double precision": (
        lambda k, v: [t.double() for t in heads_first(k, v)],
        lambda k, v: (k.float(), v.float()),
    ),
}


@pytest.mark.parametrize(("name", "how"), crossed([*STORES], HOWS))
@pytest.mark.parametrize("attend", [einsum_tokens_first, slow(heads_in_the_batch)])
def test_what_is_returned_keeps_its_layout(name, attend, how):
    store, as_heads_first = STORES[name]
    module = Written(attend, store)
    assert_kept(module, how, as_heads_first)
    results, _ = rewrite(module, how)
    with torch.no_grad():
        whole = module(X.clone())
    for kept, full in zip(results[1:], whole[1:], strict=True):
        assert kept.dtype == full.dtype
        assert kept.numel() == full.numel() // 2
        assert kept.is_contiguous() or not full.is_contiguous()


class OfOneTensor(Written):
    """Keys and values are halves of one tensor, and that is returned."""

    def __init__(self, halves, dims=(2, -1, G, D)):
        super().__init__(None)
        self.halves, self.dims = halves, dims

    def forward(self, x):
        q = self.q(x).view(2, S, H, D).transpose(1, 2)
        kv = torch.stack([self.k(x), self.v(x)], 2) * 0.5
        kv = kv.view(2, S, 2, G, D).permute(2, 0, 3, 1, 4) * 2.0
        k, v = self.halves(kv)
        return F.scaled_dot_product_attention(q, k, v, ~LATER, enable_gqa=True), kv


HALVES = {
    "unbind": lambda kv: kv.unbind(0),
    "numbers": lambda kv: (kv[0], kv[1]),
    "slices": lambda kv: (kv[:1].squeeze(0), kv[1:].squeeze(0)),
    "select": lambda kv: (kv.select(0, 0), kv.select(0, 1)),
}


@pytest.mark.parametrize(("name", "how"), crossed([*HALVES], HOWS))
def test_halves_of_one_tensor(name, how):
    (_, kv), report = rewrite(OfOneTensor(HALVES[name]), how)
    assert report.rewritten == 1, str(report)
    assert kv.shape == (2, 2, G, S // 2, D)
    module = OfOneTensor(HALVES[name]).eval()
    with torch.no_grad():
        full = module(X)[1]
    for row in range(2):
        key, value = (full[half, row].transpose(0, 1) for half in (0, 1))
        kept = [int((key == k).all((-1, -2)).nonzero()) for k in kv[0, row].transpose(0, 1)]
        assert kept == sorted(set(kept))
        assert torch.equal(kv[1, row].transpose(0, 1), value[kept])


def again(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, ~LATER, enable_gqa=True)


def test_layers_in_one_tensor():
    (_, stored), report = rewrite(TwoLayers(again), "export")
    assert report.rewritten == 2, str(report)
    assert stored.shape == (2, 2, 2, G, S // 2, D)


def test_one_tensor_with_a_layer_that_stays_whole_stays_whole():
    results, report = rewrite(TwoLayers(lambda q, k, v: q), "export")
    assert report.rewritten == 0
    assert "in one tensor with others" in report.sites[0].reason
    assert results[1].shape == (2, 2, 2, G, S, D)


def test_uneven_layers_in_one_tensor_are_refused():
    config = StarKVConfig(budget=0.5, policy="pyramidkv")
    graph = capture(TwoLayers(again), X, how="export")
    report = Pipeline(config).run(graph, cache="caller")
    assert report.rewritten == 0
    assert "in one tensor" in report.sites[0].reason


@pytest.mark.slow
def test_any_length():
    """Lengths and rows stay symbols, whatever the layout."""

    class AnyLength(Written):
        def forward(self, x):
            n = x.shape[1]
            q = self.q(x).view(-1, n, G, R, D)
            k, v = (f(x).view(-1, n, G, D) for f in (self.k, self.v))
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            weights = torch.einsum("bsgrd,blgd->bgrsl", q, k) * D**-0.5
            weights.masked_fill_(later, float("-inf"))
            y = torch.einsum("bgrsl,blgd->bsgrd", weights.softmax(-1), v)
            return y.reshape(x.shape[0], n, -1), torch.stack([k, v], 1)

    for how in ("export", "core"):
        graph = capture(AnyLength(None), X, how=how, dynamic=True)
        assert apply(graph, CONFIG).rewritten == 1
        for rows, tokens in ((2, S), (3, 60)):
            x = torch.randn(rows, tokens, X.shape[2])
            fixed = capture(AnyLength(None), x, how="export")
            apply(fixed, CONFIG)
            y, kv = graph(x)
            assert kv.shape == (rows, 2, tokens // 2, G, D)
            torch.testing.assert_close(y, AnyLength(None)(x)[0])
            assert torch.equal(kv, fixed(x)[1])


@pytest.mark.parametrize("attend", [einsum_in_groups, groups_by_broadcast, einsum_tokens_first])
def test_decoding_is_counted_in_every_form(attend, monkeypatch):
    class Step(Written):
        def forward(self, x, k, v):
            q = self.q(x).view(1, 1, H, D)
            if attend is einsum_tokens_first:
                k, v = (t.repeat_interleave(R, dim=2) for t in (k, v))
                weights = torch.einsum("nqhc,nkhc->nhqk", q, k).softmax(-1)
                return torch.einsum("nhqk,nkhc->nqhc", weights, v), k, v
            q, (k, v) = q.transpose(1, 2).reshape(1, G, R, 1, D), heads_first(k, v)
            if attend is einsum_in_groups:
                weights = torch.einsum("bgrsd,bgld->bgrsl", q, k).softmax(-1)
                return torch.einsum("bgrsl,bgld->bgrsd", weights, v), k, v
            return (q @ k[:, :, None].mT).softmax(-1) @ v[:, :, None], k, v

    inputs = torch.randn(1, 1, X.shape[2]), torch.randn(1, S, G, D), torch.randn(1, S, G, D)
    for how in ("dynamo", "export", "core"):
        torch.compiler.reset()
        report = apply(capture(Step(None), *inputs, how=how), CONFIG)
        assert (report.found, report.decode_sites) == (0, 1), (how, str(report))


class PairedRotary(torch.nn.Module):
    """As many KV heads as query heads, whose elements are rotated in pairs, as in GPT-J."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (torch.nn.Linear(X.shape[2], H * D) for _ in range(3))
        self.attend = attend

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        turn = torch.arange(S)[:, None] * torch.arange(D // 2)
        q, k = (paired(t, turn.cos(), turn.sin()) for t in (q, k))
        return self.attend(q, k, v), k, v


def paired(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def spelled(q, k, v):
    return (q @ k.mT * D**-0.5).masked_fill(LATER, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("how", HOWS)
def test_queries_are_told_from_heads_where_pairs_of_elements_are_rotated(how):
    (_, *ours), report = rewrite(PairedRotary(spelled), how)
    assert report.rewritten == 1, str(report)
    by_sdpa = PairedRotary(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ~LATER))
    (_, *theirs), _ = rewrite(by_sdpa, how)
    assert all(map(torch.equal, ours, theirs))
