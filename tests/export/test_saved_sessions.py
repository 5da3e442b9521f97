"""What a session of an exported model saved, read back."""

import pytest
import torch

from starkv_compile import CacheError, StarKVCache
from starkv_compile.export.runner import OnnxSession, load_model
from starkv_compile.testing import generate, tiny_inputs, tiny_model


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


@torch.no_grad()
def test_tokens_that_torch_stored_without_scores_stay(exported):
    """Such as those of a prompt with drafts, which are appended as they are."""
    ids = torch.arange(10, 40)[None]
    model = tiny_model(exported.family, num_hidden_layers=exported.layers)
    cache = StarKVCache(model.config)
    cache.shared.appending = True
    model(input_ids=ids, past_key_values=cache)
    cache.shared.appending = False
    token = ids[:, :1]
    expected = model(input_ids=token, past_key_values=cache.fork()).logits
    found = load_model(exported.folder)(input_ids=token, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert cache.layers[0].stored == 31
