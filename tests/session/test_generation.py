"""Options of `generate` with which a session would not hold the reply, whoever asks for them."""

import pytest
import torch
from transformers import GenerationConfig

from starkv_compile import AgentSession, CacheError, OptionError
from starkv_compile.session.generation import LIMITS, OWN

WHAT = [{"type": "text", "text": "what"}]
ASKED = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "return_dict_in_generate": True,
    "use_cache": False,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 3,
    "assistant_model": object(),
    "assistant_early_exit": 1,
    "speculation_type": "dflash",
    "use_mtp": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "custom_generate": "somebody/code",
    "token_healing": True,
}
KEYWORDS = ("assistant_model", "custom_generate")
"""What only a keyword can ask for."""


def test_every_limit_is_tried():
    assert ASKED.keys() == LIMITS.keys()


def refused(session, name, where, **options):
    ids, seen = session.input_ids, session.cache.get_seq_length()
    with pytest.raises(OptionError, match=rf"^{name}=.*{where}: .* to step$"):
        session.step(WHAT, max_new_tokens=3, **options)
    assert (session.input_ids is ids, session.cache.get_seq_length()) == (True, seen)


def config_with(name):
    config = GenerationConfig(do_sample=True)  # several sequences of a greedy reply are an error
    setattr(config, name, ASKED[name])
    return config


@pytest.mark.parametrize("name", ASKED)
def test_an_option_is_refused_before_anything_happens(agent, name, monkeypatch):
    model, processor = agent
    monkeypatch.setattr(processor, "apply_chat_template", None)
    session = AgentSession(model, processor)
    refused(session, name, "", **{name: ASKED[name]})
    if name in KEYWORDS:
        return
    refused(session, name, " in generation_config", generation_config=config_with(name))
    monkeypatch.setattr(model, "generation_config", config_with(name))
    refused(session, name, " in the model's generation_config")
    plain = GenerationConfig(max_new_tokens=3)
    refused(session, name, " in the model's generation_config", generation_config=plain)


@pytest.mark.parametrize("name", [name for name in ASKED if name not in KEYWORDS])
def test_the_way_out_works_whatever_the_checkpoint_asks_for(agent, name, monkeypatch):
    model, processor = agent
    expected = AgentSession(model, processor)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected.step(WHAT, **options)
    monkeypatch.setattr(model, "generation_config", config_with(name))
    session = AgentSession(model, processor)
    session.step(WHAT, **options, **{name: LIMITS[name].use})
    assert torch.equal(session.input_ids, expected.input_ids)
    for left, right in zip(session.cache.layers, expected.cache.layers, strict=True):
        assert torch.equal(left.keys, right.keys)


def test_what_changes_nothing_is_taken(agent, monkeypatch):
    model, processor = agent
    config = GenerationConfig(num_beams=1, num_return_sequences=1, cache_implementation="hybrid")
    monkeypatch.setattr(model, "generation_config", config)
    session = AgentSession(model, processor)
    session.step(WHAT, max_new_tokens=3, generation_config=GenerationConfig(use_cache=True))
    assert session.cache.get_seq_length() == session.input_ids.shape[1] - 1


@pytest.mark.parametrize("name", OWN)
def test_what_the_session_makes_itself_is_refused(agent, name):
    with pytest.raises(OptionError, match=rf"^{name}: the session makes .* leave it out$"):
        AgentSession(*agent).step(WHAT, **{name: None})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda out: {"sequences": out}, "returned a dict"),
        (lambda out: out.repeat(2, 1), "returned a Tensor"),
        (lambda out: out[:, 1:], "do not continue the prompt"),
        (lambda out: torch.nn.functional.pad(out, (0, 1)), "the session's cache has seen"),
    ],
    ids=["a dict", "two rows", "another prompt", "another cache"],
)
def test_a_generate_that_does_otherwise_is_found_out(agent, answer, said, monkeypatch):
    """As one of the model's own, which no option shows."""
    model, processor = agent
    session = AgentSession(model, processor)
    session.step(WHAT, max_new_tokens=2, do_sample=False)
    ids, seen = session.input_ids, session.cache.get_seq_length()
    own = type(model).generate
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", lambda *a, **k: answer(own(*a, **k)))
        with pytest.raises(CacheError, match=said):
            session.step(WHAT, max_new_tokens=2, do_sample=False)
    assert (session.input_ids is ids, session.cache.get_seq_length()) == (True, seen)
    session.step(WHAT, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("first", ["autocast", "inference", "plain"])
def test_steps_under_other_modes_of_torch(agent, first):
    """A session goes on in any of them, and back."""
    modes = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
        "plain": torch.no_grad,
    }
    session = AgentSession(*agent, history=2)
    order = [first, *(name for name in modes if name != first), first]
    for name in order:
        with modes[name]():
            session.step(WHAT, max_new_tokens=3, do_sample=False)
            session.fork().step(WHAT, max_new_tokens=3, do_sample=False)
    assert session.cache.get_seq_length() == session.input_ids.shape[1] - 1
