"""Every policy through the real pass: what leaves a graph, and what a model's cache then holds."""

import pytest
import torch

import starkv_compile
from starkv_compile import CacheError, StarKVCache, StarKVConfig
from starkv_compile.passes import Pipeline, apply
from starkv_compile.policies import POLICIES
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model
from starkv_compile.vision.layout import VisionLayout
from tests.support.marked_layer import LAYOUT, MarkedLayer, marked_inputs, places_of
from tests.support.one_layer import Attention, D, G, S, X, capture
from tests.support.policy_cases import config_of, frames, kept, kept_rows
from tests.support.turns import two_turns

CONFIG = {"budget": 0.5, "inner": "eager"}


def run_layer(policy, place, **options):
    """`MarkedLayer` rewritten with `policy`: the report, and what it writes."""
    given = marked_inputs(place)
    graph = capture(MarkedLayer(), X, given, how="export")
    config = StarKVConfig.from_options({"policy": policy, **CONFIG, **options})
    report = Pipeline(config).run(graph, cache="marked")
    _, written = graph(X, given)
    return report, written


def projected():
    """query, key, value of `MarkedLayer`."""
    layer = MarkedLayer().attention
    q, k, v = (part(X).view(2, S, -1, D).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
    return q, k * 0.5 + torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1), v


