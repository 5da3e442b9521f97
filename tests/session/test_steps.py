"""Several turns on one cache: only what is new is prefilled, state is carried on."""

import pytest
import torch
from PIL import Image

import starkv_compile
from starkv_compile import AgentSession, StarKVCache, StarKVConfig
from starkv_compile.testing import FAMILIES, TinyPrompt, generate, tiny_inputs, tiny_model
from starkv_compile.vision.layout import VisionLayout
from tests.support.chunks import skip_if_images_cannot_be_cut
from tests.support.crossing import first_only
from tests.support.planted import planted_fault
from tests.support.turns import contents, rebuilt, steps, two_turns


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_at_budget_one_equals_the_uncompressed_one(family):
    from transformers import DynamicCache

    model = tiny_model(family)
    expected = two_turns(model, family, DynamicCache(config=model.config.get_text_config()))
    compiled = starkv_compile.compile(model, budget=1.0, inner="eager")
    for cache in (
        DynamicCache(config=model.config.get_text_config()),
        StarKVCache(model.config),
    ):
        ours = two_turns(compiled, family, cache)
        assert torch.equal(ours.sequences, expected.sequences)
        for left, right in zip(ours.logits, expected.logits, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("family", first_only(FAMILIES))
def test_second_turn_compresses_everything_again(family):
    model = starkv_compile.compile(tiny_model(family), budget=0.3, policy="starkv", inner="eager")
    cache = StarKVCache(model.config)
    out = two_turns(model, family, cache)
    seen = out.sequences.shape[1] - 4
    layer = cache.layers[0]
    assert layer.kept.shape[1] == StarKVConfig(budget=0.3).capacity(seen)
    assert (layer.kept[0, 1:] > layer.kept[0, :-1]).all()
    assert layer.kept[0, -8:].tolist() == list(range(seen - 8, seen))
    assert cache.get_seq_length() == seen + 3
    assert layer.state[1].tolist() == [2], "two frames were profiled"
    assert cache.shared.layout.frame.max() == 2
    assert starkv_compile.report(model).prompt_graphs[-1].rewritten == 2


@pytest.mark.slow
def test_a_question_without_a_frame_keeps_the_pattern():
    family = "qwen2_5_vl"
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    cache = StarKVCache(model.config)
    out = two_turns(model, family, cache)
    before = [t.clone() for t in cache.layers[0].state]
    ids = torch.cat([out.sequences, torch.arange(20, 35)[None]], dim=1)
    generate(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache
    )
    for left, right in zip(before, cache.layers[0].state, strict=True):
        assert torch.equal(left, right)
    assert cache.layers[0].kept.shape[1] == StarKVConfig(budget=0.3).capacity(ids.shape[1])


@pytest.mark.slow(ci=True)
def test_same_cache_is_not_shared_between_sessions():
    family = "qwen2_5_vl"
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    caches = [StarKVCache(model.config) for _ in range(2)]
    alone = [two_turns(model, family, cache) for cache in caches]
    assert torch.equal(alone[0].sequences, alone[1].sequences)
    for left, right in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(left.kept, right.kept)


@pytest.mark.slow(ci=True)
def test_agent_session_prefills_only_what_is_new(agent):
    model, processor = agent
    starkv_compile.compile(model, budget=0.3, policy="starkv", inner="eager")
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    session = AgentSession(model, processor)
    for content in contents():
        session.step(content, max_new_tokens=5, do_sample=False)
    handle.remove()
    prompts = [length for length in lengths if length > 1]
    assert len(prompts) == 3
    assert all(100 < length < 120 for length in prompts), "one frame and one line each"
    assert session.cache.get_seq_length() == session.input_ids.shape[1] - 1
    assert session.cache.layers[0].state[1].tolist() == [3]


def test_agent_session_equals_prefilling_it_all_again(agent):
    """At budget 1.0, against the whole conversation rebuilt from scratch at the last step."""
    model, processor = agent
    session = AgentSession(model, processor)
    images = []
    for content in contents():
        session.step(content, max_new_tokens=5, do_sample=False)
        images.append(content[1]["image"])
    assert torch.equal(rebuilt(session, images, 5), session.input_ids)


@pytest.mark.slow
def test_frames_out_of_the_history_leave_the_cache_whole(agent):
    model, processor = agent
    starkv_compile.compile(model, budget=0.5, policy="starkv", boost=0.0, inner="eager")
    session = AgentSession(model, processor, history=2)
    steps(session, 5)
    cache = session.cache
    frame = cache.shared.layout.frame[0]
    for layer in cache.compressed_layers:
        stored = layer.places()[0]
        assert set(frame[stored[stored < len(frame)]].tolist()) == {-1, 3, 4}
        retired = int(((frame >= 0) & (frame < 3)).sum())
        assert layer.retired == retired
        # The share is of what the session still has: two frames and all text.
        seen = cache.get_seq_length() - 4  # before the last reply
        assert layer.kept.shape[1] == StarKVConfig(budget=0.5).capacity(seen - retired)
    assert cache.get_seq_length() == session.input_ids.shape[1] - 1, "positions go on"


@pytest.mark.slow(ci=True)
def test_a_session_decodes_in_buffers(agent):
    model, processor = agent
    sessions = []
    for room in (3, None):
        starkv_compile.compile(model, budget=0.3, inner="eager", decode_tokens=room)
        sessions.append(AgentSession(model, processor, history=2))
        sessions[-1].replies = steps(sessions[-1], 4)
    ours, theirs = sessions
    assert ours.replies == theirs.replies
    for left, right in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        assert left.keys.shape[2] > left.stored == right.stored
    # Only the first layer's keys know nothing of rounding, which decides between equal scores.
    left, right = ours.cache.layers[0], theirs.cache.layers[0]
    assert torch.equal(left.places(), right.places())
    assert torch.equal(left.keys[:, :, : left.stored], right.keys)


def test_a_history_of_a_full_cache_drops_old_frames_and_nothing_else(agent):
    model, processor = agent
    session = AgentSession(model, processor, history=2)
    steps(session, 4)
    frame = session.cache.shared.layout.frame[0]
    for layer in session.cache.compressed_layers:
        stored = layer.places()[0]
        stored = stored[stored < len(frame)]
        assert torch.equal(stored, ((frame < 0) | (frame >= 2)).nonzero()[:, 0])


def test_the_text_of_old_turns_leaves_with_their_frames_if_it_is_to(agent):
    session = AgentSession(*agent, history=2, keep_text=False)
    starts = []
    for step in range(4):
        starts.append(0 if session.input_ids is None else session.input_ids.shape[1])
        steps(session, 1, start=step)
        if step == 2:  # a turn without a screenshot belongs to the one before
            session.step([{"type": "text", "text": "what"}], max_new_tokens=5, do_sample=False)
    cache = session.cache
    frame = cache.shared.layout.frame[0]
    first = int((frame >= 0).nonzero()[0])
    stays = [*range(first), *range(starts[2], cache.get_seq_length())]
    for layer in cache.compressed_layers:
        assert layer.places()[0].tolist() == stays
        assert layer.retired == starts[2] - first
    visual = int((frame >= 2).sum())
    assert cache.shared.layout.counts.tolist() == [
        [len(frame) - starts[2] + first - visual, visual]
    ]
    with pytest.raises(starkv_compile.OptionError, match="keep_text=False"):
        AgentSession(*agent, keep_text=False)
    with pytest.raises(starkv_compile.OptionError, match=r"write AgentSession\(model, processor\)"):
        AgentSession(agent[1], agent[0])


def test_what_has_left_a_session_stays_out():
    """Whatever is asked for next: fewer frames' text, or none."""
    cache = StarKVCache(tiny_model("qwen2_5_vl").config)
    turn = [3, 4, 20]  # text, a frame of 4 tokens, text
    for _ in range(2):
        _store(cache, turn)
    cache.keep_newest_frames(1, text_from=27)
    assert cache.shared.layout.counts.tolist() == [[3 + 23, 4]]
    _store(cache, turn)
    cache.keep_newest_frames(1)
    layout, layer = cache.shared.layout, cache.compressed_layers[0]
    assert layout.counts.tolist() == [[3 + 23 + 23, 4]]
    assert layer.retired == 4 + 20 + 4
    assert layout.frame[0, layer.places()[0]].unique().tolist() == [-1, 2]
    _describe(cache, [3, 9, 3])  # a prompt that failed
    cache.keep_newest_frames(0)
    assert (layout.counts.tolist(), layer.retired) == ([[3 + 23 + 23, 0]], 4 + 20 + 4 + 4)
    cache.keep_newest_frames(0, text_from=81)
    cache.keep_newest_frames(0, text_from=81)
    assert layout.counts.tolist() == [[3, 0]]


def _describe(cache, turn):
    before, frame, after = turn
    frame = torch.tensor([[-1] * before + [0] * frame + [-1] * after])
    layout = cache.shared.layout or VisionLayout.empty(1, frame.device)
    layout.extend(frame, frame.clamp(min=0), frame.clamp(min=0), "grid")
    cache.shared.layout = layout
    return frame.shape[1]


def _store(cache, turn):
    """A turn, described and stored whole."""
    cache.shared.appending = True
    keys = torch.randn(1, 2, _describe(cache, turn), 16)
    for layer in range(2):
        cache.update(keys, keys, layer)


@pytest.mark.slow
def test_text_and_screens_have_their_shares_of_a_session_however_long(agent):
    """Of what is stored text would have a larger share at each step, as screens lose more."""
    model, processor = agent
    window, capacity = 4, 60
    starkv_compile.compile(
        model, budget_tokens=capacity, window=window, text_weight=1.0, inner="eager"
    )
    session = AgentSession(model, processor)
    for step in range(5):
        steps(session, 1, start=step)
        frame = session.cache.shared.layout.frame[0]
        visual = frame[: len(frame) - window] >= 0
        share = (capacity - window) * int((~visual).sum()) // len(visual)
        for layer in session.cache.compressed_layers:
            kept = layer.kept[0][: capacity - window]
            assert int((frame[kept] < 0).sum()) == share


@pytest.mark.slow(ci=True)
def test_text_stays_when_no_frame_does():
    """Layers that kept little text do not cost the others theirs."""
    family = "qwen2_5_vl"
    model = starkv_compile.compile(
        tiny_model(family), budget=0.3, policy="starkv", boost=0.0, inner="eager"
    )
    cache = StarKVCache(model.config)
    generate(model, tiny_inputs(family, TinyPrompt(text=60)), past_key_values=cache)
    before = [layer.places()[0].tolist() for layer in cache.compressed_layers]
    frame = cache.shared.layout.frame[0].tolist()
    cache.keep_newest_frames(0)
    assert len({layer.stored for layer in cache.compressed_layers}) == 1
    for layer, places in zip(cache.compressed_layers, before, strict=True):
        text = {p for p in places if p >= len(frame) or frame[p] < 0}
        assert text <= set(layer.places()[0].tolist())


def test_a_screenshot_in_tiles_is_one_of_the_history(agent):
    """Where a processor cuts it up, the layout counts tiles, the session screenshots."""
    session = AgentSession(*agent, history=2)
    steps(session, 1)
    layout = session.cache.shared.layout
    visual = layout.frame[0] >= 0
    layout.frame[0, visual] = torch.arange(int(visual.sum())) // 40  # three tiles
    session._frames.clear()
    session._count_frames([object()])
    tiles = int(layout.frame.max()) + 1
    assert session._frames == [tiles]
    steps(session, 2, start=1)
    assert session._frames == [tiles, 1, 1]
    layer = session.cache.compressed_layers[0]
    assert layer.retired == int(visual.sum()), "all tiles of the first, and nothing else"


SMALL, LARGE = Image.new("RGB", (100, 50)), Image.new("RGB", (900, 900))


@pytest.mark.parametrize(
    ("images", "tiles", "frames"),
    [
        ([SMALL, SMALL], 18, [9, 9]),
        ([SMALL, LARGE], 18, [0, 18]),
        ([SMALL, LARGE], 2, [1, 1]),
        ([LARGE, LARGE], 5, [0, 5]),
        (["a.png", "b.png"], 8, [0, 8]),
        ([torch.zeros(64, 256).numpy(), torch.zeros(128, 128).numpy()], 6, [0, 6]),
    ],
)
def test_tiles_of_a_turn_are_divided_only_where_it_is_known_whose_they_are(
    untouched_agent, images, tiles, frames
):
    session = AgentSession(*untouched_agent, history=2)
    layout = VisionLayout.empty(1, torch.device("cpu"))
    layout.frame = torch.arange(tiles)[None]
    session.cache.shared.layout = layout
    session._count_frames(images)
    assert session._frames == frames


@pytest.mark.slow
def test_a_screenshot_cut_by_chunks_of_the_prompt_is_one_of_the_history(agent):
    skip_if_images_cannot_be_cut()
    model, processor = agent
    starkv_compile.compile(model, budget_tokens=150, inner="eager")
    session = AgentSession(model, processor, history=2)
    for content in contents(3):
        session.step(content, max_new_tokens=3, do_sample=False, prefill_chunk_size=40)
    assert session._frames == [1, 1, 1]
    frame = session.cache.shared.layout.frame[0]
    for layer in session.cache.compressed_layers:
        stored = layer.places()[0]
        assert set(frame[stored[stored < len(frame)]].tolist()) == {-1, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 60])
