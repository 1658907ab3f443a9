"""Reads machine code (SASS): instructions by class, width of accesses to memory, the hot loop; and occupancy.

The text is that of `cuobjdump -sass` of a cubin with one kernel, of any architecture of OCCUPANCY_LIMITS.

A slot is the issue of one instruction of one warp: each of the four parts of a multiprocessor has one slot a clock.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Per multiprocessor: NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
# allocation units of NVIDIA's occupancy calculator (registers in units of 256 a warp, 1 KiB of shared memory a program
# for the system).
REGISTERS_PER_PART = 16384
PARTS = 4
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class OccupancyLimits:
    warps: int
    programs: int
    shared: int  # bytes


OCCUPANCY_LIMITS = {
    "sm_80": OccupancyLimits(warps=64, programs=32, shared=164 * 1024),
    "sm_90": OccupancyLimits(warps=64, programs=32, shared=228 * 1024),
    "sm_100": OccupancyLimits(warps=64, programs=32, shared=228 * 1024),
}

# Class of instruction → beginnings of its names, the longest match decides. What is in no class counts as "other".
CLASSES = {
    "matrix": ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FCHK", "FSWZ", "HADD2", "HMUL2", "HFMA2", "HMNMX2")
    + ("HSET", "FMN", "FHFMA", "FHADD", "FHMUL"),
    "mufu": ("MUFU",),
    "conversion": ("F2F", "F2I", "I2F", "I2I", "FRND"),
    "shared": ("LDS", "STS", "ATOMS", "SHFL", "REDUX", "LDTM", "STTM", "LDT", "STT", "UTCCP"),
    "global": ("LDG", "STG", "LDGSTS", "RED", "ATOMG", "LD", "ST", "UBLKCP", "UTMA", "CCTL"),
    "local": ("LDL", "STL"),
    "integer": ("IADD", "IMAD", "IABS", "ISETP", "IMNMX", "VIADD", "VIMNMX", "VIADDMNMX", "LEA", "LOP", "SHF", "SGXT")
    + ("PRMT", "SEL", "MOV", "CS2R", "S2R", "S2UR", "R2UR", "P2R", "R2P", "LDC", "PLOP3", "BMSK", "FLO", "POPC", "BREV")
    + ("UIADD", "UIMAD", "UISETP", "ULEA", "ULOP", "USHF", "USGXT", "UPRMT", "USEL", "UMOV", "ULDC", "UP", "UF", "UR")
    + ("LDCU", "VOTE", "UVI", "IMUL", "UBMSK", "I3", "UBREV"),
    "control": ("BRA", "BRX", "EXIT", "BAR", "NOP", "WARP", "BSSY", "BSYNC", "BREAK", "BMOV", "DEPBAR", "LDGDEPBAR")
    + ("MEMBAR", "FENCE", "SYNCS", "CALL", "RET", "ERRBAR", "YIELD", "ELECT", "UTCBAR", "UTCATOMSWS", "NANOSLEEP")
    + (
        "ACQBULK",
        "USETMAXREG",
        "CGAERRBAR",
        "UCGABAR",
        "R2B",
        "B2R",
        "PREEXIT",
        "LEPC",
        "ARRIVES",
        "UTMACMDFLUSH",
        "BPT",
    ),
}
BY_PREFIX = {prefix: name for name, prefixes in CLASSES.items() for prefix in prefixes}

WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes; 4 without any of these
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Zx0-9_.]*)\s*([^;]*);", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """`name` with its suffixes, "LDG.E.128"; `operands` as text; `predicate` "" where it always runs."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        """The class, a key of CLASSES or "other"."""
        for length in range(len(self.base), 0, -1):
            if (kind := BY_PREFIX.get(self.base[:length])) is not None:
                return kind
        return "other"

    @property
    def width(self) -> int:
        """Bytes that a thread reads or writes, for accesses to memory."""
        return next((WIDTHS[part] for part in self.name.split(".")[1:] if part in WIDTHS), 4)

    @property
    def products(self) -> int:
        """Multiply-adds for each warp that takes part; 1 where the name does not tell the shape (sm_100)."""
        if self.kind != "matrix":
            return 0
        if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", self.name):  # of four warps together
            rows, columns, depth = map(int, shape.groups())
            return rows * columns * depth // 4
        if shape := re.search(r"\.(16)(8)(8|16|32)\b", self.name):
            rows, columns, depth = map(int, shape.groups())
            return rows * columns * depth
        return 1

    @property
    def always_leaves(self) -> bool:
        """Whether the instruction after it is never the next; a condition may be an operand: `BRA.U !UP3, 0x90`."""
        if self.predicate or re.match(r"!?U?P\d", self.operands):
            return False
        return self.base in ("BRA", "EXIT", "RET")

    @property
    def target(self) -> int | None:
        """Where a branch leads, or a call: `CALL.REL.NOINC` is also used as a branch to far away."""
        if self.base != "BRA" and self.name != "CALL.REL.NOINC":
            return None
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(addresses[-1], 16) if addresses else None


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of a kernel in their order.

    Raises:
        ValueError: the text has none.
    """
    instructions = [
        Instruction(int(at, 16), predicate, name, operands.strip())
        for at, predicate, name, operands in _LINE.findall(text)
    ]
    if not instructions:
        raise ValueError("no instructions: this is not the output of cuobjdump -sass")
    return instructions


