"""Finds matrix instructions of sm_90 whose descriptors are made of what nothing has written, on some path to them.

HGMMA reads tiles in shared memory by descriptors of 64 bits, in pairs of uniform registers. ptxas 12.8 builds loops of
attention without pipelining in which such a pair is made from a uniform register that is written on another path only,
and says nothing (see `configurations.Configuration.fault`); the results are wrong.

A register counts as written at an instruction where, on every path from the start of the kernel, what wrote it last
read nothing but constants, other kinds of registers, and uniform registers that count as written. Two things are not
seen, so no fault is proven absent: a write under a predicate counts as one that always happens, and of sources wider
than 64 bits only the register that is named is looked at. What is found is there in the code, on a path that the
branches allow; whether their conditions ever do is not known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .sass import Instruction

_UNIFORM = re.compile(r"\bUR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P[0-9T]")


def find_unwritten_descriptors(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The HGMMA instructions, in their order, that read a descriptor which does not count as written."""
    if not any(line.base == "HGMMA" for line in instructions):
        return []
    position = {line.address: index for index, line in enumerate(instructions)}
    effects = [(_written_by(line), _read_by(line)) for line in instructions]
    written: list[frozenset[int] | None] = [None] * len(instructions)  # before each; None: no path leads there
    written[0] = frozenset()
    front = [0]
    while front:
        index = front.pop()
        line, (writes, reads) = instructions[index], effects[index]
        after = written[index] | writes if reads <= written[index] else written[index] - writes
        steps = [position[line.target]] if line.target in position else []
        if not line.always_leaves and index + 1 < len(instructions):
            steps.append(index + 1)
        for step in steps:
            met = after if written[step] is None else written[step] & after
            if met != written[step]:
                written[step] = met
                front.append(step)
    return [
        line
        for line, before, (_, reads) in zip(instructions, written, effects, strict=True)
        if line.base == "HGMMA" and before is not None and not reads <= before
    ]


def _operands(line: Instruction) -> list[str]:
    """Without the predicates that come first, which are results as well."""
    operands = [operand.strip().removesuffix(".reuse") for operand in line.operands.split(",")]
    while operands and _PREDICATE.fullmatch(operands[0]):
        operands.pop(0)
    return operands


def _written_by(line: Instruction) -> frozenset[int]:
    """The uniform registers that an instruction writes: its first operand, but for comparisons."""
    first = re.fullmatch(r"UR(\d+)", _operands(line)[0]) if _operands(line) else None
    if first is None or "SETP" in line.base:
        return frozenset()
    suffixes = line.name.split(".")
    width = 4 if "128" in suffixes else 2 if "64" in suffixes or "WIDE" in suffixes else 1
    return frozenset(range(int(first[1]), int(first[1]) + width))


def _read_by(line: Instruction) -> frozenset[int]:
    """The uniform registers that an instruction reads."""
    operands = _operands(line)
    if line.base == "HGMMA":
        # gdesc[UR12] stands for UR12 to UR15: one descriptor for each factor, the first unused where that is in
        # registers.
        first = next((int(found[1]) for operand in operands if (found := re.match(r"gdesc\[UR(\d+)\]", operand))), None)
        if first is None:
            return frozenset()
        return frozenset(range(first if operands[1].startswith("gdesc") else first + 2, first + 4))
    sources = operands[1:] if _written_by(line) else operands
    named = {int(number) for operand in sources for number in _UNIFORM.findall(operand)}
    pairs = {number + 1 for number in named} if line.base.startswith("U") and "64" in line.name.split(".") else set()
    return frozenset(named | pairs)
