"""The simulated scheduler: as vLLM counted, and blocks that add up."""

import random

import pytest

from benchmarks.serving_simulator import GPUS, MODELS, Engine, Request, agent, check, pool_of
from starkv_compile.serving.rule import Rule

FIFTH = Rule.of({"budget": 0.2})


def test_it_counts_what_vllm_counted(capsys):
    assert check()
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize("rule", [None, FIFTH], ids=["full", "20 %"])
@pytest.mark.parametrize("caching", [False, True])
def test_blocks_add_up(rule, caching):
    generator = random.Random(0)
    for _ in range(20):
        sessions = [
            [
                Request(generator.randint(2, 600), generator.randint(1, 60), 300, 1.0)
                for _ in range(4)
            ]
            for _ in range(8)
        ]
        engine = Engine(45, 16, rule, caching)
        report = engine.run(sessions)
        assert report.requests == 32
        assert report.said == sum(r.reply for session in sessions for r in session)
        assert engine.free == 45
        assert sum(engine.kept.values()) <= 45
        assert bool(engine.kept) == caching


def test_a_hit_ends_where_the_prompt_was_written_again():
    session = agent(6, 500, 80)
    computed = {}
    for name, rule in (("full", None), ("20 %", FIFTH)):
        computed[name] = Engine(4_000, 16, rule).run([session]).computed
    whole = sum(request.prompt + request.reply - 1 for request in session)
    assert computed["full"] < computed["20 %"] < whole
    alone = Engine(4_000, 16, FIFTH, caching=False).run([session]).computed
    assert alone == whole


def test_a_prompt_that_cannot_fit_is_said():
    with pytest.raises(ValueError, match="does not fit"):
        Engine(3, 16).run([[Request(100, 5)]])


def test_a_pool_beside_the_weights():
    model, gpu = MODELS["qwen3-vl-8b"], GPUS["h100"]
    assert model.token_bytes == 147_456
    tokens = 16 * pool_of(model, gpu, 1, 16)
    assert 300_000 < tokens < 400_000
    assert pool_of(model, gpu, 2, 16) > 2 * pool_of(model, gpu, 1, 16)
