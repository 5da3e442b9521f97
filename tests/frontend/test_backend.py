"""The backend on its own: plain functions, faults, modes, and the hook in Dynamo."""

import pytest
import torch
from torch.nn import functional as F

import starkv_compile
from starkv_compile import OptionError
from starkv_compile.kernels import compiling
from starkv_compile.reporting import GraphReport, Report, SiteReport, readable_bytes
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import slow

Q, K, V = (torch.randn(1, 2, 40, 16) for _ in range(3))


def attend(q, k, v):
    k, v = k * 1.5, v * 1.5
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor", ci=True)])
def test_plain_function(inner):
    options = {"budget": 0.25, "inner": inner, "shorten_outputs": True}
    compiled = torch.compile(attend, backend="starkv", options=options, fullgraph=True)
    out, key, value = compiled(Q, K, V)
    torch.testing.assert_close(out, attend(Q, K, V)[0])
    assert key.shape == value.shape == (1, 2, 10, 16)
    report = starkv_compile.last_report()
    assert (report.found, report.rewritten) == (1, 1)
    assert "all are scored as text" in report.notes[0]


def test_mode_goes_to_inductor_and_to_nothing_else():
    with pytest.warns(UserWarning, match="left a compiled graph uncompressed"):
        out = torch.compile(attend, backend="starkv", mode="max-autotune-no-cudagraphs")(Q, K, V)
    torch.testing.assert_close(out, attend(Q, K, V))
    torch._dynamo.reset()
    with pytest.raises(OptionError, match="'nonsense' is no option"):
        torch.compile(attend, backend="starkv", options={"nonsense": 1})


