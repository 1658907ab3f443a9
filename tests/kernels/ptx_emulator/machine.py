"""Runs a program: blocks side by side, all their threads at once, as far as they go the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from .arithmetic import TYPES, compute
from .asynchronous import Copy, Groups, Product
from .matrices import (
    described_addresses,
    first_factor,
    lanes_of_8x8,
    matrix_of_lanes,
    numbers,
    second_factor,
    sums_from_registers,
    sums_to_registers,
)
from .memory import SHARED_BASE, GlobalMemory, SharedMemory, WrongAccess
from .program import Address, Instruction, Operand, Program, Register, Special

# Threads that are computed at once; more take more memory, fewer more steps of Python.
_THREADS_AT_ONCE = 2048
_MOST_STEPS = 10_000_000
# First words of what all threads of a warp execute together; at barriers those of a block do.
_OF_A_WARP = ("shfl", "ldmatrix", "stmatrix", "mma", "wgmma")


class EmulationError(Exception):
    """What is wrong, with kernel and instruction."""


def run(
    program: Program,
    grid: tuple[int, int, int],
    arguments: Sequence[int],
    tensors: Sequence[Tensor],
    shared: int,
    kind: type[Machine] | None = None,
) -> None:
    """Runs a kernel on tensors in the host's memory.

    Args:
        arguments: the bits of each parameter.
        tensors: those whose storages may be read and written.
        shared: bytes of shared memory that a block asks for.
        kind: the machine that runs it, `Machine` if None.

    Raises:
        EmulationError: an access that would be wrong or race on a GPU, or an instruction that is not known.
    """
    memory = GlobalMemory(tensors)
    total = int(np.prod(grid))
    together = max(1, _THREADS_AT_ONCE // program.threads)
    for first in range(0, total, together):
        blocks = np.arange(first, min(first + together, total))
        (kind or Machine)(program, blocks, grid, arguments, memory, shared).run()


class Machine:
    def __init__(
        self,
        program: Program,
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        arguments: Sequence[int],
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.program, self.memory = program, memory
        self.parameters = dict(zip(program.parameters, arguments, strict=True))
        self.threads = len(blocks) * program.threads
        thread = np.tile(np.arange(program.threads), len(blocks))
        self.block, self.warp = np.repeat(np.arange(len(blocks)), program.threads), thread // 32
        of_block = blocks[self.block]
        self.special = {
            "%tid.x": thread,
            "%ctaid.x": of_block % grid[0],
            "%ctaid.y": of_block // grid[0] % grid[1],
            "%ctaid.z": of_block // (grid[0] * grid[1]),
            **{f"%nctaid.{axis}": np.int64(size) for axis, size in zip("xyz", grid, strict=True)},
            "global_smem": np.int64(SHARED_BASE),
        }
        self.special = {name: np.asarray(value).astype(np.uint32) for name, value in self.special.items()}
        self.shared = SharedMemory(len(blocks), shared)
        self.registers: dict[str, np.ndarray] = {}
        self.unfinished: dict[str, Product] = {}  # register → what will write it
        self.alive = np.ones(self.threads, dtype=bool)
        self.active = self.alive  # the threads that run the present instruction
        self.copies, self.products = Groups(), Groups()

    def run(self) -> None:
        instructions, waiting = self.program.instructions, {0: self.alive.copy()}
        steps = 0
        with np.errstate(all="ignore"):
            while waiting:
                place = self._next_place(waiting)
                here = waiting.pop(place)
                instruction = instructions[place]
                try:
                    for to, threads in self._step(instruction, place, here):
                        waiting[to] = waiting[to] | threads if to in waiting else threads
                except (WrongAccess, KeyError) as error:
                    raise EmulationError(
                        f"{self.program.name}, line {instruction.line}: {error}: {instruction.text}"
                    ) from error
                steps += 1
                if steps > _MOST_STEPS:
                    raise EmulationError(f"{self.program.name} does not end")

    def _next_place(self, waiting: dict[int, np.ndarray]) -> int:
        """Those that are furthest behind go first, so that the ways of a branch meet again where they join.

        Some join at a place before theirs: at an instruction that threads execute together the others wait for them.
        """
        places = sorted(waiting)
        ready = (place for place in places if self._all_here(self.program.instructions[place], waiting[place]))
        return next(ready, places[0])

    def _all_here(self, instruction: Instruction, here: np.ndarray) -> bool:
        """Whether nobody is elsewhere of those that execute the instruction together."""
        first = instruction.name[0]
        together = self.program.threads if first == "bar" else 32 if first in _OF_A_WARP else 1
        groups, alive = here.reshape(-1, together), self.alive.reshape(-1, together)
        return not (groups.any(axis=1) & (groups != alive).any(axis=1)).any()

    def _step(self, instruction: Instruction, place: int, here: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Runs an instruction in the threads `here`; returns where they go on."""
        self.shared.now += 1
        active = here
        if instruction.condition is not None:
            active = here & (self._read(instruction.condition) != instruction.negated)
        if instruction.name[0] == "bra":
            ways = (self.program.labels[instruction.operands[0]], active), (place + 1, here & ~active)
            return [(to, threads) for to, threads in ways if threads.any()]
        if instruction.name[0] == "ret":
            if self.products.any(active):
                raise WrongAccess("a thread ends before its products have been waited for")
            self.alive &= ~active
            here = here & ~active
            return [(place + 1, here)] if here.any() else []
        if active.any():
            self._execute(instruction, active)
        return [(place + 1, here)]

    def _execute(self, instruction: Instruction, active: np.ndarray) -> None:
        """Runs an instruction that is no branch in the `active` threads, of which there is one at least."""
        name, operands = instruction.name, instruction.operands
        first = name[0]
        self.active = active
        if first in ("ld", "st"):
            self._access(instruction, active)
        elif first in ("bar", "shfl", "ldmatrix", "stmatrix", "mma"):
            self._whole_warps(active)
            {
                "bar": self._barrier,
                "shfl": self._shuffle,
                "ldmatrix": self._load_matrices,
                "stmatrix": self._store_matrices,
                "mma": self._multiply,
            }[first](instruction, active)
        elif first == "wgmma":
            self._whole_warps(active)
            self._warpgroup(instruction, active)
        elif first == "cp":
            self._copy(instruction, active)
        elif first == "fence":
            self.shared.fence(self.block[active], self.warp[active])
        elif first == "mov" and isinstance(operands[0], tuple):  # taken apart
            bits, parts = self._read(operands[1]), operands[0]
            width = 8 * bits.dtype.itemsize // len(parts)
            for index, part in enumerate(parts):
                self._write(part, bits >> bits.dtype.type(width * index), active)
        elif first == "mov" and isinstance(operands[1], tuple):  # put together
            dtype, parts = operands[0].dtype, operands[1]
            width = 8 * np.dtype(dtype).itemsize // len(parts)
            low = dtype(2**width - 1)
            bits = [(self._read(part).astype(dtype) & low) << dtype(width * index) for index, part in enumerate(parts)]
            self._write(operands[0], np.bitwise_or.reduce(bits), active)
        elif first == "mov" and isinstance(operands[1], Register) and operands[1].name in self.unfinished:
            # In machine code there is no such copy: the compiler gives both one register.
            self._write(operands[0], self._register(operands[1], finished=False), active)
            self.unfinished[operands[0].name] = self.unfinished[operands[1].name]
        else:
            self._write(operands[0], compute(name, [self._read(operand) for operand in operands[1:]]), active)

    # ---- registers ----

    def _read(self, operand: Operand) -> np.ndarray:
        """Bits, of all threads or of one number."""
        if isinstance(operand, Register):
            return self._register(operand)
        if isinstance(operand, Special):
            return self.special[operand.name]
        return np.asarray(operand, dtype=np.uint64)

    def _register(self, register: Register, finished: bool = True) -> np.ndarray:
        product = self.unfinished.get(register.name) if finished else None
        if product is not None and (product.threads & self.active).any():
            raise WrongAccess("a product's result is used before it has been waited for")
        found = self.registers.get(register.name)
        if found is None:
            # All ones are NaN as a float, and nowhere as an address.
            bits = np.zeros(self.threads, dtype=bool)
            found = bits if register.dtype is np.bool_ else ~bits.astype(register.dtype)
            self.registers[register.name] = found
        return found

    def _write(self, register: Operand, bits: np.ndarray, active: np.ndarray) -> None:
        if register is not None:
            np.copyto(self._register(register), bits, where=active, casting="unsafe")

    def _address(self, address: Address) -> np.ndarray:
        base = self._read(address.base) + np.uint64(address.offset)
        return np.broadcast_to(base, self.threads)

    # ---- memory ----

    def _access(self, instruction: Instruction, active: np.ndarray) -> None:
        name, operands = instruction.name, instruction.operands
        if "param" in name:
            self._write(operands[0], np.asarray(self.parameters[operands[1].base], dtype=np.uint64), active)
            return
        dtype = np.dtype(f"u{TYPES[name[-1]].itemsize}")
        loads = name[0] == "ld"
        values, place = operands if loads else operands[::-1]
        values = values if isinstance(values, tuple) else (values,)
        addresses = self._address(place)[active]
        whose = self.block[active], self.warp[active]
        if loads:
            size = dtype.itemsize * len(values)
            found = (
                self.memory.load(addresses, size) if "global" in name else self.shared.load(*whose, addresses, size)
            ).view(dtype)
            for index, register in enumerate(values):
                if register is not None:
                    self._register(register)[active] = found[:, index]
        else:
            bits = [np.broadcast_to(self._read(value), self.threads)[active].astype(dtype) for value in values]
            stored = np.stack(bits, axis=1).view(np.uint8)
            if "global" in name:
                self.memory.store(addresses, stored)
            else:
                self.shared.store(*whose, addresses, stored)

    def _copy(self, instruction: Instruction, active: np.ndarray) -> None:
        """`cp.async`: nothing arrives before it is waited for, and what is there until then is lost."""
        name, operands = instruction.name, instruction.operands
        if "commit_group" in name:
            self.copies.commit(active)
        elif "wait_group" in name:
            for copy, threads in self.copies.wait(active, operands[0]):
                self._arrive(copy, threads)
        else:
            size = operands[2]
            given = self._read(operands[3]) if len(operands) > 3 else np.asarray(size)
            copy = Copy(
                active.copy(),
                self._address(operands[0]).copy(),
                self._address(operands[1]).copy(),
                np.broadcast_to(given, self.threads).copy(),
                size,
            )
            lost = np.full((int(active.sum()), size), 0xFF, dtype=np.uint8)
            self.shared.store(self.block[active], self.warp[active], copy.to[active], lost, under_way=True)
            self.copies.add(active, copy)

    def _arrive(self, copy: Copy, threads: np.ndarray) -> None:
        threads = threads & copy.threads
        values = np.zeros((int(threads.sum()), copy.size), dtype=np.uint8)
        sizes, sources = copy.sizes[threads], copy.source[threads]
        for size in np.unique(sizes[sizes > 0]):
            here = sizes == size
            values[here, : int(size)] = self.memory.load(sources[here], int(size))
        # Triton 3.6 has no fence behind copies, so it is not asked whether matrix units need one there.
        self.shared.store(self.block[threads], self.warp[threads], copy.to[threads], values, fenced=True)

    # ---- warps ----

    def _whole_warps(self, active: np.ndarray) -> None:
        warps = active.reshape(-1, 32)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise WrongAccess("not all threads of a warp are here")

    def _barrier(self, instruction: Instruction, active: np.ndarray) -> None:
        if "warp" in instruction.name:
            return
        blocks = active.reshape(-1, self.program.threads)
        alive = self.alive.reshape(blocks.shape)
        if (blocks.any(axis=1) & (blocks != alive).any(axis=1)).any():
            raise WrongAccess("not all threads of a block reach a barrier")
        self.shared.barrier(np.flatnonzero(blocks.any(axis=1)))

    def _shuffle(self, instruction: Instruction, active: np.ndarray) -> None:
        to, value, lane = instruction.operands[:3]
        bits = np.broadcast_to(self._read(value), self.threads).reshape(-1, 32)
        lane = np.broadcast_to(self._read(lane), self.threads).reshape(-1, 32).astype(np.int64)
        source = np.arange(32) ^ lane if "bfly" in instruction.name else lane
        self._write(to, np.take_along_axis(bits, source % 32, axis=1).ravel(), active)

    def _warps(self, active: np.ndarray) -> np.ndarray:
        return np.flatnonzero(active.reshape(-1, 32).any(axis=1))

    def _of_warps(self, register: Operand, warps: np.ndarray) -> np.ndarray:
        """[warps, 32]."""
        return np.broadcast_to(self._read(register), self.threads).reshape(-1, 32)[warps]

    def _to_warps(self, register: Register, warps: np.ndarray, bits: np.ndarray) -> None:
        self._register(register, finished=False).reshape(-1, 32)[warps] = bits

    def _blocks_and_warps(self, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each of these warps its block, and its number there."""
        return self.block[32 * warps], self.warp[32 * warps]

    def _rows(self, place: Address, warps: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of up to four matrices of 8 × 8 the rows of all warps, eight each: block, warp and address."""
        addresses = self._address(place).reshape(-1, 4, 8)[warps]
        block, warp = (np.repeat(of, 8) for of in self._blocks_and_warps(warps))
        for index in range(4):
            yield block, warp, addresses[:, index].ravel()

    def _load_matrices(self, instruction: Instruction, active: np.ndarray) -> None:
        warps = self._warps(active)
        registers, place = instruction.operands
        for register, (block, warp, addresses) in zip(registers, self._rows(place, warps), strict=False):
            rows = self.shared.load(block, warp, addresses, 16)
            matrix = rows.view(np.uint16).reshape(-1, 8, 8)
            self._to_warps(register, warps, lanes_of_8x8(matrix, "trans" in instruction.name))

    def _store_matrices(self, instruction: Instruction, active: np.ndarray) -> None:
        warps = self._warps(active)
        place, registers = instruction.operands
        for register, (block, warp, addresses) in zip(registers, self._rows(place, warps), strict=False):
            matrix = matrix_of_lanes(self._of_warps(register, warps), "trans" in instruction.name)
            self.shared.store(block, warp, addresses, matrix.reshape(-1, 8).view(np.uint8))

    def _multiply(self, instruction: Instruction, active: np.ndarray) -> None:
        kind = instruction.name[-2]
        if "m16n8k16" not in instruction.name or instruction.name[-1] != "f32":
            raise KeyError("this shape of mma")
        warps = self._warps(active)
        result, first, second, before = instruction.operands
        x, y, sums = ([self._of_warps(register, warps) for register in part] for part in (first, second, before))
        product = numbers(first_factor(x), kind) @ numbers(second_factor(y), kind)
        for register, bits in zip(result, sums_to_registers(sums_from_registers(sums) + product), strict=True):
            self._to_warps(register, warps, bits)

    def _warpgroup(self, instruction: Instruction, active: np.ndarray) -> None:
        """`wgmma`: computed at once, but nobody may use its result, or change its factors, before it is waited for."""
        name, operands = instruction.name, instruction.operands
        if "commit_group" in name:
            self.products.commit(active)
        elif "wait_group" in name:
            for product, threads in self.products.wait(active, operands[0]):
                here = threads[product.blocks * self.program.threads + product.warps * 32]
                self.shared.note_read(
                    product.blocks[here], product.warps[here], product.cells[here], since=product.started
                )
                product.threads &= ~threads
            self.unfinished = {name: product for name, product in self.unfinished.items() if product.threads.any()}
        elif "fence" not in name:
            self._multiply_in_warpgroup(instruction, active)

    def _multiply_in_warpgroup(self, instruction: Instruction, active: np.ndarray) -> None:
        result, first, second, scale, *signs = instruction.operands
        kind, columns = instruction.name[-2], 2 * len(result)
        if signs[:2] != [1, 1] or instruction.name[-3] != "f32":
            raise KeyError("these options of wgmma")
        warps = self._warps(active)
        blocks, warp = self._blocks_and_warps(warps)
        y, cells = self._described(second, warps, columns, signs[-1] == 1)
        if isinstance(first, tuple):
            x = first_factor([self._of_warps(register, warps) for register in first])
        else:
            x, more = self._described(first, warps, 64, signs[2] == 1, of_a_warp=True)
            cells = np.concatenate([cells, more], axis=1)
        product = numbers(x, kind) @ numbers(y, kind).swapaxes(1, 2)
        add = np.broadcast_to(self._read(scale), self.threads).reshape(-1, 32)[warps, :1, None].astype(bool)
        before = [self._register(register, finished=False).reshape(-1, 32)[warps] for register in result]
        sums = np.where(add, sums_from_registers(before) + product, product)
        for register, bits in zip(result, sums_to_registers(sums), strict=True):
            self._to_warps(register, warps, bits)
        under_way = Product(active.copy(), blocks, warp, cells, self.shared.now)
        self.products.add(active, under_way)
        self.unfinished |= {register.name: under_way for register in result}

    def _described(
        self, descriptor: Register, warps: np.ndarray, size: int, along_rows: bool, of_a_warp: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a descriptor says where to find, uint16 [warps, rows, 16], and the cells; `of_a_warp`: of 64 rows each
        warp's 16."""
        blocks, warp = self._blocks_and_warps(warps)
        descriptors = self._of_warps(descriptor, warps)
        if (descriptors != descriptors[:, :1]).any():
            raise WrongAccess("threads of a warp have different descriptors")
        addresses = described_addresses(descriptors[:, 0], size, along_rows)
        if of_a_warp:
            addresses = addresses.reshape(-1, 4, 16, 16)[np.arange(len(warps)), warp % 4]
        bits, cells = self.shared.gather(blocks, warp, addresses.reshape(len(warps), -1))
        return bits.reshape(addresses.shape), cells
