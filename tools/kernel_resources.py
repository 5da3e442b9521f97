"""Compiles every kernel for every target, without a GPU, and compares with the committed table.

    python tools/kernel_resources.py            # compare; exit code 1 and a list of differences
    python tools/kernel_resources.py --write    # measure again and write the table

The command calls the real host wrappers on meta tensors, so the specialisations are those of a
launch. A stub replaces the driver. Triton's wheel has the assemblers and disassemblers. Each row
belongs to a version of Triton, and rows of other versions do not change.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default is about to change

import torch
import triton
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget

from starkv_compile.kernels import triton as kernels
from starkv_compile.kernels.reference.quantization import centre_of, quantize

TABLE = Path(__file__).parents[1] / "docs" / "kernel_resources.csv"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Most bytes of shared memory of a block. Only a launch refuses more, the compiler does not.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
# Instructions that multiply matrices: Ampere and Ada, Hopper, Blackwell, AMD.
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|DMMA)\b|\bv_mfma_\w+")


@dataclass(frozen=True)
class Case:
    """Holds a layer's shapes.

    whole: also run selection and ranks, which do not depend on them. codes: also decode with kept
    tokens of 8 and 4 bits.
    """

    name: str
    heads: int
    groups: int
    dim: int
    window: int
    dtype: torch.dtype
    mask: torch.dtype | None = None
    length: int = 8192
    batch: int = 1
    whole: bool = False
    codes: bool = False


CASES = (
    Case("Qwen2.5-VL-7B", 28, 4, 128, 8, torch.bfloat16, whole=True, codes=True),
    Case("Qwen2.5-VL-7B window 32", 28, 4, 128, 32, torch.bfloat16),
    Case("Qwen3-VL-8B", 32, 8, 128, 8, torch.float16),
    Case("padded batch", 28, 4, 128, 8, torch.bfloat16, torch.bool, batch=2, whole=True),
    Case("additive mask", 12, 2, 64, 8, torch.float32, torch.float32, batch=2, codes=True),
    Case("head 80", 16, 16, 80, 8, torch.bfloat16),
    Case("head 256", 4, 1, 256, 8, torch.bfloat16, codes=True),
)


@dataclass(frozen=True)
class Row:
    """Holds the resources of one compiled kernel. matrix: number of its matrix instructions."""

    triton: str
    target: str
    case: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    matrix: int
    instructions: int

    def faults(self) -> list[str]:
        """Returns what would make the kernel slow or prevent its launch."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"has {self.shared} bytes shared, limit {SHARED_LIMIT[self.target]}")
        if self.kernel.startswith(("row_sums", "score_keys", "attend_part")) and not self.matrix:
            found.append("has no matrix instruction")
        return found


def run_wrappers(case: Case) -> None:
    """Calls every host wrapper once, as a layer of `case` would."""

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, length, window = case.batch, case.length, case.window
    query = meta(batch, length, case.heads, case.dim).transpose(1, 2)
    key = meta(batch, case.groups, length, case.dim)
    mask = None if case.mask is None else meta(batch, 1, length, length, dtype=case.mask)
    real = None if case.mask is None else meta(batch, length, dtype=torch.bool)
    capacity = length // 5
    scores = kernels.window_attention(query, key, mask, case.dim**-0.5, window, capacity)
    total = meta(batch, case.heads, length, dtype=torch.float32)
    kernels.window_attention(query, key, mask, case.dim**-0.5, window, capacity, log_sum_exp=total)
    kept = meta(batch, capacity, dtype=torch.int64)
    kernels.gather_kv(key, key, kept, real)
    if case.codes:
        rows = meta(batch, case.groups, case.heads // case.groups, case.dim, dtype=torch.float32)
        added = None if case.mask is None else meta(batch, 1, 1, capacity, dtype=torch.float32)
        for nbits in (8, 4):
            stored = quantize(key[:, :, :capacity], centre_of(key), nbits)
            kernels.attend_codes(rows, rows[..., :1], stored, stored, added)
    if not case.whole:
        return
    frame = 2691
    place = meta(batch, frame, dtype=torch.int64)
    valid = meta(batch, frame, dtype=torch.bool)
    kernels.rank_histogram(scores[..., :frame], place, valid)
    kernels.select_tokens(scores[:, 0], real, length, window, capacity)


class StubDriver:
    """Replaces Triton's driver, to compile for a target. It never launches a kernel."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_target(self) -> GPUTarget:
        return list(TARGETS.values())[self.device]

    def get_current_device(self) -> int:
        return self.device  # one for each target, because Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case, target: str, driver: StubDriver) -> dict[str, Any]:
    """Returns the kernels by name, with a number for each compiled form."""
    driver.device = list(TARGETS).index(target)
    found: dict[Any, str] = {}
    run = triton.JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in found:
            form = sum(name.split("#")[0] == self.fn.__name__ for name in found.values())
            found[kernel] = f"{self.fn.__name__}#{form}"
        return kernel

    with (
        mock.patch.object(triton.JITFunction, "run", warm_up),
        mock.patch.object(torch.version, "hip", "6.0" if target.startswith("gfx") else None),
        set_wrap_triton_enabled(False),
    ):
        run_wrappers(case)
    return {name: kernel for kernel, name in found.items()}


def measure(kernel: Any, target: str) -> tuple[int, int, int, int]:
    """Returns (registers, bytes spilled, matrix instructions, instructions)."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        code = [line for line in text.splitlines() if re.match(r"\t[a-z]\w+ ", line)]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spilled = sum(
            int(n)
            for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
        )
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _output(tools / "cuobjdump", "-res-usage", file.name)
            text = _output(tools / "nvdisasm", "-c", file.name)
        code = [line for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        spilled = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        spilled += 4 * sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code)
    matrix = sum(bool(MATRIX.search(line)) for line in code)
    return registers, spilled, matrix, len(code)


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def measure_all(show: Callable[[str], None]) -> Iterator[Row]:
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    for case in CASES:
        for target in TARGETS:
            show(f"{case.name}, {target}")
            for name, kernel in compiled(case, target, driver).items():
                registers, spilled, matrix, instructions = measure(kernel, target)
                yield Row(
                    triton.__version__,
                    target,
                    case.name,
                    name,
                    registers,
                    spilled,
                    kernel.metadata.shared,
                    matrix,
                    instructions,
                )


def read_table() -> list[Row]:
    if not TABLE.exists():
        return []
    types = {field.name: field.type for field in fields(Row)}
    with TABLE.open() as file:
        return [
            Row(
                **{
                    name: int(value) if types[name] == "int" else value
                    for name, value in line.items()
                }
            )
            for line in csv.DictReader(file)
        ]


def write_table(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=astuple))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing")
    write = parser.parse_args().write
    rows = list(measure_all(lambda text: print(text, file=sys.stderr, flush=True)))
    faults = [f"{row}: {fault}" for row in rows for fault in row.faults()]
    known = read_table()
    here = [row for row in known if row.triton == triton.__version__]
    if write:
        others = [row for row in known if row.triton != triton.__version__]
        write_table(others + rows)
    elif set(rows) != set(here):
        faults += [f"not in the table: {row}" for row in rows if row not in here]
        faults += [f"in the table only: {row}" for row in here if row not in rows]
    print("\n".join(faults) or f"{len(rows)} compiled kernels, triton {triton.__version__}: fine")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
