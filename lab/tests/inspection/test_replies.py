"""Replies of a page are what the compiled model says; the full cache's what the model says."""

import pytest
from starkv_lab.inspection.replies import replies

from lab.tests.support.inspection_prompts import tiny_prompt
from starkv_compile import StarKVConfig


@pytest.mark.slow(ci=True)
def test_replies_from_the_full_cache_and_from_a_tenth():
    prompt = tiny_prompt("qwen2_vl")
    full, tenth = replies(prompt, StarKVConfig(), (0.1,), 6)
    plain = prompt.model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)
    tokens = prompt.inputs["input_ids"].shape[1]
    assert full == prompt.tokenizer.decode(plain[0, tokens:])
    assert len(full.split()) == len(tenth.split()) == 6
    assert tenth.split()[0] == full.split()[0]  # the prompt is computed before it is compressed
    assert tenth != full


def test_none_where_none_are_asked_for():
    assert replies(None, StarKVConfig(), (0.1,), 0) == ()