def test_attention_of_later_turns_counts_for_stored_screens_on_request_only(agent, chunk):
    """That of a later chunk always counts: the question comes with the last chunk."""
    if chunk:
        skip_if_images_cannot_be_cut()
    model, processor = agent
    turns = list(contents(3))
    turns = [[*turns[0], *turns[1]]] if chunk else turns
    kept = []
    for counts in (False, True):
        starkv_compile.compile(model, budget=0.2, stored_attention=counts, inner="eager")
        session = AgentSession(model, processor)
        for content in turns:
            session.step(content, max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
        kept.append([layer.kept.tolist() for layer in session.cache.compressed_layers])
    assert (kept[0] == kept[1]) == bool(chunk)


@pytest.mark.slow(ci=True)
def test_a_fork_goes_its_own_way(agent):
    model, processor = agent
    starkv_compile.compile(model, budget=0.3, inner="eager")
    straight = AgentSession(model, processor)
    expected = steps(straight, 4)
    session = AgentSession(model, processor)
    before = steps(session, 2)
    twin = session.fork()
    twin.step([{"type": "text", "text": "what step 1 x=500 y=500"}], max_new_tokens=7)
    assert before + steps(session, 2, start=2) == expected
    assert twin.cache.get_seq_length() != session.cache.get_seq_length()
    for left, right in zip(session.cache.layers, straight.cache.layers, strict=True):
        assert torch.equal(left.keys, right.keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "call"),
    [(RuntimeError, 1), (KeyboardInterrupt, 3)],
    ids=["in the prompt", "while decoding"],
)
def test_a_step_that_fails_leaves_the_session_as_it_was(agent, fault, call):
    model, processor = agent
    starkv_compile.compile(model, budget=0.3, inner="eager", decode_tokens=8)
    expected = steps(AgentSession(model, processor, 2, keep_text=False), 4)
    session = AgentSession(model, processor, 2, keep_text=False)
    assert steps(session, 3) == expected[:3]
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        session.step([{"type": "image", "image": "nowhere.png"}])
    with planted_fault(model.lm_head, fault, call):
        steps(session, 1, start=3)
    assert steps(session, 1, start=3) == expected[3:]


