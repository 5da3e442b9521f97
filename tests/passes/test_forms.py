"""Every form of attention, in every kind of graph: found, compacted, and scored alike."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from starkv_compile.kernels.ops import STARKV
from starkv_compile.passes import Pipeline, apply, forms
from starkv_compile.passes.forms.kernels import FLASH, KERNELS
from tests.support.crossing import slow
from tests.support.marked_layer import MarkedLayer, marked_inputs
from tests.support.one_layer import CONFIG, Attention, D, G, H, S, X, capture, repeat_kv

aten = torch.ops.aten
SDPA = ("sdpa", "interleave", "repeat_kv")
SPELLED_OUT = ("eager", "filled", "chosen", "folded")
SEEN = torch.ones(S, S, dtype=torch.bool).tril()
MASKS = {
    "causal": None,
    "bool": SEEN,
    "additive": torch.zeros(2, 1, S, S).masked_fill(~SEEN, float("-inf")),
}


def targets(graph):
    return [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("how", ["dynamo", "export", "core"])
@pytest.mark.parametrize("form", SDPA + SPELLED_OUT)
def test_each_form_is_found_and_compacted(form, how):
    module = Attention(form)
    graph = capture(module, X, how=how)
    report = apply(graph, CONFIG)
    assert (report.found, report.rewritten) == (1, 1), str(report)
    assert report.sites[0].note is None, "the key projection's input was found"
    for op in (STARKV.window_attention, STARKV.star_scores, STARKV.select_tokens):
        assert sum(target in (op, op.default) for target in targets(graph)) == 1
    if how == "dynamo":
        return  # its parameters are inputs; running it is the backend's business
    y, key, value = graph(X)
    full = module(X)
    if how == "export":
        assert torch.equal(y, full[0]), "attention itself is untouched"
    torch.testing.assert_close(y, full[0])
    assert key.shape == value.shape == (2, G, S // 2, D)
    for row in range(2):
        original = full[1][row].transpose(0, 1)
        kept = [int((original == k).all((-1, -2)).nonzero()[0]) for k in key[row].transpose(0, 1)]
        assert kept == sorted(set(kept))
        assert kept[-8:] == list(range(S - 8, S))


def kept_by(form, mask=None, **how):
    """The kept keys of one layer in that form."""
    graph = capture(Attention(form), X, mask, **how)
    report = apply(graph, CONFIG)
    assert report.rewritten == 1, str(report)
    return graph(X, mask)[1]


@pytest.mark.parametrize("how", ["export", slow("core", ci=True)])
def test_forms_keep_the_same_tokens(how):
    expected = kept_by("sdpa", how="export")
    for form in SDPA + SPELLED_OUT:
        assert torch.equal(kept_by(form, how=how), expected), form


@pytest.mark.parametrize("how", ["export", "core", "steps", "kernel"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_keep_the_same_tokens(mask, how):
    expected = kept_by("sdpa", how="export")
    assert torch.equal(kept_by("sdpa", MASKS[mask], how=how), expected)


def test_a_mask_of_its_own_decides_in_decomposed_graphs_as_well():
    """Keys that the window does not see are the first to go, whatever hides them."""
    mask = SEEN.clone()
    mask[:, 3:12] = torch.eye(S, dtype=torch.bool)[:, 3:12]
    expected = kept_by("sdpa", mask, how="export")
    assert not torch.equal(expected, kept_by("sdpa", how="export"))
    for how in ("core", "steps", "kernel"):
        assert torch.equal(kept_by("sdpa", mask, how=how), expected), how


@pytest.mark.parametrize("how", ["core", "kernel"])
def test_decomposed_graphs_of_any_length(how):
    graph = capture(Attention(), X, how=how, dynamic=True)
    assert apply(graph, CONFIG).rewritten == 1
    for rows, tokens in ((2, S), (3, 60)):
        x = torch.randn(rows, tokens, X.shape[2])
        fixed = capture(Attention(), x, how="export")
        apply(fixed, CONFIG)
        for left, right in zip(graph(x)[1:], fixed(x)[1:], strict=True):
            assert torch.equal(left, right)


def test_softmax_in_steps_is_in_the_graph_that_was_read():
    graph = capture(Attention(), X, how="steps")
    assert aten._softmax.default not in targets(graph)
    assert {aten.exp.default, aten.sum.dim_IntList, aten.div.Tensor} <= set(targets(graph))


def test_half_precision_decomposed():
    """SDPA's own formula computes in float32, so casts stand between keys and product."""
    module, x = Attention().bfloat16(), X.bfloat16()
    kept = []
    for how in ("export", "core"):
        graph = capture(module, x, how=how)
        assert apply(graph, CONFIG).rewritten == 1
        kept.append(graph(x)[1])
    assert kept[0].dtype == torch.bfloat16
    assert torch.equal(*kept)


@pytest.mark.parametrize("how", ["core", "kernel"])
def test_decomposed_encoders_and_decoding_are_left(how):
    report = apply(capture(Attention("bidirectional"), X, how=how), CONFIG)
    assert (report.found, report.encoder_sites) == (0, 1)
    report = apply(capture(Attention(), X[:, :1], how=how), CONFIG)
    assert (report.found, report.decode_sites) == (0, 1)


