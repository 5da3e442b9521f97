"""A reply that is put in the place of the model's own, and what later steps read of it."""

import copy

import pytest
import torch

import starkv_compile
from starkv_compile import AgentSession, CacheError, OptionError
from tests.support.crossing import slow
from tests.support.turns import contents, rebuilt, steps

REPLY = "click red star"


def after_replacing(session, reply=REPLY):
    """Three steps; after each of the first two, `reply` takes the place of the model's own."""
    for content in contents():
        session.step(content, max_new_tokens=5, do_sample=False)
        if len(session._turns) < 3:
            session.replace_reply(reply)
    return session


@pytest.mark.parametrize("reply", [REPLY, ""])
def test_later_steps_read_it_and_not_the_models_own(agent, reply):
    """At budget 1.0, against the whole conversation rebuilt from scratch at the last step."""
    model, processor = agent
    session = after_replacing(AgentSession(model, processor), reply)
    ids = session.input_ids
    text = processor.tokenizer.decode(ids[0])
    assert text.replace(" ", "").count(f"<|agent|>{reply}<|end|>".replace(" ", "")) == 2
    assert torch.equal(rebuilt(session, [c[1]["image"] for c in contents()], 5), ids)


@pytest.mark.parametrize(
    "options", [slow({"nbits": 4}, ci=True), slow({}), slow({"decode_tokens": 3})]
)
def test_the_models_own_reply_put_back_changes_nothing(agent, options):
    """Its tokens were decoded one by one, and now come with the next prompt.

    In double precision, as rounding would decide between scores that are nearly equal.
    """
    model, processor = copy.deepcopy(agent[0]).double(), agent[1]
    starkv_compile.compile(model, budget=0.3, inner="eager", **options)
    session, own = AgentSession(model, processor), AgentSession(model, processor)
    for content in contents(4):
        replies = [one.step(content, max_new_tokens=5, do_sample=False) for one in (session, own)]
        assert replies[0] == replies[1]
        session.replace_reply("something else")
        session.replace_reply(processor.tokenizer.decode(own.input_ids[0, own.prompt_length :]))
        assert torch.equal(session.input_ids, own.input_ids)
    for left, right in zip(session.cache.layers, own.cache.layers, strict=True):
        places = right.places()[0]
        assert torch.equal(left.places()[0], places[places < session.prompt_length])


@pytest.mark.slow
def test_a_file_and_a_fork_go_on_from_a_replaced_reply(agent, tmp_path):
    model, processor = agent
    starkv_compile.compile(model, budget=0.3, inner="eager")
    session = AgentSession(model, processor)
    steps(session, 2)
    before = session.fork()
    session.replace_reply(REPLY)
    session.save(tmp_path / "session")
    loaded, twin = AgentSession.load(tmp_path / "session", model, processor), session.fork()
    expected = steps(session, 1, start=2)
    for other in (loaded, twin):
        assert steps(other, 1, start=2) == expected
        assert torch.equal(other.input_ids, session.input_ids)
    steps(before, 1, start=2)
    assert before.input_ids.shape != session.input_ids.shape, "the fork keeps the model's reply"


def test_what_cannot_be_replaced_is_said(agent, monkeypatch):
    model, processor = agent
    session = AgentSession(model, processor)
    with pytest.raises(OptionError, match="before the first step"):
        session.replace_reply(REPLY)
    steps(session, 1)
    with pytest.raises(OptionError, match=r"replace_reply\(3\): expected the text"):
        session.replace_reply(3)
    with pytest.raises(OptionError, match=r"<\|image_pad\|>' stands for an image.*leave it out"):
        session.replace_reply("look <|image_pad|>")
    ids = session.input_ids

    def refuse(tokens):
        raise RuntimeError("the current layer does not track past states")

    monkeypatch.setattr(session.cache, "crop", refuse)
    with pytest.raises(
        CacheError, match=r"another kind.*track past states\); say in the next turn"
    ):
        session.replace_reply(REPLY)
    assert session.input_ids is ids
    session.failed = True
    with pytest.raises(CacheError, match="an earlier step of this session failed"):
        session.replace_reply(REPLY)
