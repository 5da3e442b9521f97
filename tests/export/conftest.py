"""Exporting takes up to a minute of one core, so one process exports each form, for all tests."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import starkv_compile
from starkv_compile import StarKVConfig
from starkv_compile.testing import tiny_model

FORMS = {
    "topk": ("qwen2_vl", 2, "starkv", {"select": "topk"}),
    "novelty": ("qwen3_vl", 1, "screen_novelty", {}),
    "threshold": ("qwen3_vl", 1, "starkv", {"select": "threshold"}),
    "float16": ("qwen2_vl", 1, "starkv", {"select": "topk", "dtype": "float16"}),
    "bfloat16": ("qwen2_vl", 1, "starkv", {"dtype": "bfloat16", "cache": "static"}),
    "static": ("qwen2_vl", 2, "screen_novelty", {"cache": "static", "slots": 128}),
    "4 bits": ("qwen3_vl", 2, "screen_novelty", {"nbits": 4}),
}
"""Family, layers, policy, options. Two layers share a cache part; deep features: Qwen3."""


IN_CI = ("topk",)
"""Forms that CI exports. The others differ in family, policy or options, and take a minute each."""


def pytest_itemcollected(item):
    """`make test` writes no ONNX of a whole model."""
    if "exports" in item.fixturenames:
        form = item.callspec.params.get("exported") if hasattr(item, "callspec") else None
        chosen = "exported" in item.fixturenames and (form or "topk") in IN_CI
        item.add_marker(pytest.mark.slow(ci=chosen))


@dataclass(frozen=True)
class Exported:
    """A tiny model compiled at budget 0.3, its folder, and the same model in ONNX Runtime.

    onnx: loaded when first asked for.
    """

    family: str
    layers: int
    compiled: Any
    folder: Path

    @cached_property
    def onnx(self):
        from starkv_compile.export.runner import load_model

        return load_model(self.folder)

    @property
    def pair(self):
        return self.compiled, self.onnx


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """By form, what was exported in it: made when first asked for."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install '.[export]'")
    made = {}

    def of(form):
        if form not in made:
            made[form] = _export(form, tmp_path_factory)
        return made[form]

    yield of
    for exported in made.values():
        starkv_compile.undo(exported.compiled)


@pytest.fixture
def exported(request, exports):
    """In the form that a test is parametrized with, by default `topk`."""
    return exports(getattr(request, "param", "topk"))


def _export(form, tmp_path_factory):
    from starkv_compile.export.onnx.package import DTYPES, ExportOptions, export_model

    family, layers, policy, form_options = FORMS[form]
    model = tiny_model(family, num_hidden_layers=layers)
    model.to(DTYPES[form_options.get("dtype", "float32")])
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model.config.save_pretrained(checkpoint)
    ours = {"budget": 0.3, "policy": policy, "nbits": form_options.get("nbits", 16)}
    of_export = {name: form_options[name] for name in form_options if name != "nbits"}
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path_factory.mktemp("exported") / "folder",
        config=StarKVConfig(**ours),
        max_seq=400,
        **of_export,
    )
    folder = export_model(model, options, lambda text: None)
    starkv_compile.compile(model, **ours, inner="eager")
    return Exported(family, layers, model, folder)