def test_the_kernels_log_sum_exp_is_shared():
    graph = capture(Attention(), X, how="kernel")
    apply(graph, CONFIG)
    (kernel,) = (node for node in graph.graph.nodes if node.target in FLASH)
    (scores,) = (node for node in graph.graph.nodes if node.target is STARKV.window_attention)
    assert scores.args[-1].args == (kernel, 1)
    assert torch.equal(graph(X)[1], kept_by("eager", how="export")), "as in two passes"


CUDA = {
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True),
    "padded": lambda q, k, v: aten._scaled_dot_product_flash_attention(
        *(nn.functional.pad(t, (0, 8)) for t in (q, k, v)), 0.0, True, scale=0.25
    ),
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(
        q, repeat_kv(k), repeat_kv(v), None, True, 0.0, True
    ),
    "efficient, mask": lambda q, k, v: aten._scaled_dot_product_efficient_attention(
        q, repeat_kv(k), repeat_kv(v), q.new_zeros(2, H, S, S), False
    ),
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, False, 0.0, True
    ),
    "another device's": lambda q, k, v: aten._scaled_dot_product_fused_attention_overrideable(
        q, k, v, None, 0.0, True
    ),
}


@pytest.mark.parametrize("name", CUDA)
def test_kernels_of_other_devices(name):
    """Their calls on tensors that only pretend to be on a GPU: nothing is computed."""

    class Kernel(nn.Module):
        def forward(self, q, k, v):
            return CUDA[name](q, k, v)[0], k, v

    with FakeTensorMode():
        device = "meta" if name == "another device's" else "cuda"
        q, k, v = (torch.empty(2, n, S, D, dtype=torch.half, device=device) for n in (H, G, G))
    graph = torch.export.export(Kernel(), (q, k, v)).module()
    attention = next(found for node in graph.graph.nodes if (found := forms.read(node)))
    assert attention.node.target in KERNELS
    inputs = graph.graph.find_nodes(op="placeholder")
    assert [attention.query, attention.key.node, attention.value.node] == inputs
    assert attention.causal is (attention.mask is None)
    assert attention.scale == 0.25
    pipeline = Pipeline(CONFIG)
    report = pipeline.run(graph, cache="caller")
    assert report.rewritten == 1, str(report)
    (share,) = (step for step in pipeline.passes if step.name == "ShareLogSumExp")
    assert share.matched == (name in ("flash", "padded"))


def alibi():
    """[1, H, S, S]: the further a key, the less, another slope for each head; later keys hidden."""
    distance = torch.arange(S)[:, None] - torch.arange(S)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.02])[:, None, None]
    return (-slopes * distance).masked_fill(~SEEN, float("-inf"))[None]


class Biased(Attention):
    def spelled_out(self, q, k, v, mask):
        return (q @ repeat_kv(k).mT * D**-0.5 + mask).softmax(-1) @ repeat_kv(v)


def test_a_bias_of_each_head_is_scored_where_the_caller_looks_after_it():
    mask, kept = alibi(), []
    for form, how in (("sdpa", "export"), ("spelled_out", "export"), ("sdpa", "core")):
        graph = capture(Biased(form), X, mask, how=how)
        assert apply(graph, CONFIG).rewritten == 1
        kept.append(graph(X, mask)[1])
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept_by("sdpa", how="export")), "it matters"


def test_a_bias_of_each_head_is_refused_where_decoding_would_compute_it_for_other_places():
    graph = capture(MarkedLayer(), X, marked_inputs(), alibi())
    report = Pipeline(CONFIG).run(graph, cache="marked")
    assert "ALiBi" in report.sites[0].reason


LOOK_ALIKES = {
    "a softmax over the queries": (lambda q, k, v: (q @ repeat_kv(k).mT).softmax(-2), None),
    "a filler that hides nothing": (
        lambda q, k, v: (q @ repeat_kv(k).mT).masked_fill(~SEEN, -1.0).softmax(-1),
        "more than a scaled product and masks",
    ),
    "a soft cap": (
        lambda q, k, v: (torch.tanh(q @ repeat_kv(k).mT / 50) * 50).softmax(-1),
        "soft-capped",
    ),
    "a sink": (
        lambda q, k, v: torch.cat([q @ repeat_kv(k).mT, torch.zeros(2, H, S, 1)], -1).softmax(-1)[
            ..., :-1
        ],
        "sink",
    ),
    "a bias by baddbmm, as Bloom's": (
        lambda q, k, v: (
            torch.zeros(2 * H, 1, S)
            .baddbmm(q.reshape(-1, S, D), repeat_kv(k).reshape(-1, S, D).mT, alpha=0.25)
            .view(2, H, S, S)
            .add(MASKS["additive"])
            .softmax(-1)
        ),
        "baddbmm",
    ),
    "a choice that is no safeguard": (
        lambda q, k, v: torch.where(SEEN, torch.zeros(()), (q @ repeat_kv(k).mT).softmax(-1)),
        "changed between softmax and values",
    ),
}


