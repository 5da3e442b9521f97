"""Compiled graphs in the caches on disk: a second process takes them, another graph does not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

PROGRAM = """
import json, sys, warnings
import torch
from torch._dynamo.utils import counters
import starkv_compile
from starkv_compile.testing import generate, tiny_inputs, tiny_model

warnings.filterwarnings("error", message="starkv: the passes failed")
budget, given, tokens, layers = float(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
if given:
    torch.compiler.load_cache_artifacts(open(given, "rb").read())
model = tiny_model("llava", num_hidden_layers=layers)
starkv_compile.compile(model, budget=budget, policy="snapkv_mean")  # few scores to compile
out = generate(model, tiny_inputs("llava"), tokens)
found = counters["aot_autograd"]
artifacts = torch.compiler.save_cache_artifacts()
if len(sys.argv) > 5 and artifacts is not None:
    open(sys.argv[5], "wb").write(artifacts[0])
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


class Layers(torch.nn.Module):
    """Three layers of attention, which return their keys and values."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(3))

    def forward(self, x):
        pairs = []
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            pairs += [k, v]
        return x, *pairs


@pytest.mark.slow
def test_a_graph_compiled_ahead_of_time_is_saved_and_loaded(tmp_path):
    model, x = Layers().eval(), torch.randn(1, 40, 32)
    options = {"budget": 0.3, "shorten_outputs": True}
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="starkv", fullgraph=True, options=options)
        made = compiled.aot_compile(((x,), {}))
        expected = made(model, x)
        made.save_compiled_function(tmp_path / "model.bin")
        with open(tmp_path / "model.bin", "rb") as file:
            loaded = torch.compiler.load_compiled_function(file)(model, x)
    assert [t.shape[2] for t in expected[1:]] == [12] * 6
    for one, other in zip(loaded, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_dynamos_precompilation_stores_it(tmp_path, monkeypatch):
    """Dynamo may trace again, as it does without starkv; what it compiled is found."""
    monkeypatch.setenv("TORCH_CACHING_PRECOMPILE", "1")
    first, second = (run(tmp_path, 0.3, "", 1, 1) for _ in range(2))
    assert (second["hits"], second["misses"]) == (first["misses"], 0)
    assert second["kept"] == first["kept"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with what a process compiled, `one`, and its artifacts; and what it said.

    Two layers: one piece of code serves both.
    """
    folder = tmp_path_factory.mktemp("caches")
    return folder, run(folder / "one", 0.3, "", 1, 2, folder / "artifacts")


@pytest.mark.slow
@pytest.mark.parametrize(("caches", "given"), [("one", ""), ("empty", "artifacts")])
def test_a_second_process_and_another_machine_take_everything(first, caches, given):
    folder, said = first
    assert (said["hits"], said["bypassed"]) == (0, 0)
    assert said["misses"] > 0
    again = run(folder / caches, 0.3, given and folder / given, 1, 2)
    assert (again["hits"], again["misses"]) == (said["misses"], 0)
    assert (again["kept"], again["said"]) == (said["kept"], said["said"])


@pytest.mark.slow
def test_another_budget_takes_no_prompt_graph(first):
    folder, said = first
    other = run(folder / "one", 0.2, "", 1, 2)
    assert other["misses"] > 0, "the prompt's graph is another one"
    assert len(other["kept"][0][0]) < len(said["kept"][0][0])
