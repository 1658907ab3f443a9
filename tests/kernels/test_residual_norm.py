"""`modulated_norm`, `gate_residual` and `gate_residual_modulated_norm`: Triton against float64 and against eager."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout
from opensora_fast.kernels.configurations import force
from opensora_fast.kernels.rows.residual_norm_tiles import CONFIGURATIONS, fill_rounds
from opensora_fast.kernels.rows.tile_sums import CONFIGURATION

OPS = ("modulated_norm", "gate_residual", "gate_residual_modulated_norm")
CHANNELS = 88  # two blocks, 64 and 24 of 32


def make_layout(
    shapes: Sequence[tuple[int, int, int]], device: torch.device, masked: bool
) -> tuple[PackLayout, Tensor]:
    """A layout and its frame rows; masked: every other frame is a given one."""
    layout = PackLayout.of(shapes, device)
    masks = [torch.arange(frames) % 2 == index % 2 for index, (frames, _, _) in enumerate(shapes)] if masked else None
    return layout, layout.modulation_rows(masks)


def make_inputs(
    op: str, layout: PackLayout, rows: int, dtype: torch.dtype, channels: int = CHANNELS, absent: Sequence[str] = ()
) -> dict[str, Tensor | None]:
    """The tensors of an op by name, each requiring a gradient; the tables are views of one table [R, 3, C]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(layout.device, dtype)

    x, branch = draw(layout.num_tokens, channels) * 2 + 0.5, draw(layout.num_tokens, channels)
    shift, scale, gate = draw(rows, 3, channels).unbind(1)
    inputs = {"x": x}
    if op != "modulated_norm":
        inputs |= {"branch": branch, "gate": gate, "bias": draw(channels)}
    if op != "gate_residual":
        inputs |= {"shift": shift, "scale": scale}
    return {name: None if name in absent else tensor.requires_grad_() for name, tensor in inputs.items()}


