"""Sessions on a model inside a wrapper."""

import pytest
import torch
from torch import nn

from starkv_compile import AgentSession
from starkv_compile.session.inner import generating_model, inner_model, positions_owner
from starkv_compile.testing import tiny_model
from tests.support.turns import steps


class Adapter(nn.Module):
    """In PEFT's style: a model in a tuner, whose attributes are found from outside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config = model.config

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def generate(self, *args, **kwargs):
        return self.base_model.model.generate(*args, **kwargs)

    @property
    def model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


WRAPPERS = {
    "adapter": Adapter,
    "adapter in an adapter": lambda model: Adapter(Adapter(model)),
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled adapter": lambda model: torch.compile(Adapter(model), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_session_on_a_wrapped_model_is_that_on_the_model(agent, kind, tmp_path):
    model, processor = agent
    expected = AgentSession(model, processor)
    replies = steps(expected, 3)
    wrapped = WRAPPERS[kind](model)
    assert inner_model(wrapped) is model
    assert callable(generating_model(wrapped).generate)
    session = AgentSession(wrapped, processor)
    assert steps(session, 2) == replies[:2]
    session.save(tmp_path / "session")
    for other in (session, AgentSession.load(tmp_path / "session", model, processor)):
        assert steps(other, 1, start=2) == replies[2:]
        assert torch.equal(other.input_ids, expected.input_ids)
        for left, right in zip(other.cache.layers, expected.cache.layers, strict=True):
            assert torch.equal(left.keys, right.keys)


def test_a_session_on_a_model_of_peft(agent):
    peft = pytest.importorskip("peft")
    model, processor = agent
    expected = AgentSession(model, processor)
    replies = steps(expected, 2)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])  # zero at first
    wrapped = peft.get_peft_model(model, lora).eval()
    try:
        session = AgentSession(wrapped, processor)
        assert steps(session, 2) == replies
    finally:
        wrapped.unload()


def test_who_computes_positions():
    model = tiny_model("qwen2_5_vl")
    assert positions_owner(Adapter(model)) is model.model
    assert positions_owner(tiny_model("llava")) is None
