"""Operations in place on what attention reads: read as what they do, or refused."""

import pytest
import torch
from torch.nn import functional as F

from starkv_compile.passes import apply
from tests.support.crossing import crossed
from tests.support.one_layer import CONFIG, D, G, H, S, X
from tests.support.written import (
    HOWS,
    LATER,
    LOW,
    Written,
    assert_kept,
    assert_left,
    heads_first,
    kept_by_sdpa,
    logits,
    repeated,
    weighted,
)


def masked_fill_(w):
    w.masked_fill_(LATER, float("-inf"))
    return w


def result_of_masked_fill_(w):
    return w.masked_fill_(LATER, -1e9)


def iadd(w):
    w += LOW
    return w


def add_(w):
    w.add_(LOW)
    return w


def sub_(w):
    w.sub_(-LOW)
    return w


def isub(w):
    w -= -LOW
    return w


def add_to_a_slice(w):
    w[:, :, :, :S] += LOW
    return w


def write_a_slice(w):
    w[..., :S] = w[..., :S] + LOW
    return w


def set_by_mask(w):
    w[:, :, LATER] = float("-inf")
    return w


def set_by_a_mask_of_every_head(w):
    w[LATER.expand_as(w)] = -1e9
    return w


def index_put_(w):
    w.index_put_((LATER.expand_as(w),), torch.tensor(-1e9))
    return w


def copy_(w):
    w.copy_(w + LOW)
    return w


def overwrite(w):
    w[:] = w + LOW
    return w


def add_out(w):
    torch.add(w, LOW, out=w)
    return w


def where_out(w):
    torch.where(LATER, torch.tensor(-1e9), w, out=w)
    return w


def through_a_view(w):
    w.view(-1, S, S).masked_fill_(LATER, -1e9)
    return w


def scale_in_place(w):
    w *= 4.0
    w.div_(4.0)
    return w.masked_fill_(LATER, -1e9)


MASKS = (
    masked_fill_,
    result_of_masked_fill_,
    iadd,
    add_,
    sub_,
    isub,
    add_to_a_slice,
    write_a_slice,
    set_by_mask,
    set_by_a_mask_of_every_head,
    index_put_,
    copy_,
    overwrite,
    add_out,
    where_out,
    through_a_view,
    scale_in_place,
)


def with_mask(mask):
    return Written(lambda q, k, v: weighted(mask(logits(q, k)).softmax(-1), v))


@pytest.mark.parametrize(("mask", "how"), crossed([*MASKS], HOWS))
def test_masks_put_in_in_place_are_scored(mask, how):
    assert_kept(with_mask(mask), how)


