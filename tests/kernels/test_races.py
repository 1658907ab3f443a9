"""No program depends on what another of the same launch does: the interpreter runs them in order, a GPU does not.

Every load and store of every launch is noted. Within a launch an element may be written once, and what is written may
be read only before, by the program that writes it: not even a program's own threads wait for each other's stores.
"""

import importlib
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_fast.kernels import (
    PackLayout,
    TextLayout,
    adamw,
    cross_attention,
    gate_residual_modulated_norm,
    gelu_tanh,
    qk_norm_rotary,
    spatial_attention,
    temporal_attention,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="belongs to the interpreter")

HEADS, HEAD_SIZE = 2, 24


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels launched; an AssertionError where two accesses of a launch depend on their order."""
    from triton.runtime import interpreter

    names: list[str] = []
    # (program, time, addresses)
    seen: dict[str, list[tuple[int, int, np.ndarray]]] = {"read": [], "written": []}
    clock = count()
    builder = interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def note(kind: str, self: object, pointers: object, mask: object) -> None:
        (x, y, z), (columns, rows, _) = self.grid_idx, self.grid_dim
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        seen[kind].append((x + columns * (y + rows * z), next(clock), addresses.astype(np.int64).ravel()))

    def noted_load(self, pointers, mask, *others):
        note("read", self, pointers, mask)
        return load(self, pointers, mask, *others)

    def noted_store(self, pointers, value, mask, *others):
        note("written", self, pointers, mask)
        return store(self, pointers, value, mask, *others)

    def noted_run(executor, *arguments, **keywords):
        for accesses in seen.values():
            accesses.clear()
        run(executor, *arguments, **keywords)
        names.append(executor.fn.__name__)
        refuse_dependence(executor.fn.__name__, *(join(accesses) for accesses in seen.values()))

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted_run)
    yield names


def join(accesses: list[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """[3, accesses]: program, time and address of each element."""
    parts = [
        np.stack([np.full_like(places, program), np.full_like(places, time), places])
        for program, time, places in accesses
    ]
    return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)


def refuse_dependence(kernel: str, read: np.ndarray, written: np.ndarray) -> None:
    written = written[:, np.argsort(written[2], kind="stable")]
    twice = (written[2, 1:] == written[2, :-1]).sum()
    assert not twice, f"{kernel}: {twice} elements are written twice"
    place = np.minimum(np.searchsorted(written[2], read[2]), max(written.shape[1] - 1, 0))
    again = read[:, written[2, place] == read[2]] if written.size else read[:, :0]
    by = written[:, np.searchsorted(written[2], again[2])]
    early = (by[0] == again[0]) & (again[1] < by[1])
    assert early.all(), f"{kernel}: {(~early).sum()} elements are read that the launch writes, by another or before"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()


def run(op: Callable, **inputs: object) -> None:
    """Forward and backward by Triton."""
    outputs = op(**inputs, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def weights(with_norm: bool) -> dict[str, Tensor | None]:
    return {name: draw(HEAD_SIZE) if with_norm else None for name in ("q_weight", "k_weight")}


@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "no norm"])
def test_spatial_attention(with_norm, launches, monkeypatch) -> None:
    """Frames of each class in one pack; the large one has several tiles in backward."""
    for name, value in (("LONGEST_SMALL_FRAME", 15), ("LONGEST_MEDIUM_FRAME", 20)):
        monkeypatch.setattr(f"opensora_fast.kernels.attention.spatial_forward.{name}", value)
    layout = PackLayout.of([(2, 3, 5), (1, 6, 11), (1, 4, 5)], "cpu")
    qkv, bias = draw(layout.num_tokens, 3, HEADS, HEAD_SIZE), draw(3, HEADS, HEAD_SIZE)
    run(spatial_attention, qkv=qkv, **weights(with_norm), layout=layout, qkv_bias=bias)
    assert {"_forward", "spatial_queries_backward", "spatial_keys_backward"} <= set(launches)


@pytest.mark.parametrize(
    ("shapes", "longest", "with_norm"),
    [
        ([(5, 1, 13), (1, 1, 3), (17, 1, 2), (40, 1, 1)], 128, True),
        ([(5, 1, 4), (40, 1, 1)], 128, False),
        ([(40, 1, 1), (2, 1, 2)], 0, True),
    ],
    ids=["tiles", "tiles, no norm", "blocks"],
)
def test_temporal_attention(shapes, longest, with_norm, launches, monkeypatch) -> None:
    module = importlib.import_module("opensora_fast.kernels.temporal_attention")
    monkeypatch.setattr(module, "longest_tile", lambda device, dtype: longest)
    layout = PackLayout.of(shapes, "cpu")
    qkv, bias = draw(layout.num_tokens, 3, HEADS, HEAD_SIZE), draw(3, HEADS, HEAD_SIZE)
    angles = draw(40, HEAD_SIZE // 2).detach()
    run(temporal_attention, qkv=qkv, **weights(with_norm), cos=angles, sin=angles, layout=layout, qkv_bias=bias)
    assert {"_queries", "_keys"} <= set(launches) if longest == 0 else "_backward" in launches


@pytest.mark.parametrize("lengths", [[33, 0, 5], [200, 7, 129], [257, 40, 0]], ids=["one tile", "two tiles", "long"])
def test_cross_attention(lengths, launches) -> None:
    layout = PackLayout.of([(2, 3, 3), (4, 9, 9), (1, 1, 1)], "cpu")
    text = TextLayout.from_lengths(lengths, layout.device)
    q, kv = draw(layout.num_tokens, HEADS, HEAD_SIZE), draw(text.num_tokens, 2, HEADS, HEAD_SIZE)
    run(cross_attention, q=q, kv=kv, layout=layout, text=text, q_bias=draw(HEADS, HEAD_SIZE))
    assert {"_forward", "_chunks", "sum_tiles"} <= set(launches)


def test_norm_and_gate(launches) -> None:
    layout = PackLayout.of([(2, 3, 5), (1, 5, 5), (3, 1, 1)], "cpu")
    frame_rows = layout.modulation_rows([torch.arange(frames) % 2 == 0 for frames, _, _ in layout.shapes])
    rows, tables = {name: draw(layout.num_tokens, 24) for name in ("x", "branch")}, ("gate", "shift", "scale")
    tables = {name: draw(6, 24) for name in tables}
    inputs = {**rows, **tables, "bias": draw(24), "frame_rows": frame_rows, "layout": layout}
    run(gate_residual_modulated_norm, **inputs)
    assert launches == ["residual_norm_forward", "residual_norm_backward", "sum_tiles"]


def test_gelu(launches) -> None:
    run(gelu_tanh, x=draw(70, 530), bias=draw(530))
    assert launches == ["gelu_tanh_forward", "gelu_tanh_backward", "sum_tiles"]


def test_qk_norm_rotary(launches) -> None:
    layout = PackLayout.of([(2, 3, 7), (1, 1, 1)], "cpu")
    q, k, _ = draw(layout.num_tokens, 3, HEADS, HEAD_SIZE).unbind(1)
    angles = draw(2, HEAD_SIZE // 2).detach()
    run(qk_norm_rotary, q=q, k=k, **weights(True), cos=angles, sin=angles, layout=layout)
    assert launches == ["_forward", "_backward"]


def test_adamw(launches) -> None:
    state = {name: draw(1500).detach() for name in ("master", "first_moment", "second_moment", "average")}
    state["second_moment"].abs_()
    gradient, working = draw(1500).detach(), torch.zeros(1500, dtype=torch.float16)
    step = torch.zeros(())
    adamw(gradient, gradient.norm(), step, **state, working=working, lr=1e-3, decay=0.9, backend="triton")
    assert launches == ["_adamw"]


@triton.jit
def _shift(source, target, BY: tl.constexpr, TWICE: tl.constexpr):
    program = tl.program_id(0)
    value = tl.load(source + program + BY)
    tl.store(target + program, value)
    if TWICE:
        tl.store(target + program, value)


@pytest.mark.parametrize(
    ("by", "overlap", "twice", "fault"),
    [
        (0, False, False, None),
        (0, True, False, None),  # read, then written, by the same program
        (1, True, False, "_shift: 3 elements are read that the launch writes"),
        (0, False, True, "_shift: 4 elements are written twice"),
    ],
)
def test_dependence_is_found(by, overlap, twice, fault, launches) -> None:
    memory = torch.zeros(16)
    target = memory[:4] if overlap else memory[8:12]
    if fault is None:
        _shift[(4,)](memory[:5], target, BY=by, TWICE=twice)
    else:
        with pytest.raises(AssertionError, match=fault):
            _shift[(4,)](memory[:5], target, BY=by, TWICE=twice)


def test_what_a_program_wrote_it_may_not_read_again() -> None:
    first, later = (0, 1, np.array([8, 12])), (0, 2, np.array([12]))
    refuse_dependence("kernel", join([first]), join([later]))
    with pytest.raises(AssertionError, match="1 elements are read that the launch writes"):
        refuse_dependence("kernel", join([later]), join([first]))
