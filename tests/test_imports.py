"""Importing must cost nothing and touch nothing; checked in processes of their own."""

import subprocess
import sys
from pathlib import Path

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


def test_passes_need_no_import_of_their_own():
    assert "function apply" in run("import starkv_compile; print(starkv_compile.passes.apply)")


def test_backend_is_found_without_importing_the_package():
    out = run("import torch; print('starkv' in torch._dynamo.list_backends())")
    assert out.strip() == "True"


def test_model_class_imports_from_the_repository_root():
    """transformers probes the import name `kernels`; ours must not be found under it."""
    out = run(
        "from transformers import LlamaForCausalLM\n"
        "import importlib.util\n"
        "print(importlib.util.find_spec('kernels'))"
    )
    assert out.strip() == "None"


def test_triton_is_not_needed():
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import starkv_compile.passes, starkv_compile.cache.cache, starkv_compile.frontend.entry"
    )


def test_other_backends_are_untouched():
    out = run(
        "import torch, starkv_compile.frontend.entry\n"
        "m = torch.nn.Linear(2, 2)\n"
        "c = torch.compile(m, backend='eager')\n"
        "c(torch.ones(1, 2))\n"
        "print(m._compiled_call_impl, 'OptimizedModule' in type(c).__name__)"
    )
    assert out.strip() == "None True"
