"""The OpenAI server with its real client: budgets by request, metrics, ranks."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")
openai = pytest.importorskip("openai", reason="vLLM brings it")

from benchmarks.engines import conversations  # noqa: E402
from benchmarks.servers import messages_for_client, metrics, server  # noqa: E402

BUDGET = {"budget": 0.2}
COUNT = 12


def ask(address, budget=None, seed=5000, count=COUNT, **extra):
    """Texts of replies to conversations. extra: more fields of each request."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    if budget is not None:
        extra["vllm_xargs"] = {"starkv_budget": budget}
    return [
        client.chat.completions.create(
            model="agent",
            messages=messages_for_client(messages),
            temperature=0,
            max_tokens=12,
            extra_body=extra,
        )
        .choices[0]
        .message.content
        for messages, _ in conversations(count, seed)
    ]


def right(replies):
    asked = [question for _, question in conversations(COUNT)]
    return sum(q.is_right(reply) for q, reply in zip(asked, replies, strict=True))


RANKS = {
    "one": (),
    "tensor parallel 2": ("--tensor-parallel-size", "2"),
    "data parallel 2": ("--data-parallel-size", "2"),
}


@pytest.mark.parametrize("options", RANKS.values(), ids=RANKS)
def test_chat(folder, options, tmp_path):
    with server(folder, BUDGET, *options, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)) as address:
        full, fifth = ask(address, 1.0), ask(address)
        assert right(full) >= COUNT - 2
        assert right(fifth) >= right(full) - 2
        assert sum(a == b for a, b in zip(full, fifth, strict=True)) >= COUNT - 3
        found = metrics(address)
        assert found["starkv:prompts_total"] == COUNT, "the others kept everything"
        kept, seen = found["starkv:kept_tokens_total"], found["starkv:prompt_tokens_total"]
        assert 0.2 <= kept / seen < 0.28
        ranks = 2 if "--tensor-parallel-size" in options else 1
        assert found["starkv:compactions_total"] == 4 * COUNT * ranks, "in each of four layers"
        assert found["starkv:compaction_seconds_total"] > 0
        new = {"seed": 9000, "count": 1}  # screenshots that the server has not seen
        with pytest.raises(openai.BadRequestError, match="starkv_budget"):
            ask(address, 2, **new)
        wrong = {
            "beam search": {"use_beam_search": True},
            "starkv_buget": {"vllm_xargs": {"starkv_buget": 0.5}},
            "vllm_xargs": {"starkv_budget": 0.5},
        }
        for why, fields in wrong.items():
            with pytest.raises(openai.BadRequestError, match=why):
                ask(address, **new, **fields)
        assert ask(address, **new), "a refused request does not harm the next one"
        assert ask(address)[:3] == fifth[:3]
