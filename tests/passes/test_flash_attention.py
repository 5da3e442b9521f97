"""FlashAttention as transformers calls it, by stand-ins for its ops: same schemas, run by SDPA."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as library

import starkv_compile
from starkv_compile.hf.packed_rows import is_packed, known_as_unpacked
from starkv_compile.kernels.ops import STARKV
from starkv_compile.passes import apply
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import slow
from tests.support.one_layer import CONFIG, Attention, D, G, H, S, X, capture

OPS = torch.library.Library("starkv_test_flash_attn2", "DEF")
OPS.define(
    "fwd(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
    "bool return_softmax) -> (Tensor, Tensor)"
)
OPS.define(
    "varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal) -> Tensor"
)
HUB = torch.library.Library("_starkv_test_flash_attn3_1a2b", "DEF")  # named as by the hub
HUB.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? cu_seqlens_q, Tensor? page_table, "
    "float? softmax_scale, bool is_causal, SymInt window_size_left, SymInt window_size_right, "
    "SymInt attention_chunk, float softcap, SymInt num_splits, bool? pack_gqa, Tensor? s_aux) "
    "-> (Tensor, Tensor)"
)


def attend(q, k, v, scale, causal):
    """(out [B, S, H, D], log-sum-exp [B, H, S]); the last query sees the last key."""
    rows, keys = q.shape[1], k.shape[1]
    mask = None
    if causal and rows != keys:
        mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        mask = torch.zeros(rows, keys, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous(), log_sum_exp


def forward(q, k, v, dropout_p, softmax_scale, causal, *more):
    return attend(q, k, v, softmax_scale, causal)


def forward_of_hub(q, k, v, k_new, cu_seqlens, page_table, softmax_scale, is_causal, *more):
    return attend(q, k, v, softmax_scale, is_causal)


def forward_end_to_end(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, causal):
    ends = [t.tolist() for t in (cu_seqlens_q, cu_seqlens_k)]
    parts = []
    for i in range(len(ends[0]) - 1):
        query, *rest = (
            t[None, n[i] : n[i + 1]] for t, n in ((q, ends[0]), (k, ends[1]), (v, ends[1]))
        )
        parts.append(attend(query, *rest, scale, causal)[0][0])
    return torch.cat(parts)


def shapes(q, *more):
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float)


OPS.impl("fwd", forward, "CPU")
OPS.impl("varlen_fwd", forward_end_to_end, "CPU")
HUB.impl("fwd", forward_of_hub, "CPU")
torch.library.register_fake("starkv_test_flash_attn2::fwd", shapes)
torch.library.register_fake("_starkv_test_flash_attn3_1a2b::fwd", shapes)
torch.library.register_fake(
    "starkv_test_flash_attn2::varlen_fwd", lambda q, *more: torch.empty_like(q)
)


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    return torch.ops.starkv_test_flash_attn2.fwd(
        q, k, v, 0.0, softmax_scale, causal, *window_size, softcap, alibi_slopes, False
    )[0]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    return torch.ops.starkv_test_flash_attn2.varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    )


@pytest.fixture
def flash_attention_2(monkeypatch):
    """transformers finds the stand-ins where it would find the package."""
    functions = flash_attn_func, flash_attn_varlen_func, None, library._pad_input
    functions = (*functions, library._unpad_input)
    monkeypatch.setattr(library, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_process_with_kvcache_kwargs_fn",
    ):
        if hasattr(library, name):  # transformers 5.17 lacks the last one
            monkeypatch.setattr(library, name, getattr(library, name))
    library.lazy_import_flash_attention("flash_attention_2")


def model_with(implementation):
    model = tiny_model("llava").bfloat16()
    model.model.language_model.config._attn_implementation = implementation
    return model


def inputs_of(*prompts):
    inputs = tiny_inputs("llava", *prompts)
    return {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}


@pytest.mark.parametrize("rows", [slow(1), slow(2, ci=True)])
def test_a_model_keeps_the_same_tokens_as_with_sdpa(rows, flash_attention_2):
    inputs, caches = inputs_of(*(TinyPrompt(seed=i) for i in range(rows))), []
    for implementation in ("flash_attention_2", "sdpa"):
        torch._dynamo.utils.counters.clear()
        model = model_with(implementation)
        starkv_compile.compile(model, budget=0.3, inner="eager")
        caches.append(generate(model, inputs).past_key_values)
        graphs = starkv_compile.report(model).prompt_graphs
        assert sum(graph.rewritten for graph in graphs) == 2
        if transformers.__version__.startswith("5.17."):  # it looks at the mask's values
            continue
        (graph,) = graphs
        assert {site.form for site in graph.sites} == {implementation.split("_")[0]}
        assert not torch._dynamo.utils.counters["graph_break"]
    for flash, sdpa in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(flash.kept, sdpa.kept)
        torch.testing.assert_close(flash.keys, sdpa.keys)
    assert library._is_packed_sequence.__module__ == library.__name__, "given back"


@pytest.mark.slow
def test_padded_batches_are_left_whole_with_the_way_out(flash_attention_2):
    inputs = inputs_of(TinyPrompt(), TinyPrompt(text=14, seed=1))
    expected = generate(model_with("flash_attention_2"), inputs)
    model = model_with("flash_attention_2")
    starkv_compile.compile(model, budget=0.3, inner="eager")
    with pytest.warns(UserWarning, match="padded or packed prompts"):
        output = generate(model, inputs)
    assert torch.equal(output.sequences, expected.sequences)


def test_packed_sequences_are_left_whole_with_the_way_out(flash_attention_2):
    positions = torch.tensor([[*range(20), *range(12)]])
    ids = torch.randint(5, 180, (1, 32))
    model = model_with("flash_attention_2")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(input_ids=ids, position_ids=positions).logits
        starkv_compile.compile(model, budget=0.3, inner="eager")
        with pytest.warns(UserWarning, match="packed into one row"):
            logits = model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(logits, expected)


def test_what_counts_as_packed():
    again = torch.tensor([[0, 1, 2, 0, 1]])
    assert is_packed(again, None)
    assert is_packed(again, torch.ones(1, 5))
    assert not is_packed(again, torch.tensor([[0, 0, 0, 1, 1]])), "padding has positions too"
    assert not is_packed(again.expand(2, -1), None)
    assert not is_packed(again.expand(3, 1, -1), None), "M-RoPE"
    assert not is_packed(torch.arange(5, 10)[None], None)


def call(q, k, v, **more):
    options = {"softmax_scale": D**-0.5, "causal": True, **more}
    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)


def call_of_hub(q, k, v, k_new=None, s_aux=None):
    q, k, v = (t.permute(0, 2, 1, 3).contiguous() for t in (q, k, v))
    return torch.ops._starkv_test_flash_attn3_1a2b.fwd(
        q, k, v, k_new, None, None, None, True, -1, 0, 0, 0.0, 2, None, s_aux
    )[0]


class Layer(Attention):
    def __init__(self, attend):
        super().__init__("flash")
        self.attend = attend

    def flash(self, q, k, v, mask):
        return self.attend(q, k, v)


@pytest.mark.parametrize("how", ["export", "core"])
@pytest.mark.parametrize("attend", [call, call_of_hub])
def test_ops_keep_the_same_tokens_and_share_their_log_sum_exp(attend, how):
    graph = capture(Layer(attend), X, how=how)
    assert apply(graph, CONFIG).rewritten == 1
    (scores,) = (n for n in graph.graph.nodes if n.target is STARKV.window_attention)
    assert "flash_attn" in str(scores.args[-1].args[0].target)
    sdpa = capture(Attention(), X, how="export")
    apply(sdpa, CONFIG)
    assert torch.equal(graph(X)[1], sdpa(X)[1])


def test_a_later_turn_is_aligned_to_the_last_key():
    class Turn(nn.Module):
        def __init__(self, flash):
            super().__init__()
            self.flash = flash

        def forward(self, q, k, v, old_k, old_v):
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            if self.flash:
                return call(q, k, v), k, v
            seen = torch.ones(S, 2 * S, dtype=torch.bool).tril(S)
            return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True), k, v

    tensors = [torch.randn(1, n, S, D) for n in (H, G, G, G, G)]
    kept = []
    for flash in (True, False):
        graph = capture(Turn(flash), *tensors, how="export")
        assert apply(graph, CONFIG).rewritten == 1
        kept.append(graph(*tensors)[1])
    assert torch.equal(*kept)


def tokens_first(q, k, v):
    q, k, v = (t.transpose(1, 2) * 2.0 for t in (q, k, v))
    return flash_attn_func(q, k, v * 0.5, softmax_scale=D**-0.5 / 4, causal=True)


@pytest.mark.parametrize("how", ["export", "core"])
def test_queries_and_keys_need_not_be_transposed_ones(how):
    class TokensFirst(Attention):
        def forward(self, x, mask=None):
            q, k, v = (f(x).unflatten(-1, (-1, D)) for f in (self.q, self.k, self.v))
            k = k * 0.5 + torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1)
            return flash_attn_func(q, k, v, softmax_scale=D**-0.5, causal=True), k, v

    kept = []
    for module in (Layer(tokens_first), Layer(call), TokensFirst()):
        graph = capture(module, X, how=how)
        assert apply(graph, CONFIG).rewritten == 1
        kept.append(graph(X)[1])
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2].transpose(1, 2), kept[1])


REFUSED = {
    "a sliding window": (lambda *t: call(*t, window_size=(7, 0)), "window_size_left"),
    "a window to the right": (
        lambda *t: call(*t, causal=False, window_size=(-1, 0)),
        "window_size_right",
    ),
    "a window of one": (lambda *t: call(*t, window_size=(0, -1)), "window_size_left"),
    "a soft cap": (lambda *t: call(*t, softcap=30.0), "softcap"),
    "slopes": (lambda *t: call(*t, alibi_slopes=torch.ones(H)), "alibi_slopes"),
    "a sink": (lambda *t: call_of_hub(*t, s_aux=torch.ones(H)), "s_aux"),
    "new keys of its own": (lambda q, k, v: call_of_hub(q, k, v, k_new=k), "k_new"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_switched_on_is_refused_by_name(name):
    attend, reason = REFUSED[name]
    report = apply(capture(Layer(attend), X, how="export"), CONFIG)
    assert (report.found, report.rewritten) == (1, 0)
    assert reason in report.sites[0].reason
    assert 'attn_implementation="sdpa"' in report.sites[0].reason


def test_calls_of_two_threads_give_the_library_its_question_back():
    before = library._is_packed_sequence
    first, second = known_as_unpacked(True), known_as_unpacked(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert library._is_packed_sequence is not before
    second.__exit__(None, None, None)
    assert library._is_packed_sequence is before