@pytest.mark.slow(ci=True)
def test_compiled_graphs_are_cached_by_the_kernels_source(monkeypatch, tmp_path):
    """Else an upgrade would go on running the kernels of the version before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = torch._dynamo.utils.counters["aot_autograd"]

    def misses():
        torch._dynamo.reset()
        before = found["autograd_cache_miss"]
        options = {"budget": 0.25, "shorten_outputs": True}
        torch.compile(attend, backend="starkv", options=options, fullgraph=True)(Q, K, V)
        return found["autograd_cache_miss"] - before

    assert [misses(), misses()] == [1, 0]
    monkeypatch.setattr(compiling, "source_fingerprint", lambda: "another version")
    assert misses() == 1


def test_a_fault_in_the_passes_costs_no_result(monkeypatch):
    def broken(self, context):
        raise KeyError("planted")

    monkeypatch.setattr("starkv_compile.passes.find_layout.FindLayout.run", broken)
    family = "qwen2_5_vl"
    inputs = tiny_inputs(family)
    expected = generate(tiny_model(family), inputs)
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    with pytest.warns(UserWarning, match="passes failed on a graph.*planted"):
        out = generate(model, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    assert "planted" in str(starkv_compile.report(model))
    assert out.past_key_values.layers[0].stored == out.past_key_values.get_seq_length()


def test_running_uncompiled_is_said(monkeypatch):
    """Where Dynamo gives up, the cache is whole and right; silence would be the fault."""
    model = starkv_compile.compile(tiny_model("llava"), budget=0.3, inner="eager")
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.warns(UserWarning, match="no compiled graph contains their cache write"),
    ):
        out = generate(model, tiny_inputs("llava"))
    assert out.past_key_values.layers[0].stored == out.past_key_values.get_seq_length()


def test_report_reads_well():
    model = starkv_compile.compile(tiny_model("llava"), budget=0.25, inner="eager")
    assert "call the model once" in str(starkv_compile.report(model))
    generate(model, tiny_inputs("llava"), tokens=1)
    text = str(starkv_compile.report(model))
    assert "2 of 2 attentions rewritten" in text
    assert "17 / 68" in text
    assert "(25.0%: " in text
    assert "frames taken as squares" in text


def test_graphs_that_are_alike_are_one_line_of_a_report():
    one, other = (
        GraphReport((SiteReport(0, "sdpa", "n", done, None if done else "a sink"),))
        for done in (True, False)
    )
    text = str(Report(graphs=[one, other, one]))
    assert text.splitlines() == [
        "prompt graph: 1 of 1 attentions rewritten (2 graphs alike)",
        "prompt graph: 0 of 1 attentions rewritten",
        "  sdpa at n: skipped: a sink",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(1023, "1023 bytes"), (1024, "1.0 KiB"), (5_800_000, "5.5 MiB"), (3 << 30, "3.00 GiB")],
)
def test_bytes_for_people(number, text):
    assert readable_bytes(number) == text


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "inner"), [(2, "eager"), (1, "inductor")])
def test_flex_attention_compresses_too(rows, inner):
    """Its mask is a function, evaluated for the window; with a padded row as well.

    Two rows under Inductor are left out: torch 2.13 generates C++ for them that does not compile,
    with or without starkv.
    """
    prompts = [TinyPrompt(), TinyPrompt(text=19, seed=3)][:rows]
    inputs, kept = tiny_inputs("llava", *prompts), []
    for form, how in (("sdpa", "eager"), ("flex_attention", inner)):
        model = tiny_model("llava")
        model.set_attn_implementation(form)
        policy = "snapkv_mean" if inner == "inductor" else "screen_novelty"  # compiles sooner
        starkv_compile.compile(model, budget=0.3, policy=policy, inner=how)
        out = generate(model, inputs, tokens=1 if inner == "inductor" else 3)
        assert starkv_compile.report(model).prompt_graphs[0].rewritten == 2
        kept.append([layer.kept for layer in out.past_key_values.layers])
    for left, right in zip(*kept, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (lambda x: F.softmax(torch.cat([x, x[..., :1]], -1), -1)[..., :-1], "a sink next to"),
        (lambda x: F.softmax(torch.tanh(x / 20) * 20, -1), "soft-capped"),
    ],
    ids=["sink", "soft cap"],
)
def test_attention_that_is_scored_otherwise_is_refused_by_name(tail, reason):
    def other(q, k, v):
        k, v = k * 1.5, v * 1.5
        return torch.matmul(tail(torch.matmul(q, k.transpose(2, 3)) * 0.25), v), k, v

    options = {"inner": "eager", "shorten_outputs": True}
    with pytest.warns(UserWarning, match=reason):
        out, key, _ = torch.compile(other, backend="starkv", options=options, fullgraph=True)(
            Q, K, V
        )
    torch.testing.assert_close(out, other(Q, K, V)[0])
    assert key.shape == K.shape
    assert reason in starkv_compile.last_report().sites[0].reason


@pytest.mark.slow(ci=True)
def test_eager_attention_compresses_too():
    family = "qwen2_5_vl"
    inputs, model = tiny_inputs(family), tiny_model(family)
    sdpa = generate(starkv_compile.compile(model, budget=0.3, inner="eager"), inputs)
    starkv_compile.undo(model)
    model.set_attn_implementation("eager")
    eager = generate(starkv_compile.compile(model, budget=0.3, inner="eager"), inputs)
    report = starkv_compile.report(model)
    assert {site.form for graph in report.prompt_graphs for site in graph.sites} == {"spelled out"}
    for left, right in zip(sdpa.past_key_values.layers, eager.past_key_values.layers, strict=True):
        assert torch.equal(left.kept, right.kept)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_default_backend"), reason="torch 2.11 has no default backend"
)
@pytest.mark.slow(ci=True)
def test_as_the_default_backend():
    """A model is compressed, and a function without a model is compiled as by the inner backend."""
    model, options = tiny_model("qwen2_vl"), {"budget": 0.2, "inner": "eager"}
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("starkv")
    try:
        output = generate(torch.compile(model, options=options), tiny_inputs("qwen2_vl"))
        doubled = torch.compile(lambda x: x + x, options={"inner": "eager"})(torch.ones(3))
    finally:
        torch.compiler.set_default_backend(before)
    (graph,) = starkv_compile.report(model).prompt_graphs
    assert graph.rewritten == 2
    assert output.past_key_values.layers[0].stored < output.sequences.shape[1] / 2
    assert doubled.tolist() == [2, 2, 2]
