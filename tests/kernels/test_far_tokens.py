"""Tensors of more than 2^31 elements: the programs at their far end find their rows, as those of a small pack do.

The memory is reserved and never touched but at that end, where alone programs run: under a gigabyte in all. Where
addresses themselves are scarce (`ulimit -v`, or vm.overcommit_memory=2), what cannot be reserved is skipped.

Triton's numbers have 32 bits unless told otherwise; while these tests run, a sum or product of some that overflows is
an error, whether it is used or not.
"""

import importlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

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
from opensora_fast.kernels.attention.cross_chunks_backward import launch_chunks
from opensora_fast.kernels.rows.tile_sums import launch_sum_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="belongs to the interpreter")

LIMIT = 2**31
HEADS, HEAD_SIZE = 16, 72
CHANNELS = HEADS * HEAD_SIZE
TOKENS = LIMIT // CHANNELS + 1
MAP_NORESERVE = 0x4000  # Linux; of the module mmap from Python 3.11 on


def reserve(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where something is written."""
    size = max(prod(shape), 1) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"this machine does not let {size / 2**30:.1f} GiB of addresses be reserved: {error}")
    return torch.frombuffer(memory, dtype=dtype)[: prod(shape)].view(shape)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of that of other tests, which writes to all of a tensor."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        return reserve(*(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape), dtype=dtype)

    def empty_like(like: Tensor, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        return reserve(*like.shape, dtype=dtype or like.dtype)

    def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        return empty(*shape, dtype=dtype or like.dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many programs along the grid's first axis each kernel runs, its last ones: one unless said otherwise."""
    from triton.runtime import interpreter

    chosen: dict[str, int] = {}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, index, number = executor.__call__, builder.create_get_program_id, builder.create_get_num_programs
    left_out = np.zeros(3, np.int32)

    def shifted(original: Callable) -> Callable:
        def get(self, axis):
            found = original(self, axis)
            return interpreter.TensorHandle(found.data + left_out[axis], found.dtype)

        return get

    def run_last(self, *arguments, **keywords):
        programs = self.grid[0]
        assert max(self.grid[1:], default=1) < 2**16 and programs < 2**31, "larger than a CUDA grid"
        shown = min(programs, chosen.get(self.fn.__name__, 1))
        self.grid, left_out[0] = (shown, *self.grid[1:]), programs - shown
        run(self, *arguments, **keywords)

    monkeypatch.setattr(builder, "create_get_program_id", shifted(index))
    monkeypatch.setattr(builder, "create_get_num_programs", shifted(number))
    monkeypatch.setattr(executor, "__call__", run_last)
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)  # it copies all memory onto itself
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=True, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    yield chosen


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def far(near: Tensor, rows: int, at: slice | Tensor | None = None) -> Tensor:
    """`near` as rows of a tensor with so many: its last ones, or those given."""
    tensor = reserve(rows, *near.shape[1:], dtype=near.dtype)
    tensor[slice(-near.shape[0], None) if at is None else at] = near
    return tensor


