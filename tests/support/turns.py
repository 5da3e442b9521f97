"""Conversations of several turns: with a bare cache, and with a session of the demo agent."""

import random

import torch
from starkv_lab.agent.questions import ask
from starkv_lab.agent.render import screenshot
from starkv_lab.agent.world import sample_episode

from starkv_compile.testing import TinyPrompt, generate, tiny_inputs

FIRST, SECOND = TinyPrompt(((4, 4),), 12, 1), TinyPrompt(((4, 4), (4, 4)), 10, 2)


def two_turns(model, family, cache, tokens=4):
    """A prompt, its answer, and a second prompt with new frames, on one cache."""
    a, b = tiny_inputs(family, FIRST), tiny_inputs(family, SECOND)
    first = generate(model, a, tokens, past_key_values=cache)
    ids = torch.cat([first.sequences, b["input_ids"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = b["pixel_values"]
    if family != "llava":
        types = [a["mm_token_type_ids"], torch.zeros(1, tokens).int(), b["mm_token_type_ids"]]
        grid = torch.cat([a["image_grid_thw"], b["image_grid_thw"]])
        inputs["mm_token_type_ids"] = torch.cat(types, dim=1)
        inputs["image_grid_thw"] = b["image_grid_thw"]
        vision, deltas = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], grid)
        model.model.rope_deltas = deltas
        text = torch.arange(ids.shape[1]).expand(1, 1, -1)
        inputs["position_ids"] = torch.cat([text, vision])
    return generate(model, inputs, tokens, past_key_values=cache)


def contents(frames=3):
    rng = random.Random(3)
    episode = sample_episode(rng, frames, (8, 12))
    for i, frame in enumerate(episode.frames):
        yield [
            {"type": "text", "text": f"step {frame.step}"},
            {"type": "image", "image": screenshot(episode, i)},
            {"type": "text", "text": ask(rng, episode, "click", i + 1).text},
        ]


def steps(session, count, start=0):
    coming = list(contents(5))[start : start + count]
    return [session.step(content, max_new_tokens=5, do_sample=False) for content in coming]


def rebuilt(session, images, tokens):
    """The session's ids, where its last `tokens` answer one prompt of all that came before."""
    model, ids = session.model, session.input_ids[:, :-tokens]
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        max_new_tokens=tokens,
        do_sample=False,
        **session.processor.image_processor(images, return_tensors="pt"),
    )
