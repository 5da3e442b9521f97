"""The training's own parts: what is supervised where, and what is shown."""

import random

import torch
from transformers import Qwen3VLForConditionalGeneration

from starkv_compile.agent.architecture import build_config
from starkv_compile.agent.batches import IGNORE, sample_batch
from starkv_compile.agent.train import (
    CellProbe,
    answer_losses,
    isolate_questions,
    learning_rate,
    shown_tokens,
)
from starkv_compile.agent.vocabulary import AGENT, END, TOKEN_ID, TOKENS


def batch_of(frames=2, rows=3):
    return sample_batch(random.Random(0), rows, frames, questions=6)


def test_labels_are_the_next_tokens_of_answers():
    batch = batch_of()
    asked = batch.labels != IGNORE
    following = batch.input_ids.roll(-1, 1)
    assert torch.equal(batch.labels[asked], following[asked])
    assert asked.sum(1).unique().numel() == 1


def test_hints_are_the_words_of_the_answer_that_follows():
    batch = batch_of()
    for row, place in (batch.hints[..., 0] != IGNORE).nonzero().tolist():
        ahead = [TOKENS[i] for i in batch.input_ids[row, place + 1 : place + 6]]
        hints = [TOKENS[i] for i in batch.hints[row, place]]
        at_question = batch.input_ids[row, place] == TOKEN_ID[AGENT]
        # "click (", "at (" and "it is" come first; after a name, "at (".
        assert ahead[2:4] == hints, (at_question, ahead)


def test_shown_tokens_hold_all_text_and_all_elements():
    batch = batch_of()
    is_image = batch.input_ids == TOKEN_ID["<|image_pad|>"]
    shown = shown_tokens(batch, is_image, 14)
    assert shown[~is_image].all()
    visual = shown[is_image]
    assert visual.view(3 * 2, -1).sum(1).tolist() == [14] * 6
    assert visual[batch.cells[:, 0] > 0].all()
    assert shown_tokens(batch, is_image, 112).all()


def test_losses_reach_the_language_model_through_any_density():
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(build_config())
    probe = CellProbe(128)
    for tokens in (14, 112):
        loss, hint_loss, accuracy = answer_losses(model, probe, batch_of(), tokens)
        assert 0 <= accuracy <= 1
        model.zero_grad()
        (loss + hint_loss).backward()
        layer = model.model.language_model.layers[0]
        assert layer.self_attn.k_proj.weight.grad.abs().sum() > 0


def test_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(step, 1000, 200, 1.0) for step in (0, 99, 500, 900, 999)]
    assert rates == [0.01, 1.0, 1.0, 0.5, 0.005]


def test_isolated_questions_see_the_frames_and_themselves():
    batch = sample_batch(random.Random(1), 2, 2, questions=3, at_end=True)
    is_image = batch.input_ids == TOKEN_ID["<|image_pad|>"]
    length = batch.input_ids.shape[1]
    mask, positions = isolate_questions(
        batch, is_image, torch.arange(length).expand(3, 1, -1).clone()
    )
    mask = mask[0, 0]
    ends = (batch.input_ids[0] == TOKEN_ID[END]).nonzero()[:, 0].tolist()
    frames_end = int(is_image[0].nonzero().max()) + 2
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
