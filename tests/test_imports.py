"""Importing must cost nothing and touch nothing, and imports run downward from package to package.

The first is checked in processes of their own, the second on the source.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import CORE, DOOR, LAB, imports, imports_inside, packages

ROOT = Path(__file__).parents[1]


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_patches_nothing_and_loads_neither_triton_nor_transformers():
    out = run(
        "import sys, starkv_compile\n"
        "never = ('triton', 'transformers', 'starkv_compile.frontend.entry')\n"
        "print([name for name in never if name in sys.modules])"
    )
    assert out.strip() == "[]"
    run(
        "from torch._dynamo import eval_frame\n"  # which loads Triton where it is installed
        "before = eval_frame._TorchDynamoContext.__call__\n"
        "import starkv_compile\n"
        "assert eval_frame._TorchDynamoContext.__call__ is before"
    )


@pytest.mark.slow(ci=True)
def test_passes_need_no_import_of_their_own():
    assert "function apply" in run("import starkv_compile; print(starkv_compile.passes.apply)")


def test_backend_is_found_without_importing_the_package():
    out = run("import torch; print('starkv' in torch._dynamo.list_backends())")
    assert out.strip() == "True"


@pytest.mark.slow(ci=True)
def test_model_class_imports_from_the_repository_root():
    """transformers probes the import name `kernels`; ours must not be found under it."""
    out = run(
        "from transformers import LlamaForCausalLM\n"
        "import importlib.util\n"
        "print(importlib.util.find_spec('kernels'))"
    )
    assert out.strip() == "None"


@pytest.mark.slow(ci=True)
def test_triton_is_not_needed():
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import starkv_compile.passes, starkv_compile.cache.cache, starkv_compile.frontend.entry"
    )


@pytest.mark.slow
def test_other_backends_are_untouched():
    out = run(
        "import torch, starkv_compile.frontend.entry\n"
        "m = torch.nn.Linear(2, 2)\n"
        "c = torch.compile(m, backend='eager')\n"
        "c(torch.ones(1, 2))\n"
        "print(m._compiled_call_impl, 'OptimizedModule' in type(c).__name__)"
    )
    assert out.strip() == "None True"


@pytest.mark.slow(ci=True)
def test_passes_load_no_transformers():
    out = run("import sys, starkv_compile.passes\nprint('transformers' in sys.modules)")
    assert out.strip() == "False"


ORDER = (
    DOOR,
    "cli",
    "testing",
    "export",
    "serving",
    "frontend",
    "session",
    "passes",
    "config",
    "options",
    "cache",
    "policies",
    "vision",
    "hf",
    "kernels",
    "reporting",
    "validation",
    "lazy",
    "optional",
    "files",
    "errors",
)
"""Packages of the compiler, top to bottom: each may import those below it."""

NEVERS = (
    (CORE, LAB),  # the compiler is installed without the laboratory
    ("frontend", "export"),  # compiling a model needs no exporter
    ("export", "frontend"),  # an exported model runs without a compiler
    ("policies", "config"),  # the configuration holds a policy
    ("vision", "cache"),  # what a token shows does not depend on who stores it
    ("kernels", "policies"),  # a policy chooses its kernels
    ("cache", "frontend"),  # a cache works without a compiled model
    ("passes", "frontend"),  # so does a rewritten graph
)
"""The first never imports the second. They stand for themselves, however `ORDER` may change."""


def upward(root):
    """Imports against `ORDER` that no entry of `NEVERS` names."""
    place = {package: number for number, package in enumerate(ORDER)}
    return [
        one.where
        for one in imports(root)
        if one.target != LAB
        and (one.source, one.target) not in NEVERS
        and place[one.source] > place.get(one.target, place[DOOR])  # a name of the package itself
    ]


def forbidden(root, never):
    """Imports from the first package of `never` in its second."""
    source, target = never
    return [
        one.where for one in imports(root) if one.target == target and source in (CORE, one.source)
    ]


def test_every_package_has_its_place():
    assert packages(ROOT) <= set(ORDER)


def test_imports_run_downward():
    assert upward(ROOT) == []


@pytest.mark.parametrize("never", NEVERS, ids=" -> ".join)
def test_what_is_never_imported(never):
    assert forbidden(ROOT, never) == []


WAYS = {
    "at the top": "from ..{target} import something\n",
    "its package": "from .. import {target}\n",
    "by its full name": "import starkv_compile.{target}.inside\n",
    "in a function": "def late():\n    from ..{target}.inside import something\n",
    "for types": "if TYPE_CHECKING:\n    from ..{target} import something\n",
}


def tree(root, package, text):
    """A compiler of one package, whose one file is `text`."""
    folder = root / CORE / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "made_up.py").write_text(text)
    return f"{CORE}/{package}/made_up.py:{text.count(chr(10))}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("never", NEVERS[1:], ids=" -> ".join)
def test_a_forbidden_import_is_found(tmp_path, never, way):
    source, target = never
    where = tree(tmp_path, source, WAYS[way].format(target=target))
    assert forbidden(tmp_path, never) == [where]
    assert all(forbidden(tmp_path, other) == [] for other in NEVERS if other != never)


@pytest.mark.parametrize("package", ["kernels", "cli"])
@pytest.mark.parametrize("text", ["import starkv_lab.cli\n", "def f():\n    import starkv_lab\n"])
def test_an_import_of_the_laboratory_is_found(tmp_path, package, text):
    where = tree(tmp_path, package, text)
    assert forbidden(tmp_path, (CORE, LAB)) == [where]
    assert upward(tmp_path) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("source", "target"), [*zip(ORDER[2:], ORDER[1:], strict=False), ("hf", "session")]
)
def test_an_import_that_runs_upward_is_found(tmp_path, source, target, way):
    where = tree(tmp_path, source, WAYS[way].format(target=target))
    found = upward(tmp_path) + [w for never in NEVERS for w in forbidden(tmp_path, never)]
    assert found == [where]


@pytest.mark.parametrize("text", ["import starkv_compile\n", "from .. import __version__\n"])
def test_an_import_of_the_whole_package_runs_upward(tmp_path, text):
    where = tree(tmp_path, "cache", text)
    assert upward(tmp_path) == [where]


def test_imports_that_run_downward_are_allowed(tmp_path):
    lines = (
        "import torch",
        "from . import fx",
        "from ..cache.size import x",
        "from .. import errors",
    )
    tree(tmp_path, "passes", "\n".join(lines))
    assert upward(tmp_path) == []
    assert all(forbidden(tmp_path, never) == [] for never in NEVERS)


EXPORT = ("tensorrt", "onnx", "capture")
"""Folders of export, top to bottom."""


def upward_in_export(root):
    return [
        one.where
        for one in imports_inside(root, "export")
        if one.target in EXPORT and EXPORT.index(one.source) > EXPORT.index(one.target)
    ]


def test_imports_inside_export_run_downward():
    assert len(imports_inside(ROOT, "export")) > 5
    assert upward_in_export(ROOT) == []


def test_an_upward_import_inside_export_is_found(tmp_path):
    folder = tmp_path / CORE / "export" / "capture"
    folder.mkdir(parents=True)
    (folder / "made_up.py").write_text("def late():\n    from ..onnx.package import something\n")
    assert upward_in_export(tmp_path) == ["starkv_compile/export/capture/made_up.py:2"]
