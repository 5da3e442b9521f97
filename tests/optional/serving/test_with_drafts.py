"""Drafted tokens. The last file: ngram drafts import numba, and after that vLLM 0.32 cannot make
another engine in the process."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from benchmarks.engines import engine


def test_drafts_of_ngrams(folder, asked, expected):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    with engine(folder, {"budget": 0.2}, speculative_config=drafts) as one:
        assert one.tokens(asked[0]) == expected[0.2]
