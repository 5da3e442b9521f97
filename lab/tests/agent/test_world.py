"""The agent's world: episodes, their pictures and questions, and how training lays them out."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from starkv_lab.agent.architecture import CHAT_TEMPLATE, build_image_processor, build_tokenizer
from starkv_lab.agent.batches import draw, patchify, sample_episodes, sample_plan, write
from starkv_lab.agent.processor import AgentProcessor
from starkv_lab.agent.questions import KINDS, ask
from starkv_lab.agent.render import CELL, screenshot
from starkv_lab.agent.vocabulary import COORDINATE_RANGE, TOKEN_ID
from starkv_lab.agent.world import GRIDS, sample_episode

SEEDS = range(20)


def episode_of(seed, frames=4, **more):
    return sample_episode(random.Random(seed), frames, **more)


@pytest.fixture(scope="module")
def processor():
    return AgentProcessor(build_image_processor(), build_tokenizer(), CHAT_TEMPLATE)


@pytest.mark.parametrize("seed", SEEDS)
def test_episode_and_pixels_follow_from_the_seed(seed):
    one, same, other = episode_of(seed), episode_of(seed), episode_of(seed + 1000)
    assert one == same
    assert one != other
    for i in range(len(one.frames)):
        assert screenshot(one, i).tobytes() == screenshot(same, i).tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_elements_have_cells_of_their_own_between_the_bars(seed):
    episode = episode_of(seed)
    for frame in episode.frames:
        cells = list(frame.elements.values())
        assert len(set(cells)) == len(cells) == 12
        assert all(0 < row < episode.rows - 1 for row, _ in cells)
        assert all(0 <= column < episode.columns for _, column in cells)


@pytest.mark.parametrize("seed", SEEDS)
def test_names_are_unique_and_frames_share_most_of_them(seed):
    frames = episode_of(seed).frames
    for before, after in pairwise(frames):
        assert after.step == before.step + 1
        # The dictionary keeps names unique; a vanished one must not come back at once.
        assert 10 <= len(before.elements.keys() & after.elements.keys()) < 12


@pytest.mark.parametrize("seed", SEEDS)
def test_most_pixels_stay_from_frame_to_frame(seed):
    episode = episode_of(seed)
    shots = [np.asarray(screenshot(episode, i)) for i in range(len(episode.frames))]
    assert shots[0].shape == (episode.rows * CELL, episode.columns * CELL, 3)
    for before, after in pairwise(shots):
        same = (before == after).all(-1).mean()
        assert 0.85 < same < 1


def test_an_impossible_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="frames=0"):
        episode_of(0, frames=0)


def cell_at(episode, words):
    """(row, column) of `x=..` and `y=..`, taken in order; a list, one for each pair."""
    numbers = [int(w[2:]) / COORDINATE_RANGE for w in words if w[:2] in ("x=", "y=")]
    return [
        (int(y * episode.rows), int(x * episode.columns))
        for x, y in zip(numbers[::2], numbers[1::2], strict=True)
    ]


def frame_at(episode, step):
    (frame,) = (f for f in episode.frames if f.step == step)
    return frame


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right(kind, grid):
    """Coordinates lie in the cell of the element that is named, in the frame that is named."""
    for seed in SEEDS:
        rng = random.Random(f"{kind}-{seed}")
        episode = sample_episode(rng, 4, grid)
        question = ask(rng, episode, kind, shown := rng.randint(1, 4))
        text, answer = question.text.split(), question.answer.split()
        frame, current = frame_at(episode, question.step), episode.frames[shown - 1]
        assert text[:3] == [kind, "step", str(question.step)]
        assert question.step <= current.step
        assert question.is_right(question.answer)
        assert not question.is_right(question.answer + " .")
        if kind in ("click", "where"):
            assert cell_at(episode, answer) == [frame.elements[text[3], text[4]]]
            assert kind != "click" or frame is current
        else:
            name = (answer[2], answer[3])
            assert cell_at(episode, text) == [frame.elements[name]]
        if kind == "return":
            assert text[-1] == str(current.step)
            assert cell_at(episode, answer) == [current.elements[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_in_the_vocabulary(kind):
    for seed in range(100):
        rng = random.Random(seed)
        question = ask(rng, sample_episode(rng, 3), kind)
        assert set(f"{question.text} {question.answer}".split()) <= TOKEN_ID.keys()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='why'"):
        ask(random.Random(0), episode_of(0), "why")


@pytest.mark.parametrize("grid", GRIDS)
def test_patches_are_the_processors(processor, grid):
    episode = episode_of(0, frames=2, grid=grid)
    shots = [screenshot(episode, i) for i in range(2)]
    given = processor.image_processor(shots, return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, *grid]] * 2  # nothing was resized
    ours = patchify(np.stack([np.asarray(shot) for shot in shots]))
    torch.testing.assert_close(ours, given["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_token_layout_is_the_processors(processor, seed):
    """A row of a training batch reads as the chat template and the tokenizer write it."""
    rng = random.Random(seed)
    episode = sample_episode(rng, 3)
    plan = sample_plan(rng, 3, 4)
    state = rng.getstate()
    text = write(rng, [episode], plan)
    ids, labels = text.input_ids[0].tolist(), text.labels[0].tolist()
    rng.setstate(state)  # the same questions once more, as a chat
    chat, content, answers = [], [], []
    shown = 0
    for item in plan:
        if isinstance(item, int):
            shown = item + 1
            content.append({"type": "text", "text": f"step {episode.frames[item].step}"})
            content.append({"type": "image"})
        else:
            question = ask(rng, episode, item, shown)
            content.append({"type": "text", "text": question.text})
            chat.append({"role": "user", "content": content})
            chat.append({"role": "assistant", "content": question.answer})
            answers.append(question.answer + " <|end|>")
            content = []
    text = processor.apply_chat_template(chat)
    shots = [screenshot(episode, i) for i in range(3)]
    given = processor(text=[text], images=shots, return_tensors="pt")
    assert given["input_ids"][0].tolist() == ids
    assert given["image_grid_thw"].tolist() == [[1, episode.rows, episode.columns]] * 3
    learned = [label for label in labels if label >= 0]
    assert processor.tokenizer.decode(learned).split() == " ".join(answers).split()
    assert all(label < 0 or label == ids[i + 1] for i, label in enumerate(labels))


def test_batch_shapes():
    rng = random.Random(0)
    episodes = sample_episodes(rng, rows=3, frames=2)
    screens = draw(episodes)
    text = write(rng, episodes, sample_plan(rng, 2, 4))
    tokens = int(screens.grid_thw[0].prod())
    assert text.input_ids.shape == text.labels.shape
    assert text.is_image.sum(1).tolist() == [2 * tokens] * 3
    assert screens.grid_thw.shape == (3 * 2, 3)
    assert screens.pixel_values.shape == (3 * 2 * tokens, 3 * CELL * CELL)
    assert screens.cells.shape == (3 * 2 * tokens, 4)
    assert (screens.cells[:, 0] > 0).sum() == 3 * 2 * 12
