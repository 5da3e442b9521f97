"""An agent's steps on one cache."""

import torch

from starkv_compile import StarKVCache
from starkv_compile.testing import TinyPrompt, tiny_inputs


def steps(model, family, count):
    """Turns of a session with a frame each, some of text alone, on one cache."""
    cache, seen = StarKVCache(model.config), 0
    for step in range(count):
        frames = () if step % 4 == 3 else ((4, 4 + step % 2),)
        new = tiny_inputs(family, TinyPrompt(frames, text=5 + 3 * step, seed=step))
        ids = new.pop("input_ids")
        places = torch.arange(seen, seen + ids.shape[1]).expand(4, 1, -1)
        new.pop("attention_mask")
        with torch.no_grad():
            out = model(
                input_ids=ids, position_ids=places, past_key_values=cache, logits_to_keep=1, **new
            )
        seen += ids.shape[1]
        yield out.logits[:, -1], cache
