"""Engines, by a stand-in for TensorRT: what is asked of it, what is left where it is missing."""

import shutil
import sys

import pytest
import torch
from starkv_lab.agent.checkpoints import SHIPPED

from starkv_compile import StarKVError
from starkv_compile import optional as packages
from starkv_compile.cli import main
from starkv_compile.export.onnx import package
from starkv_compile.export.runner import load_model
from starkv_compile.export.tensorrt import engine, engine_graph
from starkv_compile.export.tensorrt.engine import EngineError, build_engines
from starkv_compile.export.tensorrt.profiles import lengths, profile
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs
from tests.support import stand_in_tensorrt
from tests.support.same import assert_same_cache
from tests.support.trajectory import steps


@pytest.fixture
def tensorrt(monkeypatch):
    """It and a GPU are there, as far as anybody can tell."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt)
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    monkeypatch.setattr(engine_graph, "DEVICE", "cpu")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported.folder, tmp_path / "folder")


def quiet(text):
    return None


@pytest.mark.parametrize("exported", ["topk", "static"], indirect=True)
def test_an_agent_on_engines_answers_as_the_compiled_model(exported, folder, tensorrt):
    built = build_engines(folder, quiet)
    assert [file.name for file in built] == ["decode.engine", "prefill.engine", "visual.engine"]
    model = load_model(folder, "tensorrt")
    inputs = tiny_inputs(exported.family, TinyPrompt(((4, 4), (3, 5)), text=20))
    mine, theirs = (generate(m, inputs, tokens=5) for m in (model, exported.compiled))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert_same_cache(mine.past_key_values, theirs.past_key_values, exported.layers)


@pytest.mark.slow
def test_steps_of_a_session_on_engines(exports, tmp_path, tensorrt):
    """In buffers, which each engine writes in place."""
    exported = exports("static")
    folder = shutil.copytree(exported.folder, tmp_path / "folder")
    build_engines(folder, quiet)
    runs = [
        steps(m, exported.family, 4) for m in (load_model(folder, "tensorrt"), exported.compiled)
    ]
    given = before = None
    for (mine, left), (theirs, right) in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert_same_cache(left, right, exported.layers)
        assert given is None or torch.equal(given, before), "a copy is written, not what is given"
        given = left.compressed_layers[0].keys
        before = given.clone()


def test_a_graph_that_is_refused_leaves_no_engine(folder, tensorrt):
    (folder / "prefill.refused").touch()
    before = sorted(folder.iterdir())
    with pytest.raises(EngineError, match=r"prefill.onnx: TensorRT 0.0 refuses it: out of memory"):
        build_engines(folder, quiet)
    assert sorted(folder.iterdir()) == before


def test_engines_that_cannot_be_run(folder, tensorrt, monkeypatch):
    with pytest.raises(EngineError, match="no such engine; export with --engine"):
        load_model(folder, "tensorrt")
    build_engines(folder, quiet)
    graph = engine_graph.EngineGraph(folder / "visual.engine", stand_in_tensorrt)
    pixels = torch.zeros(5000, 96)
    with pytest.raises(StarKVError, match=r"pixel_values of shape \[5000, 96\] is not in"):
        graph({"pixel_values": pixels, "position_ids": torch.zeros(5000, 2)})
    (folder / "prefill.engine").write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match=r"magic tag does not match.*build it again here"):
        load_model(folder, "tensorrt")


def export(capsys, monkeypatch, folder, out):
    """The command with --engine, its graphs exported already."""
    monkeypatch.setattr(package, "load_pretrained", lambda checkpoint, config, dtype: None)
    monkeypatch.setattr(
        package,
        "_write",
        lambda model, options, to, say: shutil.copytree(folder, to, dirs_exist_ok=True),
    )
    code = main(["export", str(SHIPPED), "-o", str(out), "--max-seq", "1024", "--engine"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("missing", ["TensorRT", "GPU"])
def test_what_is_missing_is_said_with_the_lines_to_run_elsewhere(
    missing, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt if missing == "GPU" else None)
    monkeypatch.setattr(engine, "has_gpu", lambda: missing != "GPU")
    out = tmp_path / "out"
    code, err = export(capsys, monkeypatch, folder, out)
    assert code == 2
    said, *lines = err.splitlines()
    assert said.startswith(f"starkv: {out}: the graphs are written, but the engines are not: ")
    assert ("no GPU" if missing == "GPU" else "tensorrt cannot be imported") in said
    assert [line.split()[1] for line in lines] == [
        "--onnx=decode.onnx",
        "--onnx=prefill.onnx",
        "--onnx=visual.onnx",
    ]
    assert "--minShapes=input_ids:1x2,position_ids:3x1x2," in lines[1]
    assert "past.1.key:1x2x100x16" in lines[1].split("--optShapes=")[1]
    assert {file.name for file in out.iterdir()} == {file.name for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["topk", "static"])
def test_what_trtexec_cannot_build_is_said_of_a_static_cache(form, exports, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError) as raised:
        build_engines(exports(form).folder, quiet)
    limit = "trtexec cannot build a static cache in float32 or with 24,576 slots"
    assert (limit in str(raised.value)) == (form == "static")


def test_engines_are_built_by_the_command(folder, tmp_path, capsys, monkeypatch, tensorrt):
    code, err = export(capsys, monkeypatch, folder, tmp_path / "out")
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "out").glob("*.engine"))) == 3


def test_every_length_of_every_graph_has_a_range(exported):
    for file in exported.folder.glob("*.onnx"):
        shapes = profile(file, lengths(1024, batch=3))
        assert shapes.most
        for name, least in shapes.least.items():
            assert all(
                a <= b <= c
                for a, b, c in zip(least, shapes.usual[name], shapes.most[name], strict=True)
            )
    assert lengths(1024, slots=64)["stored"] == (0, 64, 64), "nothing stores more than the slots"
    with pytest.raises(StarKVError, match="has a length 'batch', for which no range is known"):
        profile(exported.folder / "decode.onnx", {})


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("2.11.0+cu130", "torch 2.11 needs TensorRT 10.15: .*tensorrt-2-11]'"),
        ("2.14.0", "torch 2.14 needs TensorRT 11.1: .*tensorrt-2-14]'"),
        ("2.15.0", "no release for torch 2.15; .* 2.11, 2.13, 2.14: .*tensorrt-2-14]'"),
    ],
)
def test_the_pair_that_fits_this_torch_is_named(release, said, monkeypatch):
    monkeypatch.setattr(torch, "__version__", release)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(packages.MissingPackage, match=said):
        engine.needs_tensorrt("tensorrt")
