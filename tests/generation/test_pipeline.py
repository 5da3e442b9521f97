"""A compiled model in a pipeline of transformers."""

import pytest
from PIL import Image
from transformers import pipeline

import starkv_compile
from tests.support.llava_checkpoint import save_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_llava(tmp_path_factory.mktemp("llava")))


def test_in_a_pipeline(folder):
    ask = pipeline("image-text-to-text", folder, device="cpu")
    image = {"type": "image", "image": Image.effect_noise((30, 30), 80).convert("RGB")}
    words = {"type": "text", "text": " ".join(f"w{i}" for i in range(5, 15))}
    chat = [{"role": "user", "content": [image, words]}]
    starkv_compile.compile(ask.model, budget=0.3, inner="eager")
    (answer,) = ask(text=chat, max_new_tokens=4, do_sample=False)
    assert answer["generated_text"]
    report = starkv_compile.report(ask.model)
    seen = report.layers[0].in_session
    assert seen > 16 + 10
    assert [layer.stored for layer in report.layers] == [seen * 3 // 10] * 2
