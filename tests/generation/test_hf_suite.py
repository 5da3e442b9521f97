"""starkv injected into a suite of transformers' kind, in a process of its own; and its runner."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starkv_compile import OptionError
from tests.support.injected_calls import MODES, outputs
from tools.hf_suite import config_from

ROOT = Path(__file__).parents[2]
COMPILED = len(MODES) + 4  # images, a batch, and two turns
TOKENS = 5


def run(command, **environment):
    # As many threads as here: sums in another order may differ in the last bit.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **environment,
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def injected(tmp_path, budget):
    done = run(
        ["-m", "tests.support.injected_calls", tmp_path / "out.pt"],
        TRANSFORMERS_TEST_BACKEND="tools.hf_suite",
        STARKV_TEST_BUDGET=str(budget),
        STARKV_TEST_SUMMARY=str(tmp_path / "summary.json"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"{summary['calls']} calls of generate, {summary['compiled']} compiled" in done.stderr
    assert summary["calls"] == COMPILED + 2
    assert summary["compiled"] == COMPILED
    assert summary["graph_runs"] >= COMPILED * TOKENS // 2
    assert sorted(summary["not_compiled"].items()) == [
        ("an encoder-decoder model: its cache has two kinds of entries", 1),
        ("the test compiled the model itself", 1),
    ]
    return torch.load(tmp_path / "out.pt"), summary


@pytest.fixture(name="plain", scope="module")
def _plain():
    """The same calls, with the same inner backend and nothing of ours."""

    def prepare(model):
        torch._dynamo.reset()
        model.get_decoder().compile(backend="eager", dynamic=True)

    # At Dynamo's own limit the last calls run uncompiled, and differ in the last bit.
    with torch._dynamo.config.patch(recompile_limit=64):
        return dict(outputs(prepare))


@pytest.mark.slow
def test_at_budget_one_every_call_is_compiled_and_bit_identical(tmp_path, plain):
    saved, summary = injected(tmp_path, 1.0)
    assert (summary["compressed"], summary["left_whole"]) == (0, {})
    assert saved.keys() == plain.keys()
    for name, expected in plain.items():
        assert torch.equal(saved[name]["sequences"], expected.sequences), name
        for ours, theirs in zip(saved[name]["logits"], expected.logits, strict=True):
            assert torch.equal(ours, theirs), name
        assert saved[name]["cache"] == type(expected.past_key_values).__name__


@pytest.mark.slow
def test_at_half_shapes_format_and_end_hold(tmp_path, plain):
    saved, summary = injected(tmp_path, 0.5)
    whole = ("prompt lookup", "static cache")
    assert summary["compressed"] == COMPILED - len(whole)
    assert len(summary["left_whole"]) == len(whole), "each said once, with its reason"
    for name, expected in plain.items():
        ours = saved[name]
        if name == "prompt lookup":  # how many drafts are right decides how many logits there are
            assert torch.equal(ours["sequences"], expected.sequences)
            continue
        assert ours["sequences"].shape == expected.sequences.shape, name
        prompt = expected.sequences.shape[1] - TOKENS
        assert torch.equal(ours["sequences"][:, :prompt], expected.sequences[:, :prompt]) or (
            name == "second turn"  # its prompt is what the first turn said
        )
        assert len(ours["logits"]) == len(expected.logits)
        for left, right in zip(ours["logits"], expected.logits, strict=True):
            assert left.shape == right.shape
            assert left.isfinite().all()
        if name != "second turn":
            assert torch.equal(ours["logits"][0], expected.logits[0]), "the prompt reads everything"
        assert (ours["cache"] == "StarKVCache") == (name not in whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("STARKV_TEST_BUDGET", "2"), ("STARKV_TEST_BUDGET", "half"), ("STARKV_TEST_INNER", "onnx")],
)
def test_impossible_variables_are_named(name, value):
    with pytest.raises(OptionError, match=f"{name}='{value}'"):
        config_from({name: value})


def test_imported_for_another_reason_it_wraps_nothing():
    from transformers.generation import GenerationMixin

    assert GenerationMixin.generate.__module__ == "transformers.generation.utils"


SUITE = """
import transformers.testing_utils
from starkv_compile.testing import tiny_inputs, tiny_model


def test_cache_of_a_call():
    out = tiny_model("llava").generate(**tiny_inputs("llava"), max_new_tokens=2)
    assert out.shape[1] == 70


def test_that_is_not_about_generation():
    raise AssertionError
"""


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(name="repository")
def _repository(tmp_path):
    """As much of a repository as the runner fetches: a tag, and one of the listed files."""
    folder = tmp_path / "upstream"
    file = folder / "tests" / "models" / "llava" / "test_modeling_llava.py"
    file.parent.mkdir(parents=True)
    file.write_text(SUITE)
    version = importlib.metadata.version("transformers")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    git(folder, "tag", f"v{version}")
    return folder


@pytest.mark.slow
def test_the_runner_fetches_the_tag_and_runs_what_is_listed(repository, tmp_path):
    summary = tmp_path / "summary.json"
    done = run(
        [
            "tools/run_hf_suite.py",
            "--source",
            repository.as_uri(),
            "--folder",
            tmp_path / "clone",
            "--summary",
            summary,
        ]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 deselected" in done.stdout
    assert "not in this version: tests/utils/test_cache_utils.py" in done.stderr
    assert json.loads(summary.read_text())["compiled"] == 1


def test_without_a_network_the_runner_says_so(tmp_path):
    done = run(["tools/run_hf_suite.py", "--source", (tmp_path / "nowhere").as_uri()])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be fetched" in done.stderr
