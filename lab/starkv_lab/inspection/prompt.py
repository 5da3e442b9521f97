"""Loads what is inspected: a model, the inputs of one prompt, and the pictures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from starkv_compile import OptionError, StarKVError, UnsupportedModel
from starkv_compile.hf import check_folder, load_pretrained, read_config

from ..agent.checkpoints import load_agent
from ..agent.questions import Question
from ..agent.world import Cell
from ..demo.turns import Turn, episode_turns, generated_episode, image_turns, open_screenshot
from ..quality.prompts import needed_cells


@dataclass(frozen=True)
class Picture:
    """Holds a screenshot and its title. needed: cells that the answer depends on, if known."""

    title: str
    image: Image.Image
    needed: frozenset[Cell] = frozenset()


@dataclass(frozen=True)
class InspectedPrompt:
    """Holds one prompt and its model, which is not compiled.

    inputs: the arguments of the model's `generate`, for one row. text: the text after the
    pictures. asked: the question, where its right answer is known.
    """

    model: Any
    model_name: str
    tokenizer: Any
    inputs: dict[str, torch.Tensor]
    pictures: tuple[Picture, ...]
    text: str
    asked: Question | None = None

    def words(self) -> list[str]:
        """Returns each token as text."""
        return [self.tokenizer.decode([token]) for token in self.inputs["input_ids"][0].tolist()]


def episode_prompt(frames: int, seed: int, agent: Path | None = None) -> InspectedPrompt:
    """Makes one prompt of the demo's episode: all screenshots, then the last one's question.

    Raises:
        StarKVError: `frames` is out of range, or no agent is found.
    """
    episode, _ = generated_episode(frames, seed)
    turns = episode_turns(frames, seed)[:frames]
    question = turns[-1].question
    assert question is not None
    prompt = _agent_prompt(turns, agent, needed_cells(episode, question))
    return replace(prompt, asked=question)


def images_prompt(
    paths: Sequence[Path], question: str | None = None, agent: Path | None = None
) -> InspectedPrompt:
    """Makes one prompt for the agent from picture files.

    The default question asks what is in the middle of the last picture.

    Raises:
        StarKVError: a file cannot be read, the agent does not know a word, or no agent is found.
    """
    return _agent_prompt(image_turns(paths, question), agent)


def _agent_prompt(
    turns: Sequence[Turn], agent: Path | None, needed: set[tuple[int, Cell]] | None = None
) -> InspectedPrompt:
    model, processor = load_agent(agent)
    pictures, content = [], []
    for number, turn in enumerate(turns):
        assert turn.image is not None
        cells = frozenset(cell for frame, cell in needed or () if frame == number)
        pictures.append(Picture(f"step {turn.step}", turn.image, cells))
        content += turn.content[:-1]
    content.append(turns[-1].content[-1])
    return _prompt(
        model, processor, "the demo agent" if agent is None else str(agent), pictures, content
    )


def checkpoint_prompt(checkpoint: Path, paths: Sequence[Path], text: str) -> InspectedPrompt:
    """Makes one prompt of screenshots, then text, for a Hugging Face model in a folder.

    The model runs on a GPU if there is one.

    Raises:
        StarKVError: a file cannot be read, or the folder holds no model with its processor.
    """
    if not paths:
        raise OptionError("--model needs --image: give at least one screenshot")
    pictures = [Picture(path.name, open_screenshot(path)) for path in paths]
    model, processor = load_checkpoint(checkpoint)
    content: list[dict[str, Any]] = [{"type": "image", "image": p.image} for p in pictures]
    content.append({"type": "text", "text": text})
    return _prompt(model, processor, checkpoint.resolve().name, pictures, content)


def load_checkpoint(checkpoint: Path, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """Returns model and processor of a folder. The model is on a GPU if there is one.

    Args:
        dtype: type of the weights. "auto": the type in the files.

    Raises:
        UnsupportedModel: the folder holds no model with its processor.
        StarKVError: the folder does not exist.
    """
    check_folder(checkpoint)
    config = read_config(checkpoint)
    processor = load_processor(checkpoint)
    return on_device(load_pretrained(checkpoint, config, dtype)), processor


def on_device(model: Any) -> Any:
    """Moves a model to a GPU if there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_processor(checkpoint: Path) -> Any:
    """Loads the folder's processor of text and images.

    Raises:
        UnsupportedModel: the folder has no such processor, or a package that it needs is missing.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # the library raises many kinds
        why = " ".join(str(error).split()).split(". ")[0]
        raise UnsupportedModel(
            f"{checkpoint}: its processor cannot be loaded ({why}); the folder needs the "
            "processor's files"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise UnsupportedModel(
            f"{checkpoint}: its processor takes no images ({type(processor).__name__}); add the "
            "processor's files to the folder, and install torchvision if the processor uses it"
        )
    return processor


def _prompt(
    model: Any,
    processor: Any,
    name: str,
    pictures: Sequence[Picture],
    content: list[dict[str, Any]],
) -> InspectedPrompt:
    message = [{"role": "user", "content": content}]
    try:
        text = processor.apply_chat_template(message, add_generation_prompt=True)
    except ValueError as error:  # no template
        raise StarKVError(f"{name}: {error}") from error
    images = [picture.image for picture in pictures]
    inputs = processor(text=[text], images=images, return_tensors="pt").to(model.device)
    return InspectedPrompt(
        model, name, processor.tokenizer, dict(inputs), tuple(pictures), content[-1]["text"]
    )
