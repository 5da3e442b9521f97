"""A model whose heads are spread over processes: each keeps a set of its own heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.crossing import slow

PROGRAM = """
import json, os, sys, torch
import starkv_compile
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
ranks = int(os.environ.get("WORLD_SIZE", "1"))
spread = {"tp_plan": "auto"} if ranks > 1 else {}
model = AutoModelForCausalLM.from_pretrained(folder, **spread).eval()
model.generation_config.eos_token_id = None
ids = torch.randint(5, 100, (1, 60), generator=torch.Generator().manual_seed(0))
said = {}
for name in sys.argv[2:]:
    policy, budget = name.split()
    starkv_compile.compile(model, budget=float(budget), policy=policy, inner="eager")
    cache = starkv_compile.StarKVCache(model.config)
    out = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache)
    ids_and_more = torch.cat([out, ids[:, :9]], 1)  # a second prompt on the same cache
    out = model.generate(ids_and_more, max_new_tokens=6, do_sample=False, past_key_values=cache)
    layer = cache.layers[0]
    heads = [layer.stored, layer.keys.shape[1]]
    said[name] = [out[0, 60:].tolist(), *heads]
    starkv_compile.undo(model)
with open(f"{folder}/said-{os.environ.get('RANK', 0)}", "w") as file:
    json.dump(said, file)
if ranks > 1:
    torch.distributed.destroy_process_group()
"""


BY_HEAD, BY_TOKEN, ALL = "snapkv 0.3", "screen_novelty 0.3", "screen_novelty 1.0"


def said(folder, ranks, *names):
    """What each rank says for each policy and budget: tokens, tokens stored, heads stored."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(folder / "program.py"), str(folder), *names],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        initializer_range=0.3,
    )
    made = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(made)
    (made / "program.py").write_text(PROGRAM)
    return made


@pytest.fixture(scope="module")
def alone(folder):
    return said(folder, 1, BY_HEAD, BY_TOKEN, ALL)[0]


@pytest.mark.parametrize(
    ("ranks", "names"),
    [slow(2, (BY_HEAD, BY_TOKEN, ALL)), slow(4, (BY_HEAD,))],
)
def test_each_rank_keeps_a_set_of_its_own_heads(folder, alone, ranks, names):
    found = said(folder, ranks, *names)
    for rank in found:
        for name in {BY_HEAD, ALL} & set(names):
            tokens, stored, heads = alone[name]
            assert rank[name] == [tokens, stored, heads // ranks], name
        if BY_TOKEN in names:
            # One set for all of a rank's heads: not that of one process, but of one length.
            assert rank[BY_TOKEN] == found[0][BY_TOKEN]
            assert rank[BY_TOKEN][1] == alone[BY_TOKEN][1]
