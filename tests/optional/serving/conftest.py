"""`make test-serving` installs vLLM in an environment of its own, and runs these tests there."""

import pytest

PROMPTS = 12
BUDGET = {"budget": 0.2}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from benchmarks.engines import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="session")
def asked():
    """Prompts of four screenshots, and their questions."""
    from benchmarks.engines import prompts

    return prompts(PROMPTS)


@pytest.fixture(scope="session")
def expected(folder, asked):
    """Tokens of an engine with room for all prompts, by budget: what every scenario must say."""
    from benchmarks.engines import engine

    with engine(folder, BUDGET) as fresh:
        return {budget: fresh.tokens(asked[0], budget) for budget in (1.0, 0.5, 0.2)}
