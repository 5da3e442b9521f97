"""Every way of calling `generate`: right, or refused before any harm.

Right is what the model itself answers, with no compiler and the library's own cache, if each
layer's attention is kept from the tokens that layer has dropped. That is an oracle of its own: it
shares no code with the cache, its positions or its masks.
"""

import re

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    TextIteratorStreamer,
)
from transformers.masking_utils import eager_mask

import starkv_compile
from starkv_compile import StarKVCache
from starkv_compile.testing import IMAGE_TOKEN, VIDEO_TOKEN, TinyPrompt, tiny_inputs, tiny_model
from tests.support.crossing import slow

FAMILY, BUDGET, TOKENS = "qwen2_5_vl", 0.3, 6


class Oracle:
    """Which tokens each layer has stored after each call, and attention that reads no others."""

    def __init__(self):
        self.stored = []  # by call: by layer: [B, stored] places in the stream
        self.calls = 0

    def record(self, module, args, kwargs, output):
        cache = output.past_key_values
        self.stored.append(
            [
                layer._places(layer.stored, 0, layer.keys).clone()
                for layer in cache.compressed_layers
            ]
        )

    def count(self, module, args, kwargs, output):
        self.calls += 1

    def attend(self, module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
        logits = query @ key.mT * scaling
        if mask is not None:
            logits = logits + mask
        if module.is_causal and self.calls and key.shape[2] > query.shape[2]:
            old = key.shape[2] - query.shape[2]
            gone = torch.ones(len(query), old, dtype=torch.bool)
            stored = self.stored[self.calls - 1][module.layer_idx]
            gone.scatter_(1, stored.clamp(max=old - 1), False)
            logits[..., :old].masked_fill_(gone[:, None, None], -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def both(converse):
    """What `converse(model, cache)` gives, by a compiled model and by the oracle."""
    oracle = Oracle()
    compiled = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    hook = compiled.register_forward_hook(oracle.record, with_kwargs=True)
    ours = converse(compiled, StarKVCache(compiled.config))
    hook.remove()
    AttentionInterface.register("oracle", oracle.attend)
    AttentionMaskInterface.register("oracle", eager_mask)
    plain = tiny_model(FAMILY)
    plain.model.language_model.set_attn_implementation("oracle")
    plain.register_forward_hook(oracle.count, with_kwargs=True)
    theirs = converse(plain, DynamicCache(config=plain.config.get_text_config()))
    assert oracle.calls == len(oracle.stored)
    return ours, theirs


def run(model, inputs, **options):
    torch.manual_seed(7)
    with torch.no_grad():
        return model.generate(
            **inputs,
            **{"max_new_tokens": TOKENS, "do_sample": False, **options},
            return_dict_in_generate=True,
            output_scores=True,
        )


def assert_equal(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.sequences, right.sequences)
        for a, b in zip(left.scores, right.scores, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam samples": {"num_beams": 3, "do_sample": True},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "chunks of the prompt": {"prefill_chunk_size": 32},
}
SLOW = ("several samples", "chunks of the prompt")
IN_CI = ("sampling", "several beams", "beam samples", "repetition penalty")


def skip_where_transformers_fails(inputs, **options):
    """5.17 gives the second chunk of a Qwen-VL prompt positions of no row, with or without us."""
    try:
        run(tiny_model(FAMILY), inputs, **options)
    except RuntimeError as error:
        if not transformers.__version__.startswith("5.17."):
            raise
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])):
            run(starkv_compile.compile(tiny_model(FAMILY), inner="eager"), inputs, **options)
        pytest.skip(f"transformers {transformers.__version__} itself: {error}")


@pytest.mark.parametrize(
    "mode",
    [slow(mode, ci=mode in IN_CI) if mode in SLOW + IN_CI else mode for mode in MODES],
)
def test_one_prompt(mode):
    inputs = tiny_inputs(FAMILY)
    if "prefill_chunk_size" in MODES[mode]:
        skip_where_transformers_fails(inputs, **MODES[mode])
    ours, theirs = both(lambda model, cache: [run(model, inputs, **MODES[mode])])
    assert isinstance(ours[0].past_key_values, StarKVCache)
    assert_equal(ours, theirs)


PROMPTS = {
    "no image": [TinyPrompt((), 60)],
    "thirty images": [TinyPrompt(((2, 2),) * 30, 20)],
    "padded rows": [TinyPrompt(), TinyPrompt(((4, 4),), 16, seed=3)],
    "images of different sizes": [
        TinyPrompt(((4, 4), (2, 6)), 20),
        TinyPrompt(((3, 5),), 33, seed=2),
    ],
    "a row without an image": [TinyPrompt(), TinyPrompt((), 30, seed=4)],
}


@pytest.mark.parametrize(
    ("mode", "names"),
    [*(slow("greedy", [name], ci=True) for name in PROMPTS), slow("beams", list(PROMPTS))],
)
def test_prompts_of_every_shape(mode, names):
    """Beams one after the other: what was compiled for one shape is right for the others."""
    inputs = [tiny_inputs(FAMILY, *PROMPTS[name]) for name in names]
    ours, theirs = both(lambda model, cache: [run(model, one, **MODES[mode]) for one in inputs])
    assert_equal(ours, theirs)
    for one in ours:
        for layer in one.past_key_values.compressed_layers:
            assert layer.stored < layer.seen


@pytest.mark.parametrize("drafts", [slow("prompt lookup", ci=True), slow("assistant", ci=True)])
def test_drafts_beside_a_prompt_keep_it_whole_and_say_so(drafts):
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    inputs["input_ids"][:, 21:] = inputs["input_ids"][:, :21]  # something to look up
    options = {"prompt_lookup_num_tokens": 4}
    if drafts == "assistant":
        options = {"assistant_model": tiny_model(FAMILY, seed=1)}
    expected = run(tiny_model(FAMILY), inputs, max_new_tokens=12, **options)
    model = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    with pytest.warns(UserWarning, match="drafted tokens"):
        out = run(model, inputs, max_new_tokens=12, **options)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.slow
