"""Types of tokens, such as Gemma 3's `token_type_ids`: a model reads them from the stream's start.

Gemma 3 lets the tokens of an image attend to each other in both directions.
"""

import itertools

import pytest
import torch
from transformers import BatchFeature, GenerationMixin

from starkv_compile import AgentSession, UnsupportedModel
from starkv_compile.session.token_types import TOKEN_TYPES, _reads_a_part
from tests.support.turns import steps

IMAGE, PATCHES = 190, 16
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


class Gemma3Processor:
    """As that of transformers: one letter is one token, and image tokens have type 1."""

    bos_token = None

    def tokenizer(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 180 for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        turns = ["".join(p.get("text", "#") for p in m["content"]) for m in messages]
        return "".join(f"<{turn}>" for turn in turns) + ("=" if add_generation_prompt else "")

    def __call__(self, text, images, return_tensors):
        ids = []
        for letter in text[0]:
            ids += [IMAGE] * PATCHES if letter == "#" else [ord(letter) % 180]
        ids = torch.tensor([ids])
        types = (ids == IMAGE).long()
        found = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": types}
        return BatchFeature(found | ({"pixel_values": torch.stack(images)} if images else {}))

    def batch_decode(self, ids, skip_special_tokens):
        return [str(row.tolist()) for row in ids]


@pytest.fixture(name="gemma", scope="module")
def _gemma():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["full_attention"] * 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=PATCHES,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        )
    ).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.08)
    model.generation_config.eos_token_id = None
    return model


def turn(number):
    picture = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(number))
    question = [{"type": "text", "text": "what"}]
    return [{"type": "image", "image": picture}, *question] if number else question


def check(session, turns):
    """The session holds the keys that one prompt of all its tokens would have."""
    ids, model = session.input_ids, session.model
    pictures = [part["image"] for n in turns for part in turn(n) if part["type"] == "image"]
    with torch.no_grad():
        whole = model(
            input_ids=ids[:, :-1],
            token_type_ids=(ids[:, :-1] == IMAGE).long(),
            pixel_values=torch.stack(pictures),
        )
    cache = getattr(whole, "cache", None) or whole.past_key_values
    for ours, theirs in zip(session.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


def skip_if_types_are_cut(model):
    if _reads_a_part(model, "token_type_ids"):
        pytest.skip("this transformers cuts the types of tokens")


def test_later_images_are_read_as_in_one_prompt(gemma):
    skip_if_types_are_cut(gemma)
    session = AgentSession(gemma, Gemma3Processor())
    for number, turns in ((1, [1]), (2, [1, 2]), (0, [1, 2]), (3, [1, 2, 3])):
        session.step(turn(number), **OPTIONS)
        check(session, turns)


def test_they_are_in_a_file_a_fork_and_after_a_replaced_reply(gemma, tmp_path):
    skip_if_types_are_cut(gemma)
    processor = Gemma3Processor()
    session = AgentSession(gemma, processor)
    session.step(turn(1), **OPTIONS)
    twin = session.fork()
    session.replace_reply("click here")
    session.save(tmp_path / "session")
    loaded = AgentSession.load(tmp_path / "session", gemma, processor)
    for other in (session, loaded, twin):
        other.step(turn(2), **OPTIONS)
        check(other, [1, 2])
    assert torch.equal(session.input_ids, loaded.input_ids)
    assert session.input_ids.shape != twin.input_ids.shape


def test_a_later_image_is_refused_where_transformers_cuts_the_types(gemma, monkeypatch):
    """As before 5.23. A turn of text is read right there, too."""
    cuts = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(type(gemma), "prepare_inputs_for_generation", cuts)
    session = AgentSession(gemma, Gemma3Processor())
    for number in (1, 0):
        session.step(turn(number), **OPTIONS)
    check(session, [1])
    with pytest.raises(UnsupportedModel, match=r"last part of token_type_ids.*install transf"):
        session.step(turn(2), **OPTIONS)


class With:
    """A processor that also gives `name`: one number for each token of a turn."""

    def __init__(self, processor, name, number=1):
        self.processor, self.name, self.number = processor, name, number

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, **named):
        found = self.processor(**named)
        if self.number is not None:
            found[self.name] = torch.full_like(found["input_ids"], self.number)
        return found


@pytest.mark.parametrize("name", [name for name in TOKEN_TYPES if name != "mm_token_type_ids"])
def test_generate_gets_those_of_all_tokens_under_every_name(agent, name, monkeypatch):
    """Replies are text, and so is a turn for which the processor gives none."""
    model, processor = agent
    own, got = type(model).generate, []

    def generate(self, **named):
        got.append(named.pop(name))
        return own(self, **named)

    monkeypatch.setattr(type(model), "generate", generate)
    session = AgentSession(model, With(processor, name))
    ends = [0]
    for number in (1, None, 2):
        session.processor.number = number
        steps(session, 1, start=len(ends) // 2)
        ends += [session.prompt_length, session.input_ids.shape[1]]
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    expected = [kind for kind, n in zip((1, 0, 0, 0, 2, 0), lengths, strict=True) for _ in range(n)]
    assert session._types[name].tolist() == [expected]
    assert [len(types[0]) for types in got] == ends[1::2]
    assert all(types[0].tolist() == expected[: types.shape[1]] for types in got)


def test_numbers_of_tokens_that_a_session_does_not_know_are_refused(agent):
    model, processor = agent
    for name in ("image_embeds_position_mask", "position_ids"):
        session = AgentSession(model, With(processor, name))
        with pytest.raises(UnsupportedModel, match=rf"gives {name} of shape \[1, \d+\].*without a"):
            steps(session, 1)
        assert session.input_ids is None
    steps(AgentSession(model, With(processor, "labels")), 1)


def test_a_model_that_reads_a_whole_prompt_in_both_directions_takes_one_step(agent, monkeypatch):
    session = AgentSession(*agent)
    monkeypatch.setattr(agent[0].config, "model_type", "paligemma")
    steps(session, 1)
    with pytest.raises(UnsupportedModel, match=r"'paligemma' reads a prompt in both.*new session"):
        steps(session, 1, start=1)
