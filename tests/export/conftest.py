"""Exporting takes half a minute of one core, so a model is exported once for all tests."""

import pytest

from starkv_compile import StarKVConfig
from starkv_compile.export.package import ExportOptions, export_model
from starkv_compile.testing import tiny_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """(model, folder) of a tiny Qwen3-VL at budget 0.3."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install 'starkv-compile[export]'")
    model = tiny_model("qwen3_vl")
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model.config.save_pretrained(checkpoint)
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path_factory.mktemp("exported") / "folder",
        config=StarKVConfig(budget=0.3),
        max_seq=1024,
    )
    return model, export_model(model, options, lambda text: None)