@pytest.mark.parametrize("name", POLICIES)
def test_what_leaves_the_graph_is_what_the_policy_chose(name):
    report, written = run_layer(name, places_of(2))
    assert report.rewritten == 1
    assert written.key.shape == (2, G, S // 2, D)
    query, key, value = projected()
    causal = torch.ones(S, S, dtype=torch.bool).tril()[None, None]
    for row in range(2):
        one, layout = slice(row, row + 1), tuple(t[row : row + 1] for t in LAYOUT)
        expected = kept(
            name,
            query[one],
            key[one],
            S // 2,
            layout,
            value=value[one],
            hidden=X[one],
            index=places_of(1),
            mask=causal,
            scale=D**-0.5,
            window=8,
            pool=5,
        )
        place = written.place[row]
        assert place.tolist() == expected
        slots = place if POLICIES[name].per_head else place.expand(G, -1)
        slots = slots[..., None].expand(-1, -1, D)
        assert torch.equal(written.key[row], key[row].gather(1, slots))
        assert torch.equal(written.value[row], value[row].gather(1, slots))


@pytest.mark.parametrize("name", POLICIES)
def test_a_graph_of_ones_own_keeps_the_same(name):
    """Without a marker, and with nothing that tells where frames are."""
    graph = capture(Attention(), X, how="export")
    assert apply(graph, StarKVConfig(policy=name, **CONFIG)).rewritten == 1
    y, key, _ = graph(X)
    assert torch.equal(y, Attention()(X)[0])
    assert key.shape == (2, G, S // 2, D)


def full_keys(model, inputs):
    """[layers] of [B, G, L, D]: what an uncompressed cache holds of the prompt."""
    starkv_compile.undo(model)
    out = model(**inputs, use_cache=True)
    return [layer.keys for layer in out.past_key_values.layers]


@pytest.mark.slow
def test_sets_by_head_on_a_model():
    """Two turns, then a batch with padding: each head's keys are of the places it says."""
    model, family = tiny_model("llava"), "llava"
    prompts = TinyPrompt(), TinyPrompt(((4, 4),), 12, seed=3)
    inputs = tiny_inputs(family, *prompts)
    whole = full_keys(model, inputs)
    starkv_compile.compile(model, policy="snapkv", **CONFIG)
    cache = StarKVCache(model.config)
    model(**inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    differ = 0
    for layer, full in zip(cache.compressed_layers, whole, strict=True):
        assert layer.kept.shape == (2, G, length // 2)
        slots = layer.kept[..., None].expand(-1, -1, -1, full.shape[-1])
        torch.testing.assert_close(layer.keys, full.gather(2, slots).where(layer.keys != 0, 0.0))
        differ += (layer.kept[:, 0] != layer.kept[:, 1]).sum()
    assert differ > 0, "both heads chose alike: nothing was tested"

    session = StarKVCache(model.config)
    two_turns(model, family, session)
    seen = session.get_seq_length()
    for layer in session.compressed_layers:
        assert layer.kept.shape[:2] == (1, G)
        assert (layer.kept.diff() > 0).all()
        assert layer.places()[..., -1].tolist() == [[seen - 1] * G]
    assert not starkv_compile.report(model).refusals


def test_the_default_reads_attention_to_screens_of_the_turn_at_hand():
    kept_of = {}
    for counts in (False, True):
        options = {"policy": "screen_novelty", "stored_attention": counts, "attention_weight": 4.0}
        config = StarKVConfig.from_options({**CONFIG, **options})
        given = marked_inputs()
        graph = capture(MarkedLayer(), X, given, how="export")
        Pipeline(config).run(graph, cache="marked")
        for start in (0, S // 2):
            given["turn_start"] = torch.tensor([start])
            kept_of[counts, start] = graph(X, given)[1].place.tolist()
    one_turn = kept_of[True, 0]
    assert kept_of[True, S // 2] == one_turn
    assert kept_of[False, 0] == one_turn
    assert kept_of[False, S // 2] != one_turn


def test_one_set_does_not_go_on_from_sets_by_head():
    place = places_of(2, G)
    report, written = run_layer("starkv", place)
    assert report.rewritten == 0
    assert "policy 'starkv' keeps one set; begin a new cache" in report.sites[0].reason
    assert "(snapkv" in report.sites[0].reason
    assert written.key.shape[2] == S, "all of it is stored"
    assert torch.equal(written.place, place)


def test_sets_by_head_go_on_from_one_set():
    shared, by_head = (run_layer("snapkv", place)[1] for place in (places_of(2), places_of(2, G)))
    for ours, theirs in zip(shared, by_head, strict=True):
        assert torch.equal(ours, theirs)


def by_head(seen=20, sets=((0, 3, 6, 9, 17, 18), (1, 2, 5, 14, 17, 19))):
    """A cache of one row whose two heads hold different tokens of frames 0 (2..7) and 1 (9..14)."""
    cache = StarKVCache(tiny_model("qwen2_5_vl").config)
    key = torch.arange(seen).float()[None, None, :, None].expand(1, 2, -1, 16).clone()
    for index in range(2):
        cache.update(key, key + 0.5, index)
    kept_sets = torch.tensor([sets])
    for layer in cache.compressed_layers:
        rows = kept_sets[..., None].expand(-1, -1, -1, 16)
        layer.hold(layer.keys.gather(2, rows), layer.values.gather(2, rows))
        layer.kept, layer.novelty = kept_sets.clone(), None
    layout = VisionLayout.empty(1, torch.device("cpu"))
    frame, row, column, _ = frames(seen, (2, 8), (9, 15))
    layout.extend(frame, row, column, "grid")
    cache.shared.layout = layout
    return cache


def test_frames_that_leave_take_each_heads_own_tokens():
    cache = by_head()
    cache.keep_newest_frames(1)
    layer = cache.layers[0]
    # Head 0 has 0 9 17 18 left and head 1 has 1 14 17 19: two of frame 0 each were dropped.
    assert layer.kept.tolist() == [[[0, 9, 17, 18], [1, 14, 17, 19]]]
    assert layer.keys[0, :, :, 0].tolist() == layer.kept[0].tolist()
    assert (layer.values[0, :, :, 3] - 0.5).tolist() == layer.kept[0].tolist()


def test_a_head_with_less_left_keeps_its_newest_of_what_was_to_go():
    cache = by_head(sets=((0, 3, 6, 9, 17, 18), (1, 2, 4, 5, 7, 19)))
    cache.keep_newest_frames(1)
    # Text alone: 3 of head 0 (0 17 18) and 2 of head 1 (1 19). As many in both: head 0's frame 1
    # goes too, and head 1 holds on to one of frame 0.
    assert cache.layers[0].kept.tolist() == [[[0, 17, 18], [1, 7, 19]]]


def test_what_a_session_does_with_sets_by_head():
    cache = by_head()
    more = torch.full((1, 2, 1, 16), 20.0)
    for index in range(2):
        cache.update(more, more, index)
    assert cache.layers[0].places()[0].tolist() == [
        [0, 3, 6, 9, 17, 18, 20],
        [1, 2, 5, 14, 17, 19, 20],
    ]
    twin = cache.fork()
    again = StarKVCache(tiny_model("qwen2_5_vl").config)
    again.load_state_dict(cache.state_dict())
    cache.crop(-1)
    for copy in (twin, again):
        assert copy.layers[0].places().shape == (1, 2, 7)
    assert cache.layers[0].places().shape == (1, 2, 6)
    with pytest.raises(CacheError, match="only 0 tokens came after"):
        cache.crop(-1)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.layers[0].kept.shape == (2, 2, 6)


RECOMMENDED = ("snapkv_mean", "snapkv", "key_novelty")


@pytest.mark.slow(ci=True)
def test_inductor_keeps_the_same():
    """In one graph for all, as compiling is what takes the time."""
    query, key, value = projected()
    configs = [config_of(name, pool=5, window=8) for name in RECOMMENDED]

    def run(query, key, value):
        return [
            kept_rows(
                config,
                query,
                key,
                S // 2,
                tuple(LAYOUT),
                value=value,
                hidden=X,
                scale=D**-0.5,
            )
            for config in configs
        ]

    expected = run(query, key, value)
    assert not torch.equal(expected[0], expected[2])
    compiled = torch.compile(run, backend="inductor", fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(query, key, value), expected, strict=True):
            assert torch.equal(ours, theirs)
