"""The examples run, on tiny random models where they would download one."""

import importlib.util
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM

from starkv_compile import StarKVConfig
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TinyProcessor:
    """What the example asks of a processor, for `tiny_model`: one frame of 6 x 6 tokens a call."""

    def __init__(self, family):
        self.family = family

    def apply_chat_template(self, chat, add_generation_prompt):
        assert add_generation_prompt
        return "".join(part.get("text", "<image>") for part in chat[0]["content"])

    def __call__(self, text, images, return_tensors):
        assert len(text) == len(images) == 1
        return BatchFeature(tiny_inputs(self.family, TinyPrompt(grids=((6, 6),))))

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows.tolist()]


@pytest.fixture
def screenshot_path(tmp_path):
    path = tmp_path / "screen.png"
    Image.new("RGB", (64, 64), "white").save(path)
    return str(path)


def test_qwen2_5_vl(monkeypatch, capsys, screenshot_path):
    example = load_example("qwen2_5_vl")
    model = tiny_model("qwen2_5_vl")
    monkeypatch.setattr(example, "load", lambda name: (model, TinyProcessor("qwen2_5_vl")))
    example.main([screenshot_path, "Where?", "--tokens", "3", "--inner", "eager"])
    answer, *report = capsys.readouterr().out.splitlines()
    assert len(answer.split()) == 3
    assert "2 of 2 attentions rewritten" in report[0]
    tokens = tiny_inputs("qwen2_5_vl", TinyPrompt(grids=((6, 6),)))["input_ids"].shape[1]
    kept = [line for line in report if f"{tokens // 5} / {tokens}" in line]
    assert len(kept) == 2


def test_own_module(capsys):
    load_example("own_module").main(["--budget", "0.25", "--tokens", "64"])
    out = capsys.readouterr().out
    assert "attentions rewritten: 1 of 1" in out
    assert "[1, 2, 64, 16] -> [1, 2, 16, 16]" in out
    assert "logits unchanged: True" in out


@pytest.mark.slow(ci=True)
@pytest.mark.skipif(
    not (files("starkv_lab") / "agent" / "checkpoint" / "model.safetensors").is_file(),
    reason="the demo agent's checkpoint is not in this tree",
)
def test_agent_loop_on_the_shipped_agent(capsys):
    load_example("agent_loop").main(["--steps", "3", "--budget", "0.3", "--inner", "eager"])
    check_agent_output(capsys.readouterr().out, steps=3)


@pytest.mark.slow
def test_agent_loop_on_an_untrained_agent(monkeypatch, capsys):
    """The loop itself, whatever the replies: it needs no checkpoint."""
    from starkv_lab.agent import architecture
    from starkv_lab.agent.processor import AgentProcessor
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(architecture.build_config()).eval()
    processor = AgentProcessor(
        architecture.build_image_processor(),
        architecture.build_tokenizer(),
        architecture.CHAT_TEMPLATE,
    )
    example = load_example("agent_loop")
    monkeypatch.setattr(example, "load", lambda name: (model, processor))
    example.main(["--steps", "3", "--budget", "0.3", "--tokens", "4", "--inner", "eager"])
    check_agent_output(capsys.readouterr().out, steps=3)


def check_agent_output(out, steps):
    counts = [tuple(map(int, m)) for m in re.findall(r"(\d+) of (\d+) tokens stored", out)]
    assert len(counts) == steps
    seen = [0, *(total for _, total in counts)]
    assert seen == sorted(set(seen))
    assert all(stored < total / 2 for stored, total in counts)
    assert "rewritten" in out
    assert "left uncompressed" not in out


@pytest.mark.slow
def test_an_export_runs_without_pytorch(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from starkv_compile.export.onnx.package import ExportOptions, export_model
    from starkv_compile.export.runner import load_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    model.generation_config.eos_token_id = None
    model.config.save_pretrained(tmp_path)
    options = ExportOptions(
        checkpoint=tmp_path, out=tmp_path / "out", config=StarKVConfig(budget=0.3), max_seq=200
    )
    folder = export_model(model, options, lambda name: None)
    prompt = torch.randint(99, (1, 50))
    program = EXAMPLES / "numpy_onnxruntime.py"
    without = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(program)!r}, "
    command = [sys.executable, "-c", without + "run_name='__main__')", str(folder)]
    words = map(str, prompt[0].tolist())
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert "15 of 50 tokens stay cached" in done.stderr
    expected = load_model(folder).generate(prompt, max_new_tokens=16, do_sample=False)
    assert [int(word) for word in done.stdout.split()] == expected[0, 50:].tolist()
