"""Prompts in chunks, where the installed transformers can read them."""

import pytest
import transformers


def skip_if_images_cannot_be_cut():
    """5.17 gives the second chunk of a Qwen-VL prompt positions of no row, with or without us.

    `tests/generation/test_modes.py` shows that it is so.
    """
    if transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 cannot read a Qwen-VL prompt in chunks")
