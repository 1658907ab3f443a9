"""PTX text → a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

# What a program reads and never writes, by PTX's name.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "global_smem")
_REGISTER = re.compile(r"%(p|rs|r|rd)\d+")
# What Triton writes behind `.loc`: file.py:12:3 @[ caller.py:34:5 ]
_PLACE = re.compile(r"(\w+\.py):(\d+):\d+")
REGISTER_TYPES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}


@dataclass(frozen=True)
class Register:
    name: str

    @property
    def dtype(self) -> type:
        return REGISTER_TYPES[_REGISTER.fullmatch(self.name)[1]]


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Special | str  # the name of a parameter
    offset: int


# A number is its bits, so that a float and an integer look alike; None is "_", a result that nobody wants.
Operand = Register | Special | int | Address | tuple | str | None


@dataclass(frozen=True)
class Instruction:
    """`name` is split at its dots; `operands` in PTX's order, those in braces as tuples.

    `source` is where it comes from: "file.py:line" in the innermost function and in those that it was inlined into.
    """

    name: tuple[str, ...]
    operands: tuple[Operand, ...]
    condition: Register | None
    negated: bool
    line: int
    text: str
    source: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    name: str
    threads: int
    parameters: tuple[str, ...]
    instructions: list[Instruction] = field(repr=False)
    labels: dict[str, int] = field(repr=False)


@lru_cache(maxsize=256)
def parse(ptx: str) -> Program:
    """Raises ValueError for what is not understood; every instruction must be."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside, source = False, ()
    for number, line in enumerate(ptx.splitlines(), start=1):
        if line.lstrip().startswith(".loc"):
            source = tuple(f"{file}:{row}" for file, row in _PLACE.findall(line))
        line = line.partition("//")[0].strip()
        if not inside:
            inside = line == "{"
        elif line == "}":
            break
        elif line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        elif not line.startswith("."):
            statements = [statement.strip() for statement in line.split(";") if statement.strip()]
            instructions += [_parse_instruction(statement, number, source) for statement in statements]
    name = re.search(r"\.entry (\w+)", ptx)[1]
    return Program(
        name=name,
        threads=int(re.search(r"\.reqntid (\d+)", ptx)[1]),
        parameters=tuple(re.findall(r"\.param .*?(\w+_param_\d+)", ptx)),
        instructions=instructions,
        labels=labels,
    )


def _parse_instruction(text: str, line: int, source: tuple[str, ...]) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", text)
    if match is None:
        raise ValueError(f"line {line}: {text!r} is no instruction of PTX")
    negated, condition, name, rest = match.groups()
    return Instruction(
        name=tuple(name.split(".")),
        operands=tuple(_parse_operand(part, line) for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)),
        condition=Register(condition) if condition else None,
        negated=bool(negated),
        line=line,
        text=" ".join(text.split()),
        source=source,
    )


def _parse_operand(text: str, line: int) -> Operand:
    if text.startswith("{"):
        return tuple(_parse_operand(part.strip(), line) for part in text.strip("{} ").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        base = base.strip()
        return Address(base if "_param_" in base else _parse_operand(base, line), int(offset or 0))
    if text == "_":
        return None
    if text in SPECIAL:
        return Special(text)
    if _REGISTER.fullmatch(text):
        return Register(text)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) % 2**64
    if text.startswith("$"):
        return text
    raise ValueError(f"line {line}: operand {text!r} is not known to the emulator")
