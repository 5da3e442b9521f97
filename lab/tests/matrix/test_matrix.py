"""The matrix of models: docs/models.md is of today's code, and the probe can say no.

`make test-models` writes the whole table anew and compares; here a family of each kind is.
"""

from pathlib import Path

import pytest
import transformers
from starkv_lab.matrix.checkpoints import CHECKPOINTS, asked_families
from starkv_lab.matrix.markdown import line
from starkv_lab.matrix.probe import Row, probe
from starkv_lab.matrix.tiny import families, shrink, tiny_config
from starkv_lab.matrix.words import in_words

from starkv_compile import OptionError
from starkv_compile.cli import main
from starkv_compile.kernels.ops import STARKV
from starkv_compile.passes import insert_compaction
from tests.support.crossing import first_in_ci

TABLE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
KINDS = {
    "qwen2_5_vl": "M-RoPE",
    "hyperclovax_vision_v2": "Qwen's vision, 1-D positions",
    "gemma3": "sliding layers",
    "lfm3_vl": "layers without attention, and sliding ones",
    "paligemma": "a prompt that sees all of itself",
    "mllama": "cross-attention",
    "mistral4": "latents",
    "git": "images that are no tokens of the prompt",
    "inkling2": "a sink",
    "pix2struct": "a family that cannot be tried",
}
same_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in TABLE,
    reason="the table is of another transformers",
)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Not here: Dynamo breaks graphs at the poisoned functions, and breaks are counted."""


@pytest.mark.parametrize("family", first_in_ci(list(KINDS)), ids=KINDS.get)
def test_a_family_of_each_kind(family):
    if family not in families():
        pytest.skip("not in this transformers")
    row = probe(family)
    assert row.verdict != "WRONG", row
    if f"transformers {transformers.__version__}," in TABLE:
        assert line(row) in TABLE.splitlines(), "run: starkv models --out docs/models.md"


@same_version
def test_the_table_has_every_family_of_the_library_and_no_wrong_one():
    listed = [row.split(" | ")[0].removeprefix("| ") for row in TABLE.splitlines()[1:]]
    assert set(families()) <= set(listed)
    assert "WRONG" not in TABLE


@pytest.mark.slow(ci=True)
def test_a_cache_that_keeps_one_token_too_many_is_called_wrong(monkeypatch):
    select = STARKV.select_tokens

    def one_more(scores, real, length, window, capacity):
        return select(scores, real, length, window, capacity + 1)

    monkeypatch.setattr(insert_compaction.STARKV, "select_tokens", one_more)
    assert probe("llava").verdict == "WRONG"


@pytest.mark.parametrize(
    "fault", [{"unchanged": False}, {"right": False}, {"kept": None}, {"fault": "KeyError: x"}]
)
def test_verdicts(fault):
    good = {"found": 2, "rewritten": 2, "unchanged": True, "kept": 9, "expected": 9}
    assert Row("x", **good).verdict == "compressed"
    assert Row("x", **{**good, **fault}).verdict == "WRONG"
    assert Row("x", unchanged=True).verdict == "uncompressed"
    assert Row("x", failure="no").verdict == "not tried"


def test_tiny_configurations_hold_one_layer_of_each_kind():
    assert tiny_config("gemma3").text_config.layer_types == [
        "sliding_attention",
        "full_attention",
    ]
    values = {"num_hidden_layers": 6, "sizes": [1, 2, 3, 4, 5, 6], "layer_types": [*"aababc"]}
    assert shrink(values) == {
        "num_hidden_layers": 3,
        "sizes": [1, 3, 6],
        "layer_types": ["a", "b", "c"],
    }


def test_special_tokens_are_apart_from_words():
    small = shrink(
        {"vocab_size": 9999, "image_token_id": 10, "boi_token_index": 5, "pad_token_id": 0}
    )
    assert small == {
        "vocab_size": 300,
        "image_token_id": 299,
        "boi_token_index": 298,
        "pad_token_id": 0,
    }


def test_command_names_an_unknown_family(capsys):
    assert main(["models", "qwen9_vl"]) == 2
    said = capsys.readouterr().err
    assert "'qwen9_vl' is no family of transformers" in said
    assert "did you mean 'qwen" in said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ByteDance-Seed/UI-TARS-1.5-7B", {"qwen2_5_vl": 1}),
        ("UI-TARS-72B-DPO", {"qwen2_vl": 1}),
        ("UI-TARS", {"qwen2_5_vl": 1, "qwen2_vl": 3}),
        ("mPLUG/GUI-Owl-1.5-8B-Instruct", {"qwen3_vl": 1}),
        ("Qwen3-VL-30B-A3B-Instruct", {"qwen3_vl_moe": 1}),
        ("qwen3-vl-8b", {"qwen3_vl": 1}),
        ("google/gemma-3n-E4B-it", {"gemma3n": 1}),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", {"idefics3": 1}),
        ("SmolVLM2-2.2B-Instruct", {"smolvlm": 1}),
        ("Hcompany/Holo2-30B-A3B", {"qwen3_vl_moe": 1}),
        ("llava", {"llava": 0}),
    ],
)
def test_a_checkpoint_leads_to_its_family(name, expected):
    found = asked_families([name], families())
    assert {family: len(said) for family, said in found.items()} == expected


def test_a_folder_leads_to_its_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    said = f"{tmp_path} has model_type 'gemma3'."
    assert asked_families([str(tmp_path)], families()) == {"gemma3": [said]}
    (tmp_path / "config.json").write_text('{"model_type": "opencua"}')
    with pytest.raises(OptionError, match="no such family to try"):
        asked_families([str(tmp_path)], families())
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(OptionError, match="it names no model_type"):
        asked_families([str(tmp_path)], families())


def test_known_checkpoints_are_of_families_of_this_transformers():
    assert {each.family for each in CHECKPOINTS} <= set(families())


@pytest.mark.slow
def test_an_answer_in_words(capsys):
    assert main(["models", "OpenCUA-7B"]) == 0
    shown = capsys.readouterr()
    about, verdict, kept, *others = shown.out.splitlines()
    assert about.startswith("OpenCUA has model_type 'qwen2_5_vl'. These checkpoints bring code")
    assert verdict == "qwen2_5_vl: compressed"
    assert kept.startswith("  2 of 2 attention layers are compressed. Each stores ")
    assert "starkv finds their tokens, and knows their rows and columns." in others[0]
    assert "trying a tiny random model of qwen2_5_vl (1 of 1)" in shown.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("x", failure="no inputs"), "could not be run here: no inputs"),
        (Row("x", found=2, unchanged=True, skipped={"a sink": 2}), "2 x a sink"),
        (Row("x", fault="KeyError: y", unchanged=True), "KeyError: y"),
    ],
)
def test_other_verdicts_in_words(row, said):
    words = in_words(row)
    assert words.startswith(f"x: {row.verdict}\n")
    assert said in words