@pytest.mark.parametrize("how", ["dynamo", "export"])
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left(name, how):
    weights, reason = LOOK_ALIKES[name]

    class LookAlike(Attention):
        def odd(self, q, k, v, mask):
            return weights(q, k, v) @ repeat_kv(v)

    report = apply(capture(LookAlike("odd"), X, how=how), CONFIG)
    assert report.rewritten == 0
    assert report.found == (reason is not None)
    if reason is not None:
        assert reason in report.sites[0].reason


def test_what_is_cached_counts_not_what_it_was_made_of():
    """Repeated heads may be what a module caches: then each of them is a KV head."""

    class Repeated(Attention):
        def forward(self, x, mask=None):
            q, k, v = (
                f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            k, v = repeat_kv(k * 2.0), repeat_kv(v)
            return self.sdpa(q, k, v, mask), k, v

    for how in ("export", "core", "kernel"):
        graph = capture(Repeated(), X, how=how)
        assert apply(graph, CONFIG).rewritten == 1, how
        assert graph(X)[1].shape == (2, H, S // 2, D)


def sets_of_heads(t):
    """[B, G, L, D] as [B, H, L, D] where head h is h % G, not h // (H // G)."""
    batch, groups, length, dim = t.shape
    t = t.unsqueeze(1).expand(batch, H // G, groups, length, dim)
    return t.reshape(batch, H, length, dim)


OTHER_REPEATS = {
    "sets": sets_of_heads,
    "sets, copied": lambda t: (
        t[:, None].expand(-1, H // G, -1, -1, -1).contiguous().view(2, H, S, D)
    ),
    "uneven": lambda t: t.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=H),
    "permuted": lambda t: t[:, [1, 0], None].expand(-1, -1, H // G, -1, -1).reshape(2, H, S, D),
}


@pytest.mark.parametrize("how", ["dynamo", "export", "core"])
@pytest.mark.parametrize("name", OTHER_REPEATS)
def test_heads_repeated_in_another_order_are_left(name, how):
    class Repeated(Attention):
        def repeated(self, q, k, v, mask):
            k, v = OTHER_REPEATS[name](k), OTHER_REPEATS[name](v)
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    report = apply(capture(Repeated("repeated"), X, how=how), CONFIG)
    assert (report.found, report.rewritten) == (1, 0), str(report)


def test_repeats_of_tokens_are_no_repeats_of_heads():
    class Longer(Attention):
        def longer(self, q, k, v, mask):
            k, v = (t.repeat_interleave(2, dim=-2) for t in (k, v))
            seen = SEEN.repeat_interleave(2, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    report = apply(capture(Longer("longer"), X), CONFIG)
    assert (report.found, report.rewritten) == (1, 0), str(report)


class Named(Attention):
    """Calls whose arguments are all given by name."""

    def forward(self, x, mask=None):
        q, k, v = (
            nn.functional.linear(input=x, weight=f.weight, bias=f.bias)
            .unflatten(-1, (-1, D))
            .transpose(dim0=1, dim1=2)
            for f in (self.q, self.k, self.v)
        )
        return getattr(self, self.form)(q, k, v, mask), k, v

    def repeats(self, q, k, v, mask):
        k, v = (torch.repeat_interleave(input=t, repeats=H // G, dim=-3) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)

    def product(self, q, k):
        k = torch.transpose(input=repeat_kv(k), dim0=2, dim1=3)
        return torch.mul(input=torch.matmul(input=q, other=k), other=D**-0.5)

    def filled(self, q, k, v, mask):
        weights = self.product(q, k).masked_fill(~SEEN, value=float("-inf"))
        return torch.matmul(other=repeat_kv(v), input=torch.softmax(input=weights, dim=-1))

    def chosen(self, q, k, v, mask):
        weights = self.product(q, k)
        weights = torch.where(input=weights, condition=SEEN, other=float("-inf"))
        return torch.softmax(input=weights, dim=-1) @ repeat_kv(v)

    def methods(self, q, k, v, mask):
        weights = (q @ repeat_kv(k).permute(dims=(0, 1, 3, 2))).mul(other=D**-0.5)
        return weights.where(SEEN, torch.full([], float("-inf"))).softmax(dim=-1) @ repeat_kv(v)


@pytest.mark.parametrize("form", ["repeats", "filled", "chosen", "methods"])
def test_arguments_given_by_name(form):
    reports = []

    def backend(graph, _):  # export would put them into their places
        reports.append(apply(graph, CONFIG))
        return graph

    kept = torch.compile(Named(form).eval(), backend=backend, fullgraph=True)(X)[1]
    assert [report.rewritten for report in reports] == [1], str(reports[0])
    assert reports[0].sites[0].note is None, "the key projection's input was found"
    expected = capture(Named("sdpa"), X, how="export")
    apply(expected, CONFIG)
    assert torch.equal(kept, expected(X)[1])
