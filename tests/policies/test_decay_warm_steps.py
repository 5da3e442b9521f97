"""STaR-KV's discount of older frames begins after `decay_warm_steps` agent steps."""

import torch

from starkv_compile.kernels.reference.star import Layout, StarOptions, fresh_state, star_scores

B, G, P = 1, 2, 30


def scores_of_steps(options, steps=4):
    """The scores after each of some agent steps on three frames of ten tokens."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.arange(P)[None] // 10
    row, column = torch.arange(P)[None] % 10 // 5, torch.arange(P)[None] % 5
    layout = Layout(frame, row, column, torch.arange(20, 30)[None])
    state, found = fresh_state(torch.zeros(B, G, P, 8), layout.current), []
    for _ in range(steps):
        attention = torch.rand(B, G, P, generator=generator)
        scores = star_scores(attention, None, None, layout, state, options)
        state = scores.state
        found.append(scores.final)
    return found


def test_the_discount_waits():
    at_once = scores_of_steps(StarOptions(frame_decay=0.5))
    never = scores_of_steps(StarOptions(frame_decay=0.0))
    later = scores_of_steps(StarOptions(frame_decay=0.5, decay_warm_steps=2))
    for step in range(4):
        expected = never if step < 2 else at_once
        assert torch.equal(later[step], expected[step])
        assert not torch.equal(never[step], at_once[step])
