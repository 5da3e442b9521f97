"""The command: mistakes named in one sentence with exit code 2, nothing half-written left."""

import json

import pytest
from starkv_lab.agent.checkpoints import SHIPPED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from starkv_compile import StarKVConfig, StarKVError
from starkv_compile.cli import main
from starkv_compile.errors import MissingPackage
from starkv_compile.export.onnx import package
from starkv_compile.export.onnx.graphs import Graph
from starkv_compile.export.onnx.manifest import Manifest
from starkv_compile.export.runner import OnnxSession, load_processor
from starkv_compile.optional import needs


def run(capsys, *arguments):
    code = main(["export", *map(str, arguments)])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no checkpoint (config.json is missing)"),
        ([SHIPPED, "--budget", "1.0"], "budget=1.0 keeps everything"),
        ([SHIPPED, "--budget", "20"], "for 20 percent write 20%"),
        ([SHIPPED, "--budget", "100%"], "budget=1.0 keeps everything"),
        ([SHIPPED, "--budget", "x"], "budget 'x': expected a share such as 0.2"),
        ([SHIPPED, "--max-seq", "4"], "max_seq=4: expected at least 16"),
        ([SHIPPED, "--max-seq", "9000"], "max_seq=9000: the model has positions for 8192 tokens"),
        ([SHIPPED, "--max-seq", "9000"], "--max-seq 8192 or less"),
        ([SHIPPED, "--slots", "99"], "slots=99: a dynamic cache has none"),
        (
            [SHIPPED, "--cache", "static", "--slots", "99", "--max-seq", "999"],
            "slots=99: the budget keeps up to 199 of 999 tokens, and a reply needs room too; give "
            "at least 200",
        ),
    ],
)
def test_mistakes_are_named_and_leave_nothing(arguments, said, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    code, err = run(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ['{"model_type": "nobodys"}', "{}", "not json"])
def test_configurations_that_transformers_cannot_read(config, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "config.json").write_text(config)
    code, err = run(capsys, tmp_path, "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"starkv: {tmp_path}: this transformers cannot read config.json")
    assert err.count("\n") == 1


def test_unknown_model_types_and_folders_in_use(capsys, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    code, err = run(capsys, tmp_path, "-o", tmp_path / "out")
    assert (code, "model type 'vit'" in err) == (2, True)
    code, err = run(capsys, SHIPPED, "-o", tmp_path)
    assert (code, "exists already" in err) == (2, True)


def test_weights_that_are_not_there(capsys, tmp_path):
    pytest.importorskip("onnxscript")
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    checkpoint, arguments = tmp_path / "checkpoint", ["--max-seq", "64", "-o", tmp_path / "out"]
    config.save_pretrained(checkpoint)
    code, err = run(capsys, checkpoint, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{checkpoint}: its weights cannot be loaded into a LlamaForCausalLM" in err
    model = LlamaForCausalLM(config)
    weights = model.state_dict()
    del weights["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(checkpoint, state_dict=weights)
    code, err = run(capsys, checkpoint, *arguments)
    assert code == 2
    assert "1 weights are not in its files (model.layers.0.mlp.up_proj.weight" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def breaks(model, options, folder, say):
        (folder / "prefill.onnx").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "_write", breaks)
    options = package.ExportOptions(
        checkpoint=SHIPPED, out=tmp_path / "out", config=StarKVConfig(), max_seq=64
    )
    with pytest.raises(KeyboardInterrupt):
        package.export_model(None, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cache", "max_seq", "slots", "room"),
    [
        ("dynamic", 4000, None, 0),
        ("static", 4000, None, 800 + package.REPLY),
        ("static", 4000, 801, 801),
        ("static", 1000, None, 1000),
        ("static", 20, None, package.LEAST_SLOTS),
    ],
)
def test_room_of_a_static_cache(cache, max_seq, slots, room, tmp_path):
    options = package.ExportOptions(
        checkpoint=SHIPPED,
        out=tmp_path,
        config=StarKVConfig(),
        max_seq=max_seq,
        cache=cache,
        slots=slots,
    )
    assert options.room == room


def test_what_is_no_export_says_how_to_make_one(tmp_path):
    with pytest.raises(StarKVError, match="there is no export"):
        OnnxSession(tmp_path)
    (tmp_path / "export.json").write_text('{"format": 0}')
    with pytest.raises(StarKVError, match="export again"):
        Manifest.read(tmp_path)


def test_a_model_without_images_has_its_tokenizer_for_a_processor(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"left": 0, "right": 1}, "left"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert load_processor(tmp_path)("right")["input_ids"] == [1]


def test_missing_runtimes_are_named(tmp_path):
    with pytest.raises(MissingPackage, match=r"\.\[export\]"):
        needs("a_package_that_nobody_has")
    pytest.importorskip("onnxruntime")
    with pytest.raises(StarKVError, match="expected one of cpu, cuda, tensorrt"):
        Graph(tmp_path / "prefill.onnx", "tpu")
    with pytest.raises(StarKVError, match="no such file"):
        Graph(tmp_path / "prefill.onnx")
    (tmp_path / "prefill.onnx").write_text("no graph")
    with pytest.raises(StarKVError, match="cannot run it with CPUExecutionProvider"):
        Graph(tmp_path / "prefill.onnx")
