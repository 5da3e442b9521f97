"""What a session of an exported model saved, read back."""

import pytest
import torch

from starkv_compile import CacheError
from starkv_compile.export.runner import OnnxSession
from starkv_compile.testing import generate, tiny_inputs


def test_a_saved_session_is_loaded(exported, tmp_path):
    processor = object()
    session = OnnxSession(exported.folder, processor, history=2)
    inputs = tiny_inputs("qwen3_vl")
    session.input_ids = generate(session.model, inputs, past_key_values=session.cache).sequences
    session.prompt_length = inputs["input_ids"].shape[1]
    session.save(tmp_path / "session")
    loaded = OnnxSession.load(tmp_path / "session", exported.folder, processor)
    assert (loaded.history, loaded.processor) == (2, processor)
    more = {"input_ids": torch.cat([session.input_ids, torch.arange(10, 30)[None]], 1)}
    more["position_ids"] = torch.arange(more["input_ids"].shape[1]).expand(4, 1, -1)
    mine, theirs = (
        generate(s.model, {**more, "past_key_values": s.cache}).logits for s in (loaded, session)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_session_with_a_set_for_each_head_is_refused(exported):
    session = OnnxSession(exported.folder, object())
    inputs = tiny_inputs("qwen3_vl")
    ids = generate(session.model, inputs, past_key_values=session.cache).sequences
    for layer in session.cache.compressed_layers:
        layer.kept = layer.kept[:, None].expand(-1, layer.keys.shape[1], -1)
    more = {"input_ids": torch.cat([ids, torch.arange(10, 30)[None]], 1)}
    more["position_ids"] = torch.arange(more["input_ids"].shape[1]).expand(4, 1, -1)
    with pytest.raises(CacheError, match="a different set of tokens for each head"):
        generate(session.model, {**more, "past_key_values": session.cache})
