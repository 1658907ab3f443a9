"""Builds every kernel for a GPU that need not be there, and reads registers, spills and instructions from the result.

Each kernel module's `compile_cases(arch)` names its builds. A build takes a second or two; Triton's cache keeps it, and
what was read from it is kept beside it, so a second run takes no time.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

from .configurations import CompileCase
from .dispatch import interpreting

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGET_PATH = Path(__file__).parent / "compile_budget.json"
# What one build is known by.
KEY = ("kernel", "arch", "config", "dtype", "note")


def modules_with(name: str) -> list[ModuleType]:
    """The modules of this package that define `name`, in order of their names."""
    folder = Path(__file__).parent
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.ispkg)
    defines = re.compile(rf"^(?:def )?{name}\b", flags=re.MULTILINE)
    return [
        importlib.import_module(f"{__package__}.{module}")
        for module in names
        if defines.search((folder / f"{module}.py").read_text(encoding="utf-8"))
    ]


def compile_kernels(architectures: list[str], processes: int | None = None) -> tuple[int, Iterator[dict[str, Any]]]:
    """Builds every case of every kernel for each architecture, in parallel processes.

    Args:
        architectures: such as "sm_90".
        processes: how many builds at a time; None for one on each CPU.

    Returns:
        How many builds there are, and an iterator over their rows in the order in which they finish: kernel, arch,
        config, dtype, note, attention, registers (a thread), spills (bytes), shared (bytes), hgmma (matrix instructions
        of sm_90 in the SASS), matrix (matrix instructions of any kind). A build that fails has `error` and no numbers.

    Raises:
        ValueError: an unknown architecture, or Triton is set to interpret.
    """
    for arch in architectures:
        if arch not in ARCHITECTURES:
            raise ValueError(f"--arch {arch}: unknown; choose among {', '.join(ARCHITECTURES)}")
    if interpreting():
        raise ValueError("TRITON_INTERPRET=1 is set, and an interpreter builds nothing: unset it")
    tasks = [
        (module.__name__, index, arch)
        for arch in architectures
        for module in modules_with("compile_cases")
        for index in range(len(list(module.compile_cases(arch))))
    ]

    def run() -> Iterator[dict[str, Any]]:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
            for future in as_completed([pool.submit(_build, *task) for task in tasks]):
                yield future.result()

    return len(tasks), run()


def _build(module: str, index: int, arch: str) -> dict[str, Any]:
    case = list(importlib.import_module(module).compile_cases(arch))[index]
    row = {
        "kernel": case.name,
        "arch": arch,
        "config": str(case.configuration),
        "dtype": case.dtype,
        "note": case.note,
        "attention": case.attention,
    }
    try:
        return row | compile_case(case, arch)
    except Exception as error:  # reported in the row, and the command fails: one bad kernel must not hide the others
        return row | {"error": f"{type(error).__name__}: {str(error).strip()[-500:]}"}


def compile_case(case: CompileCase, arch: str) -> dict[str, int]:
    """Builds one case and returns registers, spills, shared, hgmma and matrix, as in `compile_kernels`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    constants = case.configuration.constexprs | case.constants
    signature, attributes = {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.signature[name]
        if signature[name].startswith("*") or name in case.divisible_by_16:
            attributes[(position,)] = [["tt.divisibility", 16]]
    unused = sorted((set(case.signature) | set(constants)) - set(case.kernel.arg_names))
    if unused:
        raise ValueError(f"{case.name} has no arguments {unused}")
    compiled = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": case.configuration.num_warps, "num_stages": case.configuration.num_stages} | case.options,
    )
    cache = get_cache_manager(compiled.hash)
    path = cache.get_file("usage.json")
    if path is not None:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    usage = {"shared": compiled.metadata.shared, **read_cubin(compiled.asm["cubin"])}
    cache.put(json.dumps(usage), "usage.json", binary=False)
    return usage


def read_cubin(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of local memory (spills) and counts of matrix instructions of a one-kernel cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "hgmma": len(re.findall(r"\bHGMMA\b", text)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", text)),
    }


def read_budget() -> dict[str, Any]:
    """The committed budget: `triton`, the version it belongs to, and `rows`."""
    return json.loads(BUDGET_PATH.read_text(encoding="utf-8"))


def write_budget(rows: list[dict[str, Any]]) -> None:
    import triton

    kept = [{name: row[name] for name in (*KEY, "registers", "shared")} for row in sorted(rows, key=build_key)]
    lines = ",\n".join(json.dumps(row) for row in kept)
    BUDGET_PATH.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def build_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def check_budget(rows: list[dict[str, Any]], budget: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each build that needs more than its budget, has none, or is in the budget but not built."""
    allowed = {build_key(row): row for row in budget}
    faults = []
    for row in rows:
        limit = allowed.pop(build_key(row), None)
        if limit is None:
            faults.append(f"{' / '.join(build_key(row))}: not in the budget")
            continue
        for name in ("registers", "shared"):
            if row[name] > limit[name]:
                faults.append(f"{' / '.join(build_key(row))}: {row[name]} {name}, budget {limit[name]}")
    built = {row["arch"] for row in rows}
    faults += [f"{' / '.join(key)}: in the budget, but not built" for key in allowed if key[KEY.index("arch")] in built]
    return faults