def make_call(op: str, layout: PackLayout, frame_rows: Tensor, backend: str) -> Callable:
    def call(**inputs: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(kernels, op)(**inputs, frame_rows=frame_rows, layout=layout, backend=backend)

    return call


def compare(compare_with_eager: Callable, op: str, layout: PackLayout, frame_rows: Tensor, inputs: dict, **keywords):
    ours, reference = (make_call(op, layout, frame_rows, backend) for backend in ("triton", "reference"))
    compare_with_eager(ours, reference, inputs, **keywords)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shapes", "masked"),
    [
        ([(1, 1, 1)], False),
        ([(2, 3, 5)], True),
        ([(16, 1, 1), (16, 1, 1)], True),
        ([(1, 3, 5), (2, 1, 1), (17, 1, 1)], False),
        ([(2, 1, 3), (1, 1, 5), (40, 1, 1)], True),
    ],
    ids=["one token", "one video", "two videos", "three videos", "three videos, given frames"],
)
def test_outputs_and_gradients(op, shapes, masked, dtype, device, compare_with_eager) -> None:
    layout, frame_rows = make_layout(shapes, device, masked)
    inputs = make_inputs(op, layout, rows=len(shapes) * (2 if masked else 1), dtype=dtype)
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", OPS[1:])
@pytest.mark.parametrize("absent", [("gate",), ("bias",), ("gate", "bias")], ids=" and ".join)
def test_without_gate_or_bias(op, absent, dtype, device, compare_with_eager) -> None:
    layout, frame_rows = make_layout([(2, 3, 3), (1, 1, 5)], device, masked=True)
    inputs = make_inputs(op, layout, rows=4, dtype=dtype, absent=absent)
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual_modulated_norm"])
@pytest.mark.parametrize("channels", [2, 8, 144, 1152])
def test_hidden_sizes(op, channels, device, compare_with_eager) -> None:
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=True)
    inputs = make_inputs(op, layout, rows=2, dtype=torch.float32, channels=channels)
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("absent", [(), ("gate", "bias")], ids=["all", "no gate"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS["modulated_norm_backward"]["any"], ids=str)
def test_every_configuration_of_the_backward(op, absent, configuration, device, compare_with_eager) -> None:
    """Tiles of one token and of several, of given and of noised frames."""
    layout, frame_rows = make_layout([(2, 3, 6), (2, 1, 1)], device, masked=True)
    inputs = make_inputs(op, layout, rows=4, dtype=torch.float32, channels=24, absent=absent if op != OPS[0] else ())
    with force(f"{op}_backward", "any", configuration):
        compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", OPS)
def test_strided_and_expanded_inputs(op, dtype, device, compare_with_eager) -> None:
    layout, frame_rows = make_layout([(2, 3, 3), (1, 1, 5)], device, masked=False)
    inputs = make_inputs(op, layout, rows=2, dtype=dtype)
    inputs["x"] = torch.stack([inputs["x"], inputs["x"]], dim=2)[:, :, 1].detach().requires_grad_()
    if "branch" in inputs:
        inputs["branch"] = inputs["branch"][:1].detach().expand(layout.num_tokens, -1).requires_grad_()
    if "gate" in inputs:
        inputs["gate"] = inputs["gate"].detach()[:1].expand(2, -1).requires_grad_()
    if "scale" in inputs:
        inputs["scale"] = inputs["scale"].detach().t().contiguous().t().requires_grad_()
    compare(compare_with_eager, op, layout, frame_rows, inputs, expanded_gradient=True)


@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual_modulated_norm"])
@pytest.mark.parametrize("masked", [True, False])
def test_long_tiles_and_many_of_them(op, masked, device, compare_with_eager) -> None:
    """Frames longer than a tile, and more tiles than the second step of the sums takes at once."""
    layout, frame_rows = make_layout([(1, 12, 12), (2 * CONFIGURATION["BLOCK_TILES"] + 1, 1, 1)], device, masked)
    inputs = make_inputs(op, layout, rows=4 if masked else 2, dtype=torch.float32, channels=8)
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(op, device, compare_with_eager) -> None:
    """A float32 residual stream and float32 tables with half-precision branches, as under autocast."""
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=False)
    inputs = make_inputs(op, layout, rows=1, dtype=torch.float32)
    if "branch" in inputs:
        inputs["branch"] = inputs["branch"].detach().half().requires_grad_()
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("narrow", ["shift", "scale"])
@pytest.mark.parametrize("op", ["modulated_norm", "gate_residual_modulated_norm"])
def test_each_table_receives_its_gradient_in_its_own_dtype(op, narrow, device, compare_with_eager) -> None:
    """Not rounded to that of the other table on the way."""
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=False)
    inputs = make_inputs(op, layout, rows=1, dtype=torch.float32)
    inputs[narrow] = inputs[narrow].detach().half().requires_grad_()
    compare(compare_with_eager, op, layout, frame_rows, inputs)


@pytest.mark.parametrize("op", OPS)
def test_only_the_wanted_gradients(op, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=False)
    names = list(make_inputs(op, layout, rows=1, dtype=torch.float32))
    for wanted in [(name,) for name in names] + [("x", "branch"), ("scale", "gate")]:
        inputs = make_inputs(op, layout, rows=1, dtype=torch.float32, channels=8)
        inputs = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        gradients = []
        for backend in ("triton", "reference"):
            leaves = {name: tensor.clone().detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
            output = make_call(op, layout, frame_rows, backend)(**leaves)
            total = sum(part.sin().sum() for part in (output if isinstance(output, tuple) else (output,)))
            if total.requires_grad:
                total.backward()
            gradients.append({name: leaf.grad for name, leaf in leaves.items()})
        ours, reference = gradients
        for name in names:
            assert (ours[name] is not None) == (name in wanted), name
            if name in wanted:
                torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1], ids=["residual", "normed"])
