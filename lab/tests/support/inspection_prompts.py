"""Prompts for tiny models, as `inspection.prompt` makes them for real ones."""

from PIL import Image
from starkv_lab.inspection.prompt import InspectedPrompt, Picture

from starkv_compile.testing import TinyPrompt as Tokens
from starkv_compile.testing import tiny_inputs, tiny_model


class Numbers:
    """A tokenizer whose words are the tokens' numbers."""

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(f"w{int(token)}" for token in tokens)


def tiny_prompt(family, grids=((4, 5), (3, 4)), text=20):
    inputs = tiny_inputs(family, Tokens(grids=grids, text=text))
    pictures = [
        Picture(f"picture {i}", Image.new("RGB", (columns * 9, rows * 9), (30, 90, 160)))
        for i, (rows, columns) in enumerate(grids)
    ]
    return InspectedPrompt(
        tiny_model(family), f"tiny {family}", Numbers(), inputs, tuple(pictures), "which?"
    )