def find_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops with matrix instructions or accesses to global memory; others only wait."""
    loops = []
    for branch in instructions:
        if branch.target is not None and branch.target < branch.address:
            body = [line for line in instructions if branch.target <= line.address <= branch.address]
            # Code behind the end of the kernel, such as that for a longer wait, branches back without being a loop.
            ends = any(line.base == "EXIT" and line.always_leaves for line in body)
            if not ends and any(line.kind in ("matrix", "global") for line in body):
                loops.append(body)
    return loops


def choose_hot_loop(
    instructions: Sequence[Instruction], loops: Sequence[Sequence[Instruction]]
) -> Sequence[Instruction]:
    """The innermost loop with the most work on the matrix units, or with most global bytes where nothing uses them.

    Empty where less than an eighth of that work lies in any one loop.
    """
    innermost = [body for body in loops if not any(_contains(body, other) for other in loops)]
    for measure in (_products, _global_bytes):
        if total := measure(instructions):
            best = max(innermost, key=lambda body: (measure(body), -len(body)), default=[])
            return best if measure(best) * 8 > total else []
    return []


def _contains(outer: Sequence[Instruction], inner: Sequence[Instruction]) -> bool:
    within = outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address
    return within and len(inner) < len(outer)


def _products(instructions: Sequence[Instruction]) -> int:
    return sum(line.products for line in instructions)


def _global_bytes(instructions: Sequence[Instruction]) -> int:
    return sum(line.width for line in instructions if line.kind == "global")


def count_outside(instructions: Sequence[Instruction], loop: Sequence[Instruction]) -> int:
    """Instructions before and after a loop on the shortest way from the start of the kernel through it to an end.

    That is a lower limit: other loops and every branch that can be avoided are left out.
    """
    position = {line.address: index for index, line in enumerate(instructions)}

    def shortest(starts: set[int], ends: set[int]) -> int:
        reached, front, length = set(starts), list(starts), 0
        while front:
            length += 1
            following = []
            for index in front:
                if index in ends:
                    return length - 1
                line = instructions[index]
                steps = [position[line.target]] if line.target in position else []
                if not line.always_leaves and index + 1 < len(instructions):
                    steps.append(index + 1)
                following += [step for step in dict.fromkeys(steps) if step not in reached]
                reached.update(steps)
            front = following
        raise ValueError("the loop is not on any way from the start of the kernel to an end")

    inside = {position[line.address] for line in loop}
    exits = {index for index, line in enumerate(instructions) if line.base == "EXIT"} - inside
    return shortest({0}, inside) + shortest(inside, exits)


def count_kinds(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Class → how many instructions, all classes, NOPs left out."""
    counts = Counter(line.kind for line in instructions if line.base != "NOP")
    return {name: counts[name] for name in (*CLASSES, "other")}


def count_widths(instructions: Sequence[Instruction], store: bool) -> dict[str, int]:
    """Bytes that one thread moves at a time → how many loads (or stores) of global memory do so, the widest first."""
    bases = ("STG", "ST") if store else ("LDG", "LDGSTS", "LD")
    widths = Counter(line.width for line in instructions if line.base in bases)
    return {str(width): widths[width] for width in sorted(widths, reverse=True)}


def count_programs(arch: str, registers: int, shared: int, num_warps: int) -> dict[str, int]:
    """How many programs of a kernel a multiprocessor holds at once.

    Args:
        arch: a key of OCCUPANCY_LIMITS.
        registers: a thread.
        shared: bytes a program, without the system's.
        num_warps: a program.

    Returns:
        programs, and warps (all of them together); 0 if not even one fits.
    """
    limits = OCCUPANCY_LIMITS[arch]
    by_registers = REGISTERS_PER_PART // (-(-max(registers, 1) // 8) * 8 * 32) * PARTS
    programs = min(
        limits.programs,
        min(limits.warps, by_registers) // num_warps,
        limits.shared // (-(-(shared + RESERVED_SHARED) // 128) * 128),
    )
    return {"programs": programs, "warps": programs * num_warps}


def describe_sass(text: str) -> dict[str, object]:
    """What `compilation.compile_kernels` says of loads, stores and the hot loop, and `matrix`, from a kernel's SASS."""
    instructions = parse_sass(text)
    loops = find_loops(instructions)
    loop = choose_hot_loop(instructions, loops)
    hot = loop or instructions
    return {
        "matrix": count_kinds(instructions)["matrix"],
        "loads": count_widths(instructions, store=False),
        "stores": count_widths(instructions, store=True),
        "in_loop": bool(loop),
        "loop": count_kinds(hot),
        "loop_products": _products(hot),
        "loop_loads": count_widths(hot, store=False),
        "loop_stores": count_widths(hot, store=True),
        "outside": count_outside(instructions, loop) if loop else 0,
    }