def test_drafts_are_appended_to_a_compressed_cache_and_rolled_back():
    """As `generate` verifies them: a chunk whose every logit is wanted, then `crop`."""
    inputs = tiny_inputs("llava", TinyPrompt((), 40))
    model = starkv_compile.compile(tiny_model("llava"), budget=BUDGET, inner="eager")
    expected = run(model, inputs)
    greedy = expected.sequences[0, -TOKENS:]
    cache = StarKVCache(model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, logits_to_keep=1)
        drafts = torch.stack([greedy[0], greedy[1], greedy[2] + 1])[None]  # the last one is wrong
        logits = model(input_ids=drafts, past_key_values=cache, logits_to_keep=3).logits
        assert [int(row.argmax()) for row in logits[0, :2]] == greedy[1:3].tolist()
        cache.crop(-1)
        assert cache.get_seq_length() == 42 + 2
        logits = model(input_ids=greedy[None, 2:5], past_key_values=cache, logits_to_keep=3).logits
    assert [int(row.argmax()) for row in logits[0]] == greedy[3:6].tolist()
    for ours, theirs in zip(cache.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        assert torch.equal(ours.kept, theirs.kept)


def test_a_prompt_passed_again_with_drafts_is_refused():
    inputs = tiny_inputs("llava", TinyPrompt((), 40))
    model = starkv_compile.compile(tiny_model("llava"), budget=BUDGET, inner="eager")
    cache = StarKVCache(model.config)
    first = run(model, inputs, max_new_tokens=1, past_key_values=cache).sequences
    first = torch.cat([first, first], 1)  # something to look up
    again = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    with pytest.raises(starkv_compile.CacheError, match="has seen 42 tokens"):
        run(model, again, past_key_values=cache, prompt_lookup_num_tokens=4)


def test_what_comes_later_does_not_change_what_was_kept():
    inputs = tiny_inputs(FAMILY)
    model = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    short, long = (
        run(model, inputs, do_sample=tokens > 2, max_new_tokens=tokens) for tokens in (2, 12)
    )
    assert not torch.equal(short.sequences[0, -2:], long.sequences[0, -12:-10])
    for left, right in zip(short.past_key_values.layers, long.past_key_values.layers, strict=True):
        assert torch.equal(left.kept, right.kept)


def capacity(tokens):
    return starkv_compile.StarKVConfig(budget=BUDGET).capacity(tokens)


def test_embeddings_instead_of_tokens():
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 60))
    model = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    by_tokens = run(model, inputs).sequences[:, 62:]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    mask = inputs["attention_mask"]
    by_embeds = run(model, {"inputs_embeds": embeds, "attention_mask": mask})
    assert torch.equal(by_embeds.sequences[:, -TOKENS:], by_tokens)
    assert by_embeds.past_key_values.layers[0].kept.shape[1] == capacity(62)


def test_video():
    """Frames of a video are frames."""
    inputs = tiny_inputs(FAMILY, TinyPrompt(((4, 4), (4, 4)), 30))
    inputs["input_ids"][inputs["input_ids"] == IMAGE_TOKEN] = VIDEO_TOKEN
    video = {
        **inputs,
        "pixel_values_videos": inputs.pop("pixel_values"),
        "video_grid_thw": inputs.pop("image_grid_thw"),
        "mm_token_type_ids": inputs.pop("mm_token_type_ids") * 2,
    }
    video = {k: v for k, v in video.items() if k not in ("pixel_values", "image_grid_thw")}
    ours, theirs = both(lambda model, cache: [run(model, video)])
    assert_equal(ours, theirs)
    layout = ours[0].past_key_values.shared.layout
    assert layout.grid in ("grid", "positions")
    assert [int((layout.frame[0] == i).sum()) for i in range(2)] == [16, 16]


@pytest.mark.parametrize("kind", [slow("static", ci=True), "offloaded", "quantized"])
def test_other_caches_are_left_whole_and_it_is_said(kind):
    inputs = tiny_inputs(FAMILY)
    options = {"cache_implementation": kind}
    try:
        expected = run(tiny_model(FAMILY), inputs, **options)
    except Exception as error:
        pytest.skip(f"not without starkv either: {type(error).__name__}")
    model = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    with pytest.warns(UserWarning, match="which starkv cannot shorten"):
        out = run(model, inputs, **options)
    assert_equal([out], [expected])
    assert not isinstance(out.past_key_values, StarKVCache)


class Words:
    """As much of a tokenizer as a streamer asks for."""

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids)) + " "


def test_streaming():
    inputs = tiny_inputs(FAMILY)
    model = starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")
    expected = run(model, inputs).sequences[0, -TOKENS:].tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    run(model, inputs, streamer=streamer)
    assert [int(word) for text in streamer for word in text.split()] == expected


@pytest.mark.slow
def test_turns_on_one_cache():
    """What each turn dropped stays dropped in the next; turns may be shorter than the window."""
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))

    def turns(model, cache):
        results = []
        ids = inputs["input_ids"]
        for words in (9, 3, 1, 0):
            mask = torch.ones_like(ids)
            results.append(
                run(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)
            )
            more = torch.randint(5, 100, (1, words), generator=torch.Generator().manual_seed(words))
            ids = torch.cat([results[-1].sequences, more], 1)
        return results

    ours, theirs = both(turns)
    assert_equal(ours, theirs)
