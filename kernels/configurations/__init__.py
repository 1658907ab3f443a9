"""Block sizes, warps and stages of every kernel, as data: the heuristic default first, a measured choice before it.

Each op's module lists its candidates in one table at its top,

    CONFIGURATIONS = {
        "<kernel>": {"<shape class>": (Configuration(BLOCK_TOKENS=4, num_warps=4, num_stages=2), ...candidates)},
    }

where keyword arguments in capitals are the kernel's own constexpr names and those in small letters are read by its
launcher only. A shape class may carry an architecture, "<shape class>@sm_80", which is then preferred there and on GPUs
with its matrix units (`built_like`). The first candidate is the default: it is what runs under the interpreter and on a
GPU that nobody measured. `opensora-fast kernels autotune` measures the candidates and writes the fastest to
`kernels/configurations/<gpu>.json`, which `select` reads.

Each op's module also has `compile_cases(arch)`, which yields a `CompileCase` for each build that the model at hidden
size 1152 and head size 72 would use, so that registers, spills and shared memory are known without a GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

MEASURED_FOLDER = Path(__file__).parent
# Of GPUs with the same multiprocessors one that was measured: its choices are the best guess for those that were not,
# such as H100, H800, GH200 and the PCIe and NVL cards, whose memory, links and power are others.
MEASURED_ALIKE = {"sm_90": "NVIDIA H200"}

Table = Mapping[str, Mapping[str, Sequence["Configuration"]]]  # kernel → shape class → candidates, the default first


@dataclass(frozen=True, init=False)
class Configuration:
    """What a tuner may change: constexprs of a kernel (NAMED_SO), choices of its launcher (named_so), build options.

    The options are warps, stages and, where `maxnreg` is not None, the most registers that a thread may have.
    """

    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None

    def __init__(
        self, *, num_warps: int = 4, num_stages: int = 2, maxnreg: int | None = None, **constants: int
    ) -> None:
        object.__setattr__(self, "constants", tuple(constants.items()))
        object.__setattr__(self, "num_warps", num_warps)
        object.__setattr__(self, "num_stages", num_stages)
        object.__setattr__(self, "maxnreg", maxnreg)

    def __getitem__(self, name: str) -> int:
        for constant, value in self.constants:
            if constant == name:
                return value
        raise KeyError(name)

    @cached_property
    def choices(self) -> dict[str, int]:
        return {**dict(self.constants), **self.options}

    @cached_property
    def constexprs(self) -> dict[str, int]:
        return {name: value for name, value in self.constants if name.isupper()}

    @cached_property
    def options(self) -> dict[str, int]:
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**limit, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @cached_property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch: `kernel[grid](..., **configuration.launch)`."""
        return {**self.constexprs, **self.options}

    @cached_property
    def fault(self) -> str:
        """What Triton 3.6 and 3.7.1 build wrongly from this on sm_90, without an error; "" where nothing is known.

        Both were met with the kernels on `attention.loops`, which alone have a REMAINDER; fewer than 64 rows are not
        multiplied by the instructions that it is about.
        """
        constants = dict(self.constants)
        if "REMAINDER" not in constants or constants.get("ROWS", 0) < 64:
            return ""
        if self.num_stages == 1:
            return "with num_stages=1 ptxas leaves a matrix descriptor unwritten on one path, and results are wrong"
        if constants["REMAINDER"] >= 64:
            return "with REMAINDER=64 the small forward of spatial attention reads beyond its shared memory"
        return ""

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.choices.items())