def halves(w):
    w[..., : S // 2] += LOW[:, : S // 2]
    w[..., S // 2 :] += LOW[:, S // 2 :]
    return w


def rows(w):
    w[:, :, S // 2 :] += LOW[S // 2 :]
    w[:, :, : S // 2] += LOW[: S // 2]
    return w


def one_key(w):
    w[..., 0] = 0.0
    return w.masked_fill(LATER, -1e9)


def transposed(w):
    w.mT.masked_fill_(LATER.T, -1e9)
    return w


def clamp_(w):
    w.clamp_(-5, 5)
    return w + LOW


PARTS = {
    halves: "changed in place through another view",
    rows: "changed in place through another view",
    one_key: "logits are",
    transposed: "changed in place through another view",
    clamp_: "more than a scaled product and masks",
}


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("mask", PARTS, ids=lambda mask: mask.__name__)
def test_what_changes_a_part_of_the_logits_is_refused(mask, how):
    assert_left(with_mask(mask), how, PARTS[mask])


@pytest.mark.parametrize("mask", [halves, rows, one_key], ids=lambda mask: mask.__name__)
def test_what_changes_a_part_is_refused_in_decomposed_graphs(mask):
    assert_left(with_mask(mask), "core", "more than a scaled product and masks")


def test_the_way_out_of_a_refusal_works_for_ones_own_module():
    """What the reason says: the same attention by scaled_dot_product_attention."""
    module = with_mask(halves)
    assert_left(module, "export", "torch.nn.functional.scaled_dot_product_attention")

    def by_sdpa(q, k, v):
        q, k, v = heads_first(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, LOW, enable_gqa=True)

    assert_kept(Written(by_sdpa), "export")


def queries_in_place(q, k, v):
    q = q.clone()
    q *= D**-0.5
    q, k, v = heads_first(q, k, v)
    return (q @ repeated(k).mT + LOW).softmax(-1) @ repeated(v)


def keys_in_place(q, k, v):
    q, k, v = heads_first(q, k, v)
    keys = repeated(k)
    keys.mul_(D**-0.5)
    return (q @ keys.mT + LOW).softmax(-1) @ repeated(v)


def dropout_in_place(q, k, v):
    weights = (logits(q, k) + LOW).softmax(-1)
    return weighted(F.dropout(weights, 0.1, False, inplace=True), v)


def hidden_weights_in_place(q, k, v):
    weights = logits(q, k).masked_fill(LATER, -1e9).softmax(-1)
    weights.masked_fill_(LATER, 0.0)
    return weighted(weights, v)


OPERANDS = (queries_in_place, keys_in_place, dropout_in_place, hidden_weights_in_place)


@pytest.mark.parametrize(("attend", "how"), crossed([*OPERANDS], HOWS))
def test_operands_and_weights_changed_in_place_are_scored(attend, how):
    assert_kept(Written(attend), how)


def halved_weights(q, k, v):
    weights = (logits(q, k) + LOW).softmax(-1)
    weights[..., 0] *= 0.5
    return weighted(weights, v)


def other_weights_hidden(q, k, v):
    weights = (logits(q, k) + LOW).softmax(-1)
    weights.masked_fill_(LATER.T, 0.0)
    return weighted(weights, v)


@pytest.mark.parametrize(("attend", "how"), crossed([halved_weights, other_weights_hidden], HOWS))
def test_weights_changed_after_the_softmax_are_refused(attend, how):
    assert_left(Written(attend), how, "changed between softmax and values")


class ChangedLater(Written):
    """Keys are changed after attention has read them: what is returned are others."""

    def forward(self, x):
        q, k, v = (f(x).view(x.shape[0], S, -1, D) for f in (self.q, self.k, self.v))
        y = weighted((logits(q, k) + LOW).softmax(-1), v)
        k.mul_(2.0)
        return y, k.transpose(1, 2), v.transpose(1, 2)


@pytest.mark.parametrize("how", HOWS)
def test_keys_changed_after_attention_has_read_them_stay_whole(how):
    assert_left(ChangedLater(None), how, "changes them afterwards")


class InHalves(Written):
    """Rotary embeddings written in place change no token's place."""

    def forward(self, x):
        q, k, v = (f(x).view(x.shape[0], S, -1, D) for f in (self.q, self.k, self.v))
        first, second = k[..., : D // 2].clone(), k[..., D // 2 :].clone()
        k = k * 0.5
        k[..., : D // 2] -= second
        k[..., D // 2 :] += first
        q, k, v = heads_first(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, ~LATER, enable_gqa=True), k, v


@pytest.mark.parametrize("how", HOWS)
def test_keys_turned_in_place_are_compacted(how):
    assert_kept(InHalves(None), how)


def test_a_program_that_was_saved_is_read_alike(tmp_path):
    """Its example values share no memory; the schemas say what a view is of."""
    program = torch.export.export(with_mask(add_to_a_slice).eval(), (X,))
    torch.export.save(program, tmp_path / "layer.pt2")
    graph = torch.export.load(tmp_path / "layer.pt2").module()
    assert apply(graph, CONFIG).rewritten == 1
    assert torch.equal(graph(X)[1], kept_by_sdpa()[0])
    program = torch.export.export(with_mask(halves).eval(), (X,))
    torch.export.save(program, tmp_path / "halves.pt2")
    report = apply(torch.export.load(tmp_path / "halves.pt2").module(), CONFIG)
    assert "changed in place" in report.sites[0].reason


MAX = 64


class InBuffers(Written):
    """Keys and values in buffers of the module: attention reads all slots, or those in use."""

    def __init__(self, write):
        super().__init__(None)
        self.write = write
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(2, G, MAX, D))

    def forward(self, x):
        q, k, v = heads_first(*(f(x).view(2, S, -1, D) for f in (self.q, self.k, self.v)))
        keys, values = self.write(self, k, v)
        seen = torch.ones(S, MAX, dtype=torch.bool).tril()[:, : keys.shape[2]]
        y = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
        return y, keys, values


def by_places(module, k, v):
    places = torch.arange(S)
    module.k_cache[:, :, places] = k
    module.v_cache[:, :, places] = v
    return module.k_cache, module.v_cache


def by_index_copy(module, k, v):
    module.k_cache.index_copy_(2, torch.arange(S), k)
    module.v_cache.index_copy_(2, torch.arange(S), v)
    return module.k_cache, module.v_cache


def by_slices(module, k, v):
    module.k_cache[:, :, :S] = k
    module.v_cache[:, :, :S].copy_(v)
    return module.k_cache[:, :, :S], module.v_cache[:, :, :S]


def of_its_own(module, k, v):
    keys, values = torch.zeros(2, G, MAX, D), torch.zeros(2, G, MAX, D)
    keys[:, :, :S] = k
    values[:, :, :S] = v
    return keys, values


def padded(module, k, v):
    return F.pad(k, (0, 0, 0, MAX - S)), F.pad(v, (0, 0, 0, MAX - S))


def joined(module, k, v):
    """The way out: cached and new tokens joined."""
    past = module.k_cache[:, :, :0], module.v_cache[:, :, :0]
    return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)


BUFFERS = {
    by_places: "a buffer of a fixed size",
    by_index_copy: "a buffer of a fixed size",
    by_slices: "a buffer of a fixed size",
    of_its_own: "written part by part",
    padded: "written part by part",
}


@pytest.mark.parametrize(("write", "how"), crossed([*BUFFERS], HOWS))
def test_buffers_of_ones_own_are_refused(write, how):
    module = InBuffers(write)
    assert_left(module, how, BUFFERS[write])


def test_the_way_out_of_buffers_works():
    assert H // G > 1
    graph = torch.export.export(InBuffers(joined).eval(), (X,)).module()
    assert apply(graph, CONFIG).rewritten == 1
    assert graph(X)[1].shape == (2, G, S // 2, D)