def run(op: Callable, inputs: dict, gradients: list[Tensor]) -> list[Tensor]:
    """Outputs by Triton, and the gradients of the inputs that are tensors of floats, in their order."""
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    outputs = op(**leaves, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    return [output.detach() for output in outputs] + list(found)


def compare(near: list[Tensor], distant: list[Tensor], at: slice | Tensor, pick: Callable = lambda rows: rows) -> None:
    """What is picked of the near results and of those rows of the distant ones has the same bits, few of them zero."""
    for number, (expected, found) in enumerate(zip(near, distant, strict=True)):
        assert found.numel() > LIMIT, f"{number} is too small a tensor to show anything"
        expected, found = pick(expected), pick(found[at])
        assert expected.count_nonzero() > 0.9 * expected.numel() and torch.equal(found, expected), number


def last_head(rows: Tensor) -> Tensor:
    """That of the last program: heads run fastest."""
    return rows.reshape(rows.shape[0], -1, HEADS, HEAD_SIZE)[:, :, -1]


@pytest.mark.parametrize("frame_class", ["small", "large"])
def test_spatial_attention(frame_class, last, monkeypatch) -> None:
    longest = {"small": (256, 1024), "large": (0, 0)}[frame_class]
    for name, value in zip(("LONGEST_SMALL_FRAME", "LONGEST_MEDIUM_FRAME"), longest, strict=True):
        monkeypatch.setattr(f"opensora_fast.kernels.attention.spatial_forward.{name}", value)
    last["spatial_queries_backward"] = HEADS + 1  # a small frame of 64 tokens is two tiles, of all heads each
    qkv, weight, gradient = draw(64, 3, HEADS, HEAD_SIZE), draw(HEAD_SIZE), draw(64, HEADS, HEAD_SIZE)
    results = []
    for frames in (1, LIMIT // (64 * 64 * HEADS) + 1):  # the narrowest rows there are hold 64 columns of each head
        layout, tokens = PackLayout.of([(frames, 8, 8)], "cpu"), 64 * frames
        inputs = {"qkv": far(qkv, tokens), "q_weight": weight, "k_weight": weight, "layout": layout}
        results.append(run(spatial_attention, inputs, [far(gradient, tokens)])[:2])
    compare(*results, slice(-64, None), last_head)


@pytest.mark.parametrize("longest", [128, 0], ids=["tile", "block"])
def test_temporal_attention(longest, last, monkeypatch) -> None:
    """One video, so that the frames of a place lie as far from each other as they can."""
    module = importlib.import_module("opensora_fast.kernels.temporal_attention")
    monkeypatch.setattr(module, "longest_tile", lambda device, dtype: longest)
    frames = 16
    qkv, weight, gradient = draw(frames, 3, HEADS, HEAD_SIZE), draw(HEAD_SIZE), draw(frames, HEADS, HEAD_SIZE)
    angles, results = draw(frames, HEAD_SIZE // 2, dtype=torch.float32), []
    for places in (1, LIMIT // (frames * CHANNELS) + 1):
        layout, at = PackLayout.of([(frames, 1, places)], "cpu"), torch.arange(1, frames + 1) * places - 1
        inputs = {"qkv": far(qkv, frames * places, at), "q_weight": weight, "k_weight": weight}
        inputs |= {"cos": angles, "sin": angles, "layout": layout}
        results.append(run(temporal_attention, inputs, [far(gradient, frames * places, at)])[:2])
    compare(*results, at, last_head)


@pytest.mark.parametrize("bound", [256, 300], ids=["short texts", "long texts"])
def test_cross_attention(bound, last) -> None:
    """The bound on the lengths of texts chooses the kernels. Partial sums lie far apart where videos are many."""
    q, gradient, kv = draw(35, HEADS, HEAD_SIZE), draw(35, HEADS, HEAD_SIZE), draw(40, 2, HEADS, HEAD_SIZE)
    others, results = LIMIT // (256 * 2 * CHANNELS) + 1, []
    for shapes in ([(1, 5, 7)], [(1, 1, TOKENS // others + 1)] * others + [(1, 5, 7)]):
        layout = PackLayout.of(shapes, "cpu")
        lengths = [0] * (len(shapes) - 1) + [40]
        text = replace(TextLayout.from_lengths(lengths, layout.device), max_length=bound)
        inputs = {"q": far(q, layout.num_tokens), "kv": kv, "layout": layout, "text": text}
        results.append(run(cross_attention, inputs, [far(gradient, layout.num_tokens)])[:2])
    compare(*results, slice(-35, None), last_head)


def test_chunks_of_cross_attention(last) -> None:
    sums, length = draw(1, 2000, 64, dtype=torch.float32), 2000
    for chunks in (1, LIMIT // sums.numel() + 2):
        partials, gradient = far(sums, chunks), torch.zeros(length, 64)
        ranges, starts, lengths = (
            torch.tensor(numbers, dtype=torch.int32) for numbers in ([chunks - 1, 1], [0], [length])
        )
        launch_chunks(partials, gradient, ranges, starts, lengths)
        assert torch.equal(gradient[-1], sums[0, -1])
    assert partials.numel() > LIMIT


def test_norm_and_gate(last) -> None:
    x, branch, gradient = draw(8, CHANNELS), draw(8, CHANNELS), draw(8, CHANNELS)
    tables, results = {name: draw(1, CHANNELS) for name in ("gate", "shift", "scale")}, []
    for shapes in ([(1, 2, 4)], [(1, 1, TOKENS), (1, 2, 4)]):
        layout = PackLayout.of(shapes, "cpu")
        inputs = {"x": far(x, layout.num_tokens), "branch": far(branch, layout.num_tokens)}
        inputs |= {name: far(table, len(shapes)) for name, table in tables.items()} | {"bias": draw(CHANNELS)}
        inputs |= {"frame_rows": layout.frame_video, "layout": layout}
        results.append(run(gate_residual_modulated_norm, inputs, [far(gradient, layout.num_tokens)] * 2)[:4])
    compare(*results, slice(-8, None))


def test_gelu(last) -> None:
    columns, gradient = 4 * CHANNELS, draw(8, 4 * CHANNELS)
    last |= dict.fromkeys(("gelu_tanh_forward", "gelu_tanh_backward"), columns // 512)
    x, results = draw(8, columns) + 5, []
    for rows in (8, LIMIT // columns // 8 * 8 + 8):
        inputs = {"x": far(x, rows), "bias": draw(columns)}
        results.append(run(gelu_tanh, inputs, [far(gradient, rows)])[:2])
    compare(*results, slice(-8, None))


def test_qk_norm_rotary(last) -> None:
    last |= dict.fromkeys(("_forward", "_backward"), 4)  # of 64 (token, head) pairs each, for a tile of 16 tokens
    qkv, weight, results = draw(2, 3, HEADS, HEAD_SIZE), draw(HEAD_SIZE), []
    angles, gradient = draw(1, HEAD_SIZE // 2, dtype=torch.float32), draw(2, HEADS, HEAD_SIZE)
    for shapes in ([(1, 1, 2)], [(1, 1, TOKENS), (1, 1, 2)]):
        layout = PackLayout.of(shapes, "cpu")
        q, k, _ = far(qkv, layout.num_tokens).unbind(1)
        inputs = {"q": q, "k": k, "q_weight": weight, "k_weight": weight}
        inputs |= {"cos": angles, "sin": angles, "layout": layout}
        results.append(run(qk_norm_rotary, inputs, [far(gradient, layout.num_tokens)] * 2)[:4])
    compare(*results, slice(-2, None))


def test_qk_norm_rotary_of_heads_that_lie_far_apart(last) -> None:
    last |= dict.fromkeys(("_forward", "_backward"), 4)  # of 64 (token, head) pairs each, for a tile of 16 tokens
    heads, weight, results = draw(HEADS, 2, HEAD_SIZE), draw(HEAD_SIZE), []
    gradient = draw(2, HEADS, HEAD_SIZE)
    for shapes in ([(1, 1, 2)], [(1, 1, LIMIT // ((HEADS - 1) * HEAD_SIZE)), (1, 1, 2)]):
        layout = PackLayout.of(shapes, "cpu")
        stream = reserve(HEADS, layout.num_tokens, HEAD_SIZE, dtype=torch.float16)
        stream[:, -2:] = heads
        q = stream.transpose(0, 1)
        inputs = {"q": q, "k": q, "q_weight": weight, "k_weight": weight, "cos": None, "sin": None, "layout": layout}
        results.append(run(qk_norm_rotary, inputs, [far(gradient, layout.num_tokens)] * 2)[:4])
    compare(*results, slice(-2, None))


def test_adamw(last) -> None:
    names = ("gradient", "master", "first_moment", "second_moment", "working", "average")
    norm, results = torch.ones(()), []
    for size in (1024, LIMIT + 1024):
        state = {name: far(draw(1024, dtype=torch.float32).abs(), size) for name in names}
        adamw(norm=norm, step=torch.zeros(()), **state, lr=0.1, decay=0.5, backend="triton")
        results.append(list(state.values()))
    compare(*results, slice(-1024, None))
    assert not torch.equal(results[0][1], results[0][0]), "nothing was done"


def test_more_videos_than_a_grid_is_high(last) -> None:
    """A CUDA grid has at most 65535 programs along its second axis. The last video has the last tile, or the chunk."""
    sums, numbers = draw(1, 8, dtype=torch.float32), torch.zeros(65538, dtype=torch.int32)
    partials, by_row = far(sums, LIMIT // 8 + 1)[None], torch.zeros(65537, 8)
    tiles, frame_rows = reserve(partials.shape[1], 3, dtype=torch.int32), torch.tensor([65536], dtype=torch.int32)
    numbers[-2:] = torch.arange(2) + partials.shape[1] - 1
    launch_sum_tiles(partials, [by_row], None, tiles, frame_rows, numbers)
    assert torch.equal(by_row[-1:], sums)
    ranges, gradient = torch.stack([torch.zeros(65537), numbers.diff()], dim=1).int(), torch.zeros(1, 8)
    launch_chunks(sums[None], gradient, ranges, torch.zeros_like(ranges[:, 0]), numbers.diff())
    assert torch.equal(gradient, sums)


def test_sequences_beyond_32_bits_are_refused(monkeypatch) -> None:
    layout = PackLayout.of([(1, 788, 789)], "cpu")
    qkv = reserve(layout.num_tokens, 3, HEADS, HEAD_SIZE, dtype=torch.float16)
    with pytest.raises(
        ValueError, match="spatial_attention: a frame of 621732 tokens .* up to 621378 have; use backend"
    ):
        spatial_attention(qkv, None, None, layout, backend="triton")
    layout = PackLayout.of([(2**23 // 64, 8, 8)], "cpu")
    qkv = reserve(layout.num_tokens, 3, 128, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="spatial_attention: a pack of 8388608 tokens .* up to 8388607 have"):
        spatial_attention(qkv, None, None, layout, backend="triton")
    layout = PackLayout.of([(1, 1, 1)], "cpu")
    text = replace(TextLayout.from_lengths([1], layout.device), max_length=10**6)
    with pytest.raises(ValueError, match="cross_attention: a text of 1000000 tokens .* up to 932067 have"):
        cross_attention(draw(1, HEADS, HEAD_SIZE), draw(1, 2, HEADS, HEAD_SIZE), layout, text, backend="triton")


@triton.jit
def _multiply(source, target, factor):
    tl.store(target, tl.load(source) * factor)


@pytest.mark.parametrize("factor", [2, 4])
def test_an_overflow_is_an_error(factor, last) -> None:
    source, target = torch.full((1,), 2**29, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    if factor == 2:
        _multiply[(1,)](source, target, factor)
        assert target.item() == 2**30
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow detected for operation mul"):
            _multiply[(1,)](source, target, factor)
