"""Lets an environment with a CPU build of torch import PyPI's torchvision, a CUDA build.

    ENVIRONMENT/bin/python tools/torchvision_on_cpu.py

vLLM for CPUs brings that torchvision. Its compiled part cannot load, and its Python part fails at
two operators that it expects from there. The command writes a module and a `.pth` file into the
environment. Each new process then declares these operators when it imports torchvision. Nothing
that vLLM does with images calls them.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

NAME = "starkv_torchvision_on_cpu"
HOOK = '''\
"""Declares two operators of torchvision before it is imported. From tools/torchvision_on_cpu.py."""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms", "qnms")


class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for operator in OPERATORS:
                    torch.library.define(
                        f"torchvision::{operator}",
                        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                    )
        return None


sys.meta_path.insert(0, Finder())
'''


def main() -> None:
    folder = Path(sysconfig.get_path("purelib"))
    (folder / f"{NAME}.py").write_text(HOOK)
    (folder / f"{NAME}.pth").write_text(f"import {NAME}\n")
    print(f"written: {folder / NAME}.py")


if __name__ == "__main__":
    main()
