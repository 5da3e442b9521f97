"""What the passes find, what they refuse and why, and what stands in the graph afterwards."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from starkv_compile import StarKVConfig
from starkv_compile.kernels.ops import STARKV
from starkv_compile.passes import PIPELINE, Pipeline, apply
from starkv_compile.passes.markers import arguments_of, find_markers
from tests.support.marked_layer import MarkedLayer, marked_inputs
from tests.support.one_layer import CONFIG, Attention, D, G, H, S, X, capture

EVERY_BACKEND = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def test_rewriting_twice_changes_nothing_more():
    graph = capture(Attention(), X, how="export")
    apply(graph, CONFIG)
    once = graph(X)
    report = apply(graph, CONFIG)
    assert report.rewritten == 0
    for left, right in zip(graph(X), once, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(S, S), (1, S, S), (1, 1, S, S), (2, H, S, S)], ids=str)
def test_masks_of_any_rank(shape):
    mask = torch.ones(S, S, dtype=torch.bool).tril().expand(shape).clone()
    graph = capture(Attention(), X, mask, how="export")
    report = apply(graph, CONFIG)
    assert report.rewritten == 1
    causal = capture(Attention(), X, how="export")
    apply(causal, CONFIG)
    assert torch.equal(graph(X, mask)[1], causal(X)[1])


@pytest.mark.parametrize("low", [float("-inf"), -1e9, -65504.0, -1e4])
def test_padding_is_not_real_whatever_number_hides_it(low):
    seen = torch.ones(S, S, dtype=torch.bool).tril().expand(2, 1, S, S).clone()
    seen[0, ..., : S - 10] = False
    additive = torch.zeros(seen.shape).masked_fill(~seen, low)
    kept = []
    for mask in (seen, additive, additive.bfloat16().float()):
        graph = capture(Attention(), X, mask, how="export")
        assert apply(graph, CONFIG).rewritten == 1
        kept.append(graph(X, mask)[1])
    assert torch.equal(kept[1], kept[0])
    assert torch.equal(kept[2], kept[0]), "-1e4 is -9984 in bfloat16"


@pytest.mark.parametrize("shape", [(H, S, S), (1, H, S, S)], ids=str)
@pytest.mark.parametrize("form", ["sdpa", "expanded"])
def test_a_bias_of_each_head_is_known_in_masks_of_any_rank(form, shape):
    class Expanded(MarkedLayer):
        def forward(self, x, given, mask):
            wide = mask.expand(2, H, S, S) if form == "expanded" else mask
            return super().forward(x, given, wide)

    graph = capture(Expanded(), X, marked_inputs(), torch.randn(shape))
    report = Pipeline(CONFIG).run(graph, cache="marked")
    assert "a different bias for each head" in report.sites[0].reason


def test_uncached_attention_is_refused_with_node_and_reason():
    report = apply(capture(Attention(cached=False), X), CONFIG)
    assert (report.found, report.rewritten) == (1, 0)
    assert "does not return the keys and values" in report.sites[0].reason
    assert report.sites[0].node == "y"


def test_encoder_attention_is_not_a_site():
    report = apply(capture(Attention("bidirectional"), X), CONFIG)
    assert (report.found, report.encoder_sites) == (0, 1)


def test_decoding_is_left_alone():
    graph = capture(Attention(), X[:, :1])
    before = str(graph.graph)
    report = apply(graph, CONFIG)
    assert (report.found, report.decode_sites) == (0, 1)
    assert str(graph.graph) == before


def test_missing_key_projection_costs_only_the_boost():
    class NoProjection(nn.Module):
        def forward(self, q, k, v):
            k, v = k * 2, v * 2
            return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v

    tensors = [torch.randn(1, G, S, D) for _ in range(3)]
    report = apply(capture(NoProjection(), *tensors), CONFIG)
    assert report.rewritten == 1
    assert "no spatial boost" in report.sites[0].note


def test_a_graph_without_example_values_is_refused_by_name():
    class Bare(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v

    report = apply(torch.fx.symbolic_trace(Bare()), CONFIG)
    assert "FakeTensorProp" in report.sites[0].reason


@pytest.mark.parametrize("cache", ["marked", "nobody"])
def test_what_leaves_a_graph_is_no_cache_unless_the_caller_says_so(cache):
    """It also leaves where a graph breaks, or where one block of a model ends."""
    graph = capture(Attention(), X)
    before = str(graph.graph)
    report = Pipeline(CONFIG).run(graph, cache=cache, unmarked="nobody counts its tokens")
    assert [site.reason for site in report.sites] == ["nobody counts its tokens"]
    assert str(graph.graph) == before


def test_a_marker_is_no_cache_that_somebody_counts():
    graph = capture(MarkedLayer(), X, marked_inputs(), how="export")
    report = Pipeline(CONFIG).run(graph, cache="nobody", unmarked="nobody counts its tokens")
    assert [site.reason for site in report.sites] == ["nobody counts its tokens"]
    assert graph(X, marked_inputs())[1].key.shape[2] == S


def test_a_mask_of_the_model_s_own_length_is_refused():
    """At the next token it would have a column for each token seen, which is not stored."""
    mask = torch.ones(S, S, dtype=torch.bool).tril()

    def run(*masks):
        graph = capture(MarkedLayer(), X, marked_inputs(), *masks)
        for marker in find_markers(graph.graph):
            named = {**arguments_of(marker)._asdict(), "mask_fits": False}
            marker.args, marker.kwargs = tuple(named.values()), {}
        return Pipeline(CONFIG).run(graph, cache="marked")

    assert "without asking the cache" in run(mask).sites[0].reason
    assert run().rewritten == 1, "no mask, so none that could be too long"


def test_keys_of_earlier_prompts_count():
    class Turn(nn.Module):
        def forward(self, q, k, v, past_k, past_v, mask):
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
            return F.scaled_dot_product_attention(q, k, v, mask), k, v

    tensors = [torch.randn(1, G, S, D) for _ in range(5)]
    mask = torch.ones(1, 1, S, 2 * S, dtype=torch.bool).tril(S)
    graph = capture(Turn(), *tensors, mask)
    assert apply(graph, CONFIG).rewritten == 1
    assert graph(*tensors, mask)[1].shape[2] == S


def test_budget_one_leaves_no_op_of_ours():
    graph = capture(Attention(), X)
    before = str(graph.graph)
    apply(graph, StarKVConfig(budget=1.0))
    assert str(graph.graph) == before


def test_scores_share_the_log_sum_exp_of_the_attention_that_sdpa_runs():
    graph = capture(Attention(), X, how="export")
    pipeline = Pipeline(CONFIG)
    assert pipeline.run(graph, cache="caller").rewritten == 1
    (share,) = (step for step in pipeline.passes if step.name == "ShareLogSumExp")
    assert share.matched == 1
    nodes = {node.target: node for node in graph.graph.nodes}
    flash = nodes[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
    assert torch.ops.aten.scaled_dot_product_attention.default not in nodes
    read = nodes[STARKV.window_attention].args[-1]
    assert read.args == (flash, 1)
    y, key, _ = graph(X)
    assert torch.equal(y, Attention()(X)[0]), "the same kernel as before"
    assert torch.equal(key, kept_in_two_passes())


def kept_in_two_passes():
    """The kept keys where the log-sum-exp is not shared: eager attention has none to share."""
    graph = capture(Attention("eager"), X, how="export")
    apply(graph, CONFIG)
    assert graph.graph.find_nodes(op="call_function", target=STARKV.window_attention)
    return graph(X)[1]


@pytest.mark.parametrize("how", ["math kernel", "mask", "eager form"])
def test_no_log_sum_exp_is_shared_where_sdpa_runs_something_else(how):
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    inputs = (X, mask) if how == "mask" else (X,)
    graph = capture(Attention("eager" if how == "eager form" else "sdpa"), *inputs, how="export")
    backends = [SDPBackend.MATH] if how == "math kernel" else list(EVERY_BACKEND)
    with sdpa_kernel(backends):
        assert apply(graph, CONFIG).rewritten == 1
    (scores,) = (n for n in graph.graph.nodes if n.target is STARKV.window_attention)
    assert scores.args[-1] is None
    assert torch.equal(graph(*inputs)[1], kept_in_two_passes())


def test_dumps_show_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("STARKV_DUMP", str(tmp_path))
    apply(capture(Attention(), X), CONFIG)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) == 2 * len(PIPELINE)
    after = (tmp_path / "graph0-5-InsertScores-after.txt").read_text()
    assert "starkv.window_attention" in after
    assert "starkv.window_attention" not in (tmp_path / files[0]).read_text()


def test_debug_names_the_layer_of_a_score_that_is_not_finite():
    from starkv_compile import NonFiniteScores

    config = StarKVConfig(budget=0.5, inner="eager", debug=True)
    graph = capture(Attention(), X, how="export")
    apply(graph, config)
    graph(X)
    bad = X.clone()
    bad[0, 3] = float("nan")
    with pytest.raises(NonFiniteScores, match="layer 0, queries: 64 of"):
        graph(bad)


@pytest.mark.parametrize("form", ["sdpa", "repeat_kv"])
def test_under_inductor_nothing_reads_attention_before_its_layer_is_compacted(form):
    """A graph rewritten for its owner has no such order: it may be exported."""
    with torch.no_grad():
        graphs = {
            (inner, cache): capture(MarkedLayer(form), X, marked_inputs())
            for inner, cache in (
                ("inductor", "marked"),
                ("eager", "marked"),
                ("inductor", "caller"),
            )
        }
    for (inner, cache), graph in graphs.items():
        config = StarKVConfig(budget=0.5, inner=inner)
        assert Pipeline(config).run(graph, cache=cache).rewritten == 1
        waits = [n for n in graph.graph.nodes if n.target is STARKV.after.default]
        assert len(waits) == ((inner, cache) == ("inductor", "marked"))
        for wait in waits:
            assert all(wait < user for user in wait.args[0].users if user is not wait)
            assert [n.target for n in wait.args[1:]] == [operator.getitem] * 2


def test_an_attention_to_be_differentiated_is_not_written_to():
    graph = capture(MarkedLayer(), X, marked_inputs())
    config = StarKVConfig(budget=0.5, inner="inductor")
    assert Pipeline(config).run(graph, cache="marked").rewritten == 1
    assert not [n for n in graph.graph.nodes if n.target is STARKV.after.default]