def test_only_one_output_used(used, device, compare_with_eager) -> None:
    op = "gate_residual_modulated_norm"
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=True)
    inputs = make_inputs(op, layout, rows=2, dtype=torch.float32)
    unused = ("shift", "scale") if used == 0 else ()
    inputs = {name: tensor.detach() if name in unused else tensor for name, tensor in inputs.items()}

    def only(backend: str) -> Callable:
        return lambda **tensors: make_call(op, layout, frame_rows, backend)(**tensors)[used]

    compare_with_eager(only("triton"), only("reference"), inputs)


@pytest.mark.parametrize("op", OPS)
def test_two_backwards_are_equal_bit_for_bit(op, dtype, device) -> None:
    layout, frame_rows = make_layout([(2, 3, 3), (1, 1, 1)], device, masked=True)
    runs = []
    for _ in range(2):
        inputs = make_inputs(op, layout, rows=4, dtype=dtype)
        output = make_call(op, layout, frame_rows, "triton")(**inputs)
        sum(part.square().sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
        runs.append([tensor.grad for tensor in inputs.values()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_registration(op, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3), (1, 2, 2)], device, masked=True)
    inputs = make_inputs(op, layout, rows=4, dtype=torch.float32, channels=8)
    tables = frame_rows, layout.frame_tiles(16), layout.frame_tiles(32), layout.video_tiles(32)
    more = {
        "modulated_norm": (1e-6, torch.float32),
        "gate_residual": (),
        "gate_residual_modulated_norm": (1e-6, torch.float32, torch.float32),
    }
    torch.library.opcheck(getattr(torch.ops.opensora_fast, op).default, (*inputs.values(), *tables, *more[op]))


@pytest.mark.parametrize("op", OPS)
def test_full_graph_compilation(op, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3), (1, 2, 2)], device, masked=True)
    call = make_call(op, layout, frame_rows, "triton")
    gradients = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        inputs = make_inputs(op, layout, rows=4, dtype=torch.float32, channels=8)
        output = function(**inputs)
        sum(part.sin().sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
        gradients.append([tensor.grad for tensor in inputs.values()])
    for ours, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, compiled)