def test_a_session_that_cannot_be_as_it_was_ends(agent, monkeypatch):
    def no_fork(cache):
        raise starkv_compile.CacheError("fork: another kind of layer")

    session = AgentSession(*agent)
    steps(session, 1)
    monkeypatch.setattr(StarKVCache, "fork", no_fork)
    steps(session, 1, start=1)
    with pytest.raises(TypeError, match="got type="):
        session.step([{"type": "image", "image": 3}])
    with pytest.raises(starkv_compile.CacheError, match="begin a new session"):
        steps(session, 1, start=2)


@pytest.mark.slow(ci=True)
def test_what_a_session_cannot_do_is_said(agent):
    model, processor = agent
    with pytest.raises(starkv_compile.OptionError, match="history=0"):
        AgentSession(model, processor, history=0)
    session = AgentSession(model, processor)
    for content in ("what", [], [{"role": "user"}], [{"type": "image", "url": "x.png"}]):
        with pytest.raises(starkv_compile.OptionError, match="parts of one user turn"):
            session.step(content)
    short, image = AgentSession(model, processor, history=2), {"type": "image", "image": None}
    with pytest.raises(starkv_compile.OptionError, match=r"3 images.*history=2.*give history=3"):
        short.step([image] * 3)
    assert session.cache.get_seq_length() == 0
    cache = StarKVCache(tiny_model("qwen2_5_vl").config)
    compiled = starkv_compile.compile(tiny_model("qwen2_5_vl"), budget=0.3, inner="eager")
    generate(compiled, tiny_inputs("qwen2_5_vl", TinyPrompt(), TinyPrompt()), past_key_values=cache)
    with pytest.raises(starkv_compile.CacheError, match="has 2 rows"):
        cache.keep_newest_frames(1)
    with pytest.raises(starkv_compile.CacheError, match="load into a new"):
        cache.load_state_dict(cache.state_dict())
    window = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}
    sliding = StarKVCache(tiny_model("qwen2_5_vl", use_sliding_window=True, **window).config)
    with pytest.raises(starkv_compile.CacheError, match="fork: this model also caches in"):
        sliding.fork()


@pytest.mark.slow
def test_frames_that_leave_a_session_take_no_other_codes_with_them(agent):
    model, processor = agent
    starkv_compile.compile(model, budget=0.4, inner="eager", nbits=4)
    session = AgentSession(model, processor, history=2)
    steps(session, 2)
    layer, before = session.cache.compressed_layers[0], {}
    for slot, place in enumerate(layer.quantized.place[0].tolist()):
        before[place] = layer.quantized.key.codes[:, :, slot]
    steps(session, 2, start=2)
    assert layer.retired > 0
    after = layer.quantized.place[0].tolist()
    common = before.keys() & set(after)
    assert common
    for place in common:
        now = layer.quantized.key.codes[:, :, after.index(place)]
        assert torch.equal(now, before[place])
