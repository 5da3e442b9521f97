"""The demo agent without its training, and with two of its four layers, which compile sooner."""

import pytest
import torch
from starkv_lab.agent.architecture import (
    CHAT_TEMPLATE,
    build_config,
    build_image_processor,
    build_tokenizer,
)

import starkv_compile


@pytest.fixture(name="agent")
def _agent(untouched_agent):
    yield untouched_agent
    starkv_compile.undo(untouched_agent[0])


@pytest.fixture(name="untouched_agent", scope="module")
def _untouched_agent():
    from starkv_lab.agent.processor import AgentProcessor
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    config = build_config()
    config.text_config.num_hidden_layers = 2
    model = Qwen3VLForConditionalGeneration(config).eval()
    processor = AgentProcessor(build_image_processor(), build_tokenizer(), CHAT_TEMPLATE)
    return model, processor