@pytest.mark.parametrize("op", OPS)
def test_checkpointing_and_accumulation(op, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=True)
    call = make_call(op, layout, frame_rows, "triton")
    gradients = []
    for checkpointed in (False, True):
        inputs = make_inputs(op, layout, rows=2, dtype=torch.float32, channels=8)
        for _ in range(2):
            if checkpointed:
                output = torch.utils.checkpoint.checkpoint(call, use_reentrant=False, **inputs)
            else:
                output = call(**inputs)
            sum(part.sin().sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
        gradients.append([tensor.grad for tensor in inputs.values()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_gives_what_the_next_linear_reads(backend, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=False)
    inputs = make_inputs("gate_residual_modulated_norm", layout, rows=1, dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        residual, normed = make_call("gate_residual_modulated_norm", layout, frame_rows, backend)(**inputs)
        alone = kernels.modulated_norm(
            inputs["x"], inputs["shift"], inputs["scale"], frame_rows, layout, backend=backend
        )
    assert residual.dtype == torch.float32 and normed.dtype == alone.dtype == torch.float16
    (normed.sum() + residual.sum()).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())


@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_named(op, device) -> None:
    layout, frame_rows = make_layout([(2, 1, 3)], device, masked=False)
    right = make_inputs(op, layout, rows=1, dtype=torch.float32, channels=8)
    call = make_call(op, layout, frame_rows, "triton")
    for name, tensor in right.items():
        with pytest.raises(ValueError, match=f"{op}: {name} has shape"):
            call(**right | {name: tensor.detach()[:, None]})
        with pytest.raises(ValueError, match=f"{op}: {name} has dtype torch.int64"):
            call(**right | {name: tensor.detach().long()})
        with pytest.raises(ValueError, match=f"{op}: {name} is on meta"):
            call(**right | {name: tensor.detach().to("meta")})
    with pytest.raises(
        ValueError, match=f"{op}: its Triton kernel takes float32, float16 and bfloat16, got torch.float64"
    ):
        call(**right | {"x": right["x"].detach().double()})
    with pytest.raises(ValueError, match=f"{op}: frame_rows is torch.int64"):
        make_call(op, layout, frame_rows.long(), "triton")(**right)
    strided = torch.stack([frame_rows, frame_rows], dim=1)[:, 0]
    with pytest.raises(ValueError, match=f"{op}: frame_rows is not contiguous"):
        make_call(op, layout, strided, "triton")(**right)
    for name in {"shift", "scale"} & set(right):
        with pytest.raises(ValueError, match=f"{op}: {name} must be a tensor, got NoneType"):
            call(**right | {name: None})
    with pytest.raises(ValueError, match=f"{op}: x has 1 channels, expected at least 2"):
        call(**make_inputs(op, layout, rows=1, dtype=torch.float32, channels=1))


@pytest.mark.parametrize("op", OPS)
def test_rows_of_given_frames_need_tables_that_hold_them(op, device) -> None:
    """A kernel would read behind tables of one row a video; nobody waits for the GPU to look at the numbers."""
    layout, frame_rows = make_layout([(2, 1, 3), (3, 2, 2)], device, masked=True)
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match=f"{op}: tables of 2 rows go with layout.frame_video.* need 4"):
            make_call(op, layout, frame_rows, backend)(**make_inputs(op, layout, 2, torch.float32))
        for rows, number in ((layout.frame_video, 2), (layout.frame_video, 4), (frame_rows, 4)):
            make_call(op, layout, rows, backend)(**make_inputs(op, layout, number, torch.float32))
        with pytest.raises(ValueError, match=f"{op}: .* has 3 rows, expected 2 .one per video. or 4"):
            make_call(op, layout, frame_rows, backend)(**make_inputs(op, layout, 3, torch.float32))


def tiles_of_backward(shapes: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """(programs, tokens of the longest, of the shortest) for 132 multiprocessors that hold four programs each."""
    layout = PackLayout.of(shapes, "cpu")
    size = fill_rounds(layout.num_tokens, layout.tile_counts, multiprocessors=132, side_by_side=4)
    count = layout.frame_tiles(size)[:, 1]
    return len(count), int(count.max()), int(count.min())


def test_tiles_of_the_backward_fill_the_multiprocessors() -> None:
    """On an H200 these took 132, 131, 109, 97 and 215 µs; cut at 128 tokens 132, 128, 121,
    116 and 216, at 64 tokens 152, 171, 119, 99 and 215. 528 fit at a time; a few more run alone at the end."""
    assert tiles_of_backward([(16, 9, 16)] * 14) == (448, 72, 72)
    assert tiles_of_backward([(16, 15, 27)] * 5) == (480, 68, 65)
    assert tiles_of_backward([(16, 23, 40)] * 2) == (384, 77, 73)
    assert tiles_of_backward([(16, 30, 53)]) == (368, 70, 50)
    assert tiles_of_backward([(16, 45, 80)]) == (528, 110, 80)


def test_few_tokens_are_cut_into_as_many_tiles_as_there_can_be() -> None:
    assert tiles_of_backward([(16, 9, 9)]) == (96, 14, 11)


def tiles_of_forward(shapes: list[tuple[int, int, int]]) -> tuple[int, int]:
    """(programs, tokens of the longest) of the fused forward for 132 multiprocessors that hold eight programs each."""
    layout = PackLayout.of(shapes, "cpu")
    size = fill_rounds(layout.num_tokens, layout.tile_counts, multiprocessors=132, side_by_side=8, direction="forward")
    count = layout.frame_tiles(size)[:, 1]
    return len(count), int(count.max())


def test_tiles_of_the_forward_leave_no_programs_alone_at_the_end() -> None:
    """1056 fit at a time. In tiles of up to 32 tokens these were 1120 programs, 64 of them alone, and 1248."""
    assert tiles_of_forward([(16, 9, 16)] * 14) == (896, 36)
    assert tiles_of_forward([(16, 15, 27)] * 6) == (1056, 37)
    assert tiles_of_forward([(16, 15, 27)] * 5) == (1040, 32)
