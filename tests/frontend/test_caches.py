"""Compiled graphs in the caches on disk: a second process takes them, another graph does not."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, warnings
import torch
from torch._dynamo.utils import counters
import starkv_compile
from starkv_compile.testing import generate, tiny_inputs, tiny_model

warnings.filterwarnings("error", message="starkv: the passes failed")
budget, given, tokens = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if given:
    torch.compiler.load_cache_artifacts(open(given, "rb").read())
model = starkv_compile.compile(tiny_model("llava", num_hidden_layers=3), budget=budget)
out = generate(model, tiny_inputs("llava"), tokens)
found = counters["aot_autograd"]
artifacts = torch.compiler.save_cache_artifacts()
if len(sys.argv) > 4 and artifacts is not None:
    open(sys.argv[4], "wb").write(artifacts[0])
kept = [layer.kept.tolist() for layer in out.past_key_values.layers]
print(json.dumps({
    "hits": found["autograd_cache_hit"], "misses": found["autograd_cache_miss"],
    "bypassed": found["autograd_cache_bypass"], "said": out.sequences.tolist(), "kept": kept,
}))
"""


def run(folder, *arguments):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_and_another_machine_take_everything(tmp_path):
    first = run(tmp_path / "one", 0.3, "", 3, tmp_path / "artifacts")
    assert (first["hits"], first["bypassed"]) == (0, 0)
    assert first["misses"] > 0
    for folder, given in (("one", ""), ("empty", tmp_path / "artifacts")):
        again = run(tmp_path / folder, 0.3, given, 3)
        assert (again["hits"], again["misses"]) == (first["misses"], 0)
        assert (again["kept"], again["said"]) == (first["kept"], first["said"])
    other = run(tmp_path / "one", 0.2, "", 1)
    assert other["misses"] > 0, "the prompt's graph is another one"
    assert len(other["kept"][0][0]) < len(first["kept"][0][0])