@dataclass(frozen=True)
class CompileCase:
    """One build of one kernel.

    Attributes:
        name: the kernel's name in the op's table.
        kernel: the `@triton.jit` function.
        signature: type of each argument that is not a constexpr, in Triton's words: "*bf16", "*fp32", "i32", "fp32".
        constants: constexprs besides those of the configuration; None for a pointer that is left out.
        configuration: block sizes, warps and stages.
        dtype: of the activations, for the listing: "bf16", "fp16" or "fp32".
        divisible_by_16: integer arguments that are multiples of 16 in practice; pointers always count as aligned.
        attention: True where the build must use the matrix units: on sm_90 by HGMMA, given the four warps it takes.
        note: what tells this build from others of the same kernel, such as "noised and given rows".
        unit: what the work of a kernel is counted in: "score" (a query and a key) or "element" (of one tensor's rows).
        work: how many of them one program computes in one iteration of its hot loop, or without a loop altogether.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    configuration: Configuration
    dtype: str
    divisible_by_16: tuple[str, ...] = ()
    attention: bool = False
    note: str = ""
    unit: str = ""
    work: int = 0


def candidates_of(table: Table, kernel: str, shape_class: str, arch: str | None) -> Sequence[Configuration]:
    """The candidates of a shape class, those of the architecture ("sm_80") before the general ones; default first."""
    classes = table[kernel]
    return classes.get(f"{shape_class}@{arch}") or classes[shape_class]


# What a tuner is doing at the moment; all are empty otherwise.
_forced: dict[tuple[str, str], Configuration] = {}
_recorders: list[dict[tuple[str, str], Sequence[Configuration]]] = []
_replacers: list[None] = []


def select(table: Table, kernel: str, shape_class: str, device: torch.device) -> Configuration:
    """Returns the configuration to launch `kernel` with: that measured on this GPU, or on one alike, else the default.

    Raises:
        ValueError: the measured file names a configuration that is no longer a candidate, or what is chosen is known to
            be built wrongly for this GPU (`Configuration.fault`).
    """
    arch, gpu = _describe_gpu(device) if device.type == "cuda" else (None, None)
    candidates = candidates_of(table, kernel, shape_class, arch)
    for recorder in _recorders:
        recorder[kernel, shape_class] = candidates
    chosen = _forced.get((kernel, shape_class))
    chosen = chosen or _find_measured(kernel, shape_class, candidates, arch, gpu) or candidates[0]
    if arch == "sm_90" and chosen.fault:
        raise ValueError(f"{kernel} / {shape_class}: {chosen} is refused: {chosen.fault}; take it out of its table")
    return chosen


def _find_measured(
    kernel: str, shape_class: str, candidates: Sequence[Configuration], arch: str | None, gpu: str | None
) -> Configuration | None:
    if arch is None or gpu is None:  # a CPU
        return None
    if (kernel, shape_class) not in read_measured(gpu):
        gpu = MEASURED_ALIKE.get(arch, gpu)
    measured = read_measured(gpu).get((kernel, shape_class))
    if measured is None:
        return None
    for candidate in candidates:
        if candidate.choices == measured:
            return candidate
    if _replacers:
        return None
    fault = Configuration(**measured).fault
    raise ValueError(
        f"{measured_path(gpu)}: {measured} is not a candidate of {kernel} / {shape_class}"
        f"{f' ({fault})' if fault else ''}; run `opensora-fast kernels autotune` again or delete the entry"
    )


@contextmanager
def force(kernel: str, shape_class: str, configuration: Configuration) -> Iterator[None]:
    """Within it `select` returns `configuration`: for tuners and tests. Not for more than one thread."""
    _forced[kernel, shape_class] = configuration
    try:
        yield
    finally:
        del _forced[kernel, shape_class]


@contextmanager
def replace_measured() -> Iterator[None]:
    """Within it `select` gives the default for what is no longer a candidate: for tuners, which measure it anew."""
    _replacers.append(None)
    try:
        yield
    finally:
        _replacers.pop()


@contextmanager
def record_selections() -> Iterator[dict[tuple[str, str], Sequence[Configuration]]]:
    """Yields a dict that is filled with what `select` is asked for within: (kernel, shape class) → candidates."""
    recorder: dict[tuple[str, str], Sequence[Configuration]] = {}
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.pop()


@lru_cache(maxsize=64)
def _describe_gpu(device: torch.device) -> tuple[str, str]:
    """The architecture whose candidates it takes, and its name."""
    return built_like(*torch.cuda.get_device_capability(device)), torch.cuda.get_device_name(device)


def built_like(major: int, minor: int) -> str:
    """The one of sm_80, sm_90 and sm_100 whose matrix units a GPU of this compute capability has, else its own name.

    Tiles follow from it: GeForce and workstation GPUs, up to those of 12.x, multiply with registers as sm_80 does. With
    tiles of sm_90 a kernel would spill up to 192 bytes a thread on sm_89, with those of sm_80 8 (compiled).
    """
    return {8: "sm_80", 12: "sm_80", 10: "sm_100", 11: "sm_100"}.get(major, f"sm_{major}{minor}")


def measured_path(gpu: str) -> Path:
    """The file of measured configurations of a GPU, named after it: "NVIDIA H200" → nvidia_h200.json."""
    return MEASURED_FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


@lru_cache(maxsize=16)
def read_measured(gpu: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, shape class) → `Configuration.choices`; empty where nobody measured.

    Raises:
        ValueError: as `read_rows`.
    """
    return {key: row["configuration"] for key, row in read_rows(measured_path(gpu)).items()}


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(kernel, shape class) → what a file of measured configurations says of it; empty where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            (row["kernel"], row["shape_class"]): {**row, "configuration": dict(row["configuration"])} for row in rows
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: it holds no measured configurations ({type(error).__name__}: {error}); delete it and run "
            "`opensora-fast kernels autotune`"
        ) from error
