"""Programs for torch-tensorrt: as the compiled model when PyTorch runs them; what it is told."""

import sys
from copy import deepcopy
from types import ModuleType, SimpleNamespace

import pytest
import torch

import starkv_compile
from starkv_compile import OptionError, StarKVConfig, UnsupportedModel
from starkv_compile.errors import MissingPackage
from starkv_compile.export import runner, runtime
from starkv_compile.export.capture.decoder import Decoder, describe
from starkv_compile.export.graphs import open_graph
from starkv_compile.export.onnx.manifest import Manifest
from starkv_compile.export.tensorrt.programs import export_programs
from starkv_compile.export.tensorrt.torch_trt import compile_program
from starkv_compile.passes import fx, ops
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.same import assert_same_cache
from tests.support.trajectory import steps

FAMILY, CONFIG, MAX_SEQ = "qwen2_vl", StarKVConfig(budget=0.3), 400


@pytest.fixture(scope="module")
def model():
    return tiny_model(FAMILY, num_hidden_layers=1)


@pytest.fixture(scope="module")
def programs(model):
    return export_programs(model, CONFIG, MAX_SEQ, batch=2)


class ProgramGraph:
    """A program that PyTorch runs, as `graphs.Graph`."""

    def __init__(self, program):
        self.program, self.module = program, program.exported.module(check_guards=False)

    def __call__(self, feeds, buffers=None):
        return self.program.run(self.module, feeds)


@pytest.fixture
def pair(model, programs, tmp_path, monkeypatch):
    """(a model that runs the programs, the compiled model)."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install '.[export]'")
    from starkv_compile.export.onnx.visual import export_visual
    from starkv_compile.export.onnx.weights import Weights

    shapes = describe(model, Decoder(model))
    visual = export_visual(model, Weights(tmp_path), 20, lambda text: None)
    Manifest(type(model).__name__, shapes, CONFIG, MAX_SEQ, 20, "threshold", visual).write(tmp_path)
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)

    def opened(file, provider):
        found = programs.get(file.stem)
        return open_graph(file, provider) if found is None else ProgramGraph(found)

    for module in (runner, runtime):
        monkeypatch.setattr(module, "open_graph", opened)
    loaded = runner.load_model(tmp_path)
    starkv_compile.compile(model, budget=0.3, inner="eager")
    yield loaded, model
    starkv_compile.undo(model)


PROMPTS = {
    "two frames": [TinyPrompt(((4, 4), (3, 5)), text=20)],
    "text": [TinyPrompt((), text=40)],
    "padded": [TinyPrompt(((4, 4),), text=9), TinyPrompt(((3, 4), (5, 5)), text=30)],
}


@pytest.mark.slow
def test_programs_answer_as_the_compiled_model(pair):
    for prompts in PROMPTS.values():
        inputs = tiny_inputs(FAMILY, *prompts)
        mine, theirs = (generate(m, inputs, tokens=4) for m in pair)
        assert torch.equal(mine.sequences, theirs.sequences)
        assert_same_cache(mine.past_key_values, theirs.past_key_values, 1)


@pytest.mark.slow
def test_steps_on_what_is_stored(pair):
    runs = (steps(model, FAMILY, 5) for model in pair)
    for (mine, left), (theirs, right) in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert_same_cache(left, right, 1)


@pytest.mark.slow(ci=True)
def test_heads_are_those_that_are_stored_and_numbers(programs):
    for program in programs.values():
        attentions = [n for n in program.exported.graph.nodes if fx.is_op(n, ops.SDPA)]
        assert len(attentions) == 1
        assert [fx.shape(n)[1] for n in attentions[0].args[:3]] == [4, 2, 2]
        reshapes = [n for n in program.exported.graph.nodes if fx.is_op(n, ops.RESHAPE)]
        assert reshapes
        for node in reshapes:
            left = [n for n, told in zip(fx.shape(node), node.args[1], strict=True) if told == -1]
            assert not any(isinstance(length, int) for length in left)


@pytest.mark.slow(ci=True)
def test_what_torch_tensorrt_is_told(programs, monkeypatch):
    told = {}

    def compiled(exported, arg_inputs, **settings):
        told.update(settings, inputs=arg_inputs)
        return exported.module(check_guards=False)

    package = ModuleType("torch_tensorrt")
    package.dynamo, package.Input = SimpleNamespace(compile=compiled), SimpleNamespace
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    program = programs["decode"]
    module = compile_program(program, device="cpu", min_block_size=1)
    assert (told["attn_bias_is_causal"], told["disable_tf32"]) == (False, True)
    assert told["min_block_size"] == 1
    by_name = dict(zip((port.name for port in program.inputs), told["inputs"], strict=True))
    key = by_name["past.0.key"]
    assert (key.min_shape, key.opt_shape, key.max_shape) == (
        [1, 2, 0, 16],
        [1, 2, 100, 16],
        [2, 2, 400, 16],
    )
    assert by_name["input_ids"].dtype == torch.int64
    sizes = {"batch": 2, "seen": 9, "stored": 5}
    feeds = {p.name: torch.ones(p.shape(sizes), dtype=p.dtype) for p in program.inputs}
    found = program.run(module, feeds)
    assert list(found) == ["logits", "present.0.key", "present.0.value"]
    assert found["present.0.key"].shape == (2, 2, 6, 16)


def test_what_no_program_does_is_refused(model):
    with pytest.raises(OptionError, match="policy='snapkv' is not exported yet"):
        export_programs(model, StarKVConfig(budget=0.3, policy="snapkv"), MAX_SEQ)
    with pytest.raises(UnsupportedModel, match=r"on meta: .*call model.cpu\(\) first"):
        export_programs(deepcopy(model).to("meta"), CONFIG, MAX_SEQ)


@pytest.mark.slow(ci=True)
def test_without_torch_tensorrt_one_error_names_the_extra(programs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingPackage, match=r"torch_tensorrt cannot .*'\.\[tensorrt-"):
        compile_program(programs["decode"])
