"""Builds every kernel for a GPU that need not be there, and reads registers, spills and instructions from the result.

What a row says of the machine code is found in `sass`; predictions are made from such rows.

Each kernel module's `compile_cases(arch)` names its builds. A build takes a second or two; Triton's cache keeps it, and
what was read from it is kept beside it, so a second run takes no time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

from ..configurations import CompileCase
from ..dispatch import interpreting
from ..launch import BUILD_OPTIONS
from . import sass, sass_descriptors

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGET_PATH = Path(__file__).parent / "compile_budget.json"
# What one build is known by.
KEY = ("kernel", "arch", "config", "dtype", "note")


def modules_with(name: str) -> list[ModuleType]:
    """The modules of `opensora_fast.kernels` that define `name`, in order of their paths."""
    folder, package = Path(__file__).parent.parent, __package__.rpartition(".")[0]
    defines = re.compile(rf"^(?:def )?{name}\b", flags=re.MULTILINE)
    files = [file for file in folder.rglob("*.py") if defines.search(file.read_text(encoding="utf-8"))]
    modules = sorted(".".join((package, *file.relative_to(folder).with_suffix("").parts)) for file in files)
    return [importlib.import_module(module) for module in modules]


def compile_kernels(architectures: list[str], processes: int | None = None) -> tuple[int, Iterator[dict[str, Any]]]:
    """Builds every case of every kernel for each architecture, in parallel processes.

    Args:
        architectures: such as "sm_90".
        processes: how many builds at a time; None for one on each CPU.

    Returns:
        How many builds there are, and an iterator over their rows in the order in which they finish:

        - kernel, arch, config, dtype, note, attention, num_warps;
        - registers (a thread), spills (bytes), shared (bytes), hgmma (matrix instructions of sm_90 in the SASS), matrix
          (matrix instructions of any kind), unwritten_descriptors (those that `sass_descriptors` finds);
        - programs, warps: how many fit on a multiprocessor at once;
        - loads, stores: bytes that a thread moves at a time → how many instructions on global memory do so;
        - in_loop: whether the kernel has a hot loop (else `loop…` are of the whole kernel); loop: class of instruction
          → how many; loop_products: multiply-adds for each warp; loop_loads, loop_stores; outside: fewest
          instructions before and after the loop;
        - unit, work: what is counted ("score" or "element") and how many of it `loop` computes; slots: instructions of
          a thread for each. "", 0 and None where the build does not say.

        A build that fails has `error` and no numbers.

    Raises:
        ValueError: an unknown architecture or none, or Triton is set to interpret.
    """
    if not architectures:
        raise ValueError(f"--arch: none given; choose among {', '.join(ARCHITECTURES)}")
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
        "num_warps": case.configuration.num_warps,
        "unit": case.unit,
        "work": case.work,
    }
    try:
        row |= compile_case(case, arch)
        row |= sass.count_programs(arch, row["registers"], row["shared"], row["num_warps"])
        threads = 32 * row["num_warps"]
        return row | {"slots": sum(row["loop"].values()) * threads / case.work if case.work else None}
    except Exception as error:  # reported in the row, and the command fails: one bad kernel must not hide the others
        return row | {"error": f"{type(error).__name__}: {str(error).strip()[-500:]}"}


def compile_case(case: CompileCase, arch: str) -> dict[str, Any]:
    """Builds one case and returns what its machine code says, as in `compile_kernels`."""
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
        options=case.configuration.options | BUILD_OPTIONS,
    )
    cache = get_cache_manager(compiled.hash)
    reader = b"".join(Path(file).read_bytes() for file in (__file__, sass.__file__, sass_descriptors.__file__))
    kept_as = f"usage-{hashlib.sha256(reader).hexdigest()[:16]}.json"
    path = cache.get_file(kept_as)
    if path is not None:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    usage = {"shared": compiled.metadata.shared, **read_cubin(compiled.asm["cubin"])}
    cache.put(json.dumps(usage), kept_as, binary=False)
    return usage


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers a thread, bytes of local memory (spills) and what else is found in a cubin of one kernel."""
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
        "unwritten_descriptors": len(sass_descriptors.find_unwritten_descriptors(sass.parse_sass(text))),
        **sass.describe_sass(text),
    }


def read_budget() -> dict[str, Any]:
    """The committed budget: `triton`, the version it belongs to, and `rows`."""
    return json.loads(BUDGET_PATH.read_text(encoding="utf-8"))


def write_budget(rows: list[dict[str, Any]]) -> None:
    import triton

    kept = [{name: row[name] for name in (*KEY, "registers", "shared")} for row in sorted(rows, key=build_key)]
    lines = ",\n".join(json.dumps(row) for row in kept)
    BUDGET_PATH.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def find_faults(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each build that spills, does not keep the budget, attends without matrix instructions, or has
    some with unwritten descriptors.

    On sm_90 they must be HGMMA where there are the four warps that it takes. What needs more tensor memory than sm_100
    has is built without an error, as a kernel that only traps and has none.

    Raises:
        ValueError: the budget belongs to another Triton.
    """
    import triton

    budget = read_budget()
    if budget["triton"] != triton.__version__:
        raise ValueError(f"the budget belongs to triton {budget['triton']}, installed is {triton.__version__}")
    faults = [f"{' / '.join(build_key(row))}: {row['spills']} bytes of spills" for row in rows if row["spills"]]
    attention = [row for row in rows if row["attention"]]
    faults += [f"{' / '.join(build_key(row))}: no matrix instruction" for row in attention if not row["matrix"]]
    hopper = [row for row in attention if row["arch"] == "sm_90" and row["num_warps"] >= 4 and row["matrix"]]
    faults += [f"{' / '.join(build_key(row))}: no HGMMA" for row in hopper if not row["hgmma"]]
    faults += [
        f"{' / '.join(build_key(row))}: {count} matrix instructions whose descriptors are not written on every path"
        for row in rows
        if (count := row["unwritten_descriptors"])
    ]
    return faults + check_budget(rows, budget["rows"])


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
