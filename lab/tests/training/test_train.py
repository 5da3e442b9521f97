"""The training's own parts: where it starts, what is supervised where, and what is shown."""

import random

import pytest
import torch
from starkv_lab.agent.architecture import build_config
from starkv_lab.agent.batches import IGNORE, sample_plan, write
from starkv_lab.agent.vocabulary import END, TOKEN_ID
from starkv_lab.training import initial
from starkv_lab.training.pool import see_episodes
from starkv_lab.training.train import (
    MAX_FRAMES,
    TOKENS_SHOWN,
    Trainer,
    answer_loss,
    isolate_questions,
    last_step,
    learning_rate,
    shown_tokens,
)
from transformers import Qwen3VLForConditionalGeneration


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(build_config())
    initial.start_attention(model.model.language_model)
    return model


@pytest.fixture(scope="module")
def pool(model):
    return next(see_episodes(model.model.visual, seed=0, episodes=10, frames=3))


def sample(pool, frames=2, rows=3, at_end=False):
    rng = random.Random(0)
    seen = pool.sample(rng, rows, frames)
    return seen, write(rng, seen.episodes, sample_plan(rng, frames, 6, at_end))


def test_labels_are_the_next_tokens_of_answers(pool):
    _, text = sample(pool)
    asked = text.labels != IGNORE
    following = text.input_ids.roll(-1, 1)
    assert torch.equal(text.labels[asked], following[asked])
    assert asked.sum(1).unique().numel() == 1


def test_a_sample_of_the_pool_is_a_cut_of_its_episodes(pool):
    seen, _ = sample(pool)
    whole = {episode.decoration_seed: i for i, episode in enumerate(pool.episodes)}
    for row, episode in enumerate(seen.episodes):
        i = whole[episode.decoration_seed]
        first = pool.episodes[i].frames.index(episode.frames[0])
        assert pool.episodes[i].frames[first : first + 2] == episode.frames
        assert torch.equal(pool.features[i, first : first + 2], seen.features[row])
        for frame, has_element in zip(episode.frames, seen.has_element[row], strict=True):
            cells = {
                (int(at) // episode.columns, int(at) % episode.columns)
                for at in has_element.nonzero()
            }
            assert cells == set(frame.elements.values())


def test_shown_tokens_hold_all_text_and_all_elements(pool):
    seen, text = sample(pool)
    shown = shown_tokens(seen.has_element, text.is_image, 14)
    assert shown[~text.is_image].all()
    visual = shown[text.is_image].view(seen.has_element.shape)
    assert visual.sum(-1).flatten().tolist() == [14] * 6
    assert visual[seen.has_element].all()
    assert shown_tokens(seen.has_element, text.is_image, 112).all()


@pytest.mark.parametrize("tokens", [14, 112])
@pytest.mark.parametrize("isolated", [True, False])
def test_loss_reaches_the_language_model_through_any_density(model, pool, tokens, isolated):
    loss, accuracy = answer_loss(model, *sample(pool, at_end=isolated), tokens, isolated)
    assert 0 <= accuracy <= 1
    model.zero_grad()
    loss.backward()
    layer = model.model.language_model.layers[0]
    assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0


def test_the_rate_falls_when_the_agent_is_ready_and_not_before(tmp_path):
    for ready, end in ((None, 2900), (1500, 2900), (2200, 2900), (2600, 3300)):
        assert last_step(2900, 700, step=1000, ready=ready) == end
    for step in (2500, 9000):
        late = last_step(2900, 700, step, ready=None)
        assert learning_rate(step, late, 700, 1.0) == 1.0
    assert last_step(2900, 700, step=3000, ready=2600) == 3300, "steps after it change nothing"

    trainer = Trainer(tmp_path, seed=0, peak=1e-3)
    trainer.state["step"] = 7
    ups = MAX_FRAMES - 1 + len(TOKENS_SHOWN) - 1
    for _ in range(ups):
        assert trainer.state["ready"] is None
        trainer._level_up()
    assert trainer.state["ready"] is None, "all tokens are shown, and no question answered yet"
    for step in (8, 9):
        trainer.state["step"] = step
        trainer._level_up()
    assert trainer.state["ready"] == 8


def test_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(step, 1000, 200, 1.0) for step in (0, 99, 500, 900, 999)]
    assert rates == [0.01, 1.0, 1.0, 0.5, 0.005]


def test_isolated_questions_see_the_frames_and_themselves(pool):
    _, text = sample(pool, at_end=True)
    length = text.input_ids.shape[1]
    mask, positions = isolate_questions(text, torch.arange(length).expand(3, 1, -1).clone())
    ends = (text.input_ids[0] == TOKEN_ID[END]).nonzero()[:, 0].tolist()
    frames_end = int(text.is_image[0].nonzero().max()) + 2
    starts = [frames_end, *[end + 1 for end in ends[:-1]]]
    for start, end in zip(starts, ends, strict=True):
        assert mask[end, :frames_end].all()
        own = range(start, end + 1)
        seen = mask[end, frames_end:].nonzero()[:, 0] + frames_end
        assert seen.tolist() == list(own)
        assert positions[0, 0, start : end + 1].tolist() == list(
            range(frames_end, frames_end + len(own))
        )
    assert torch.equal(mask, mask & torch.ones_like(mask).tril()), "causal"
