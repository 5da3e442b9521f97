"""The demo agent under each way in: every layer found and rewritten, and its answers kept."""

import pytest
import torch
from starkv_lab.agent.checkpoints import load_agent
from starkv_lab.demo.turns import episode_turns

import starkv_compile
from starkv_compile import AgentSession, StarKVConfig
from tests.frontend.test_models import WAYS, enter
from tests.support.crossing import first_in_ci


@pytest.mark.parametrize("way", first_in_ci(WAYS))
def test_every_layer_is_rewritten(way):
    model, processor = load_agent()
    model = enter(way, model, budget=0.5, inner="eager")
    (turn,) = episode_turns(1, 0)[:1]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": turn.content}], add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[turn.image], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    reply = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert turn.question.is_right(reply[0]), reply
    layers = model.config.text_config.num_hidden_layers
    graphs = starkv_compile.report(model).prompt_graphs
    assert sum(graph.rewritten for graph in graphs) == layers
    assert all(graph.found == graph.rewritten for graph in graphs)


@pytest.mark.slow
def test_a_session_at_budget_one_says_what_the_uncompiled_agent_says():
    turns = episode_turns(3, 1)
    model, processor = load_agent()
    plain = AgentSession(model, processor)
    expected = [plain.step(t.content, max_new_tokens=14, do_sample=False) for t in turns]
    starkv_compile.compile(model, StarKVConfig(budget=1.0, inner="eager"))
    session = AgentSession(model, processor)
    replies = [session.step(t.content, max_new_tokens=14, do_sample=False) for t in turns]
    assert replies == expected
    assert torch.equal(session.input_ids, plain.input_ids)
