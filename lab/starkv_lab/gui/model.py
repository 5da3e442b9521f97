"""Runs a GUI model, which answers samples from a compressed cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import starkv_compile
from starkv_compile import MissingPackage, StarKVCache, StarKVConfig, StarKVError
from starkv_compile.hf import with_cache

from .families.base import Family
from .samples import Sample, Size, open_screen
from .screens import Screen, check_shown, shown_size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Answer:
    """Holds a model's answer to a sample, and its costs.

    prompt: the text that the chat template wrote. screen: the current screen. kept: tokens that a
    layer stores after the prompt's compaction, the mean over layers. seen: tokens of the prompt.
    nbytes, full_nbytes: bytes of the cache at the end, and of a full cache. seconds: time of
    generation, from the prepared inputs to the last token.
    """

    prompt: str
    text: str
    screen: Screen
    kept: float
    seen: int
    nbytes: int
    full_nbytes: int
    seconds: float


class GuiModel:
    """Loads a checkpoint of `family` and compiles it with `config`.

    Args:
        checkpoint: a folder, or a name on Hugging Face's hub.
        pixels: fewest and most pixels of a resized screenshot; None means the checkpoint's own.
        trust_remote_code: whether code from the checkpoint may run.

    Raises:
        StarKVError: the checkpoint cannot be loaded or compressed.
    """

    def __init__(
        self,
        family: Family,
        checkpoint: str,
        config: StarKVConfig,
        device: str = "cpu",
        pixels: tuple[int | None, int | None] = (None, None),
        trust_remote_code: bool = False,
    ) -> None:
        self.family, self.config = family, config
        self.model, self.processor = _load(family, checkpoint, trust_remote_code)
        self.model.to(device).eval()
        images = self.processor.image_processor
        for name, limit in zip(("shortest_edge", "longest_edge"), pixels, strict=True):
            if limit is not None:
                images.size = {**dict(images.size), name: limit}
        self._checked: set[Size] = set()
        starkv_compile.compile(self.model, config)

    @torch.no_grad()
    def answer(self, sample: Sample, max_new_tokens: int) -> Answer:
        """Answers a sample greedily, on a new cache.

        Raises:
            StarKVError: a screenshot cannot be read, or the processor resized it in an unknown way.
        """
        pictures = [open_screen(screen) for screen in sample.screens]
        screens = [self.screen(picture.size) for picture in pictures]
        chat = self.family.messages(sample, screens)
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=pictures, return_tensors="pt")
        grid = inputs.get("image_grid_thw", inputs.get("grid_thws"))
        check_shown(screens, grid, self.processor.image_processor.patch_size)
        inputs = inputs.to(self.model.device)
        cache = StarKVCache(self.model.config)
        started = self.now()
        output = self.model.generate(
            **inputs, **with_cache(cache), max_new_tokens=max_new_tokens, do_sample=False
        )
        seconds = self.now() - started
        new = output[:, inputs["input_ids"].shape[1] :]
        [said] = self.processor.batch_decode(new, skip_special_tokens=True)
        decoded = new.shape[1] - 1  # the last token is never fed back
        return Answer(prompt, said, screens[-1], **counts(cache, decoded), seconds=seconds)

    def screen(self, size: Size) -> Screen:
        """Returns a screenshot's size, and the size that the model sees."""
        return Screen(size, shown_size(size, self.processor.image_processor))

    def check_size(self, picture: Image) -> None:
        """Raises `StarKVError` if the processor resizes pictures of this size in an unknown way."""
        if picture.size in self._checked:
            return
        images = self.processor.image_processor
        grid = images(images=[picture], return_tensors="pt")["image_grid_thw"]
        check_shown([self.screen(picture.size)], grid, images.patch_size)
        self._checked.add(picture.size)

    def now(self) -> float:
        """Returns the time in seconds, when the device has done all its work."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def counts(cache: StarKVCache, decoded: int) -> dict[str, Any]:
    """Returns the tokens and bytes of an `Answer`. decoded: tokens of the reply in the cache."""
    layers = cache.compressed_layers
    seen = layers[0].seen
    left = seen - layers[0].retired  # of old screenshots, a full cache would store nothing either
    return {
        "kept": sum(layer.stored for layer in layers) / len(layers) - decoded,
        "seen": left - decoded,
        "nbytes": cache.nbytes,
        "full_nbytes": cache.full_nbytes * left // seen,
    }


def _load(family: Family, checkpoint: str, trust: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        if family.load is not None:
            return family.load(checkpoint, trust)
        own = {"trust_remote_code": trust}
        processor = AutoProcessor.from_pretrained(checkpoint, **own)
        load = AutoModelForImageTextToText.from_pretrained
        return load(checkpoint, dtype="auto", **own), processor
    except StarKVError:
        raise
    except ImportError as error:
        raise MissingPackage(
            f"{checkpoint}: its files need a package that is not installed ({error})"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()
        raise StarKVError(
            f"{checkpoint}: no checkpoint that can be loaded ({said[0] if said else error}); give "
            "a "
            "folder or a name on Hugging Face's hub"
        ) from error
