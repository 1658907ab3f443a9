"""`launch` takes the compiled kernel that Triton itself would; what is compiled here only notes its calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from opensora_fast.kernels.compilation import modules_with
from opensora_fast.kernels.launch import BUILD_OPTIONS, ceil_divide, launch

calls: list[tuple] = []


class Compiled:
    """In the place of Triton's CompiledKernel, with what `JITFunction.run` and `launch` use of it."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, first: int, second: int, third: int, *others: Any) -> None:
        # stream, function, packed metadata, launch metadata, two hooks; then the arguments
        calls.append((id(self), (first, second, third), others[6:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: calls.append((id(self), grid, arguments))


class Kernel(JITFunction):
    def create_binder(self) -> tuple:
        made = super().create_binder()
        self.compile = lambda *arguments, **keywords: Compiled()
        return made


def _kernel(first, second, count, free, eps, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    tl.store(first, tl.load(second + count + free) + eps + BLOCK)


kernel = Kernel(_kernel, do_not_specialize=["free"])


current = SimpleNamespace(device=0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton sees two GPUs whatever the machine has."""
    device = SimpleNamespace(
        get_current_device=lambda: current.device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", device)


memory = torch.zeros(64)
ALIGNED = memory[4 * (-memory.data_ptr() // 4 % 4) :][:8]
PARAMETERS = [torch.nn.Parameter(ALIGNED), torch.nn.Parameter(ALIGNED[1:]), torch.nn.Parameter(ALIGNED.half())]
POINTERS = [ALIGNED, ALIGNED[1:], ALIGNED.half(), ALIGNED.int(), *PARAMETERS, None]
NUMBERS = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), 2**40, 2**40 + 1, 2**63]


@settings(max_examples=300)
@given(
    st.sampled_from(POINTERS[:-1]),
    st.sampled_from(POINTERS),
    st.sampled_from(NUMBERS),
    st.sampled_from(NUMBERS),
    st.sampled_from([0.0, 1.0, 1e-6]),
    st.fixed_dictionaries(
        {"BLOCK": st.sampled_from([1, 2, 4]), "FLAG": st.booleans(), "num_warps": st.sampled_from([1, 2, 4])},
        optional={"maxnreg": st.just(64)},
    ),
    st.booleans(),
    st.sampled_from([(3,), (3, 2), (3, 2, 1)]),
)
def test_launch_runs_what_triton_would(first, second, count, free, eps, constants, reverse, grid) -> None:
    constants = dict(reversed(constants.items())) if reverse else constants
    arguments = (first, second, count, free, eps)
    for device in (0, 1):
        # A tensor of that GPU, which is the current one: `on_device` makes it so.
        current.device, on = device, SimpleNamespace(is_cuda=False, get_device=lambda: current.device)
        calls.clear()
        kernel[grid](*arguments, **constants, **BUILD_OPTIONS)
        launch(kernel, grid, on, arguments, constants)
        launch(kernel, grid, on, arguments, constants)
        compiled, sizes, given_arguments = calls[0]
        assert len(calls) == 3 and sizes == (*grid, 1, 1)[:3]
        for other, other_sizes, other_arguments in calls[1:]:
            assert other == compiled and other_sizes == sizes
            assert all(a is b or a == b for a, b in zip(given_arguments, other_arguments, strict=True))


def test_the_constexprs_of_every_kernel_come_last() -> None:
    modules = modules_with("compile_cases")
    kernels = {case.kernel.fn: case for module in modules for case in module.compile_cases("sm_90")}
    assert len(kernels) > 15
    for function, case in kernels.items():
        is_constant = [function.__annotations__.get(name) == "tl.constexpr" for name in case.kernel.arg_names]
        assert is_constant == sorted(is_constant), function.__name__


@pytest.mark.parametrize(("number", "divisor"), [(0, 4), (1, 4), (4, 4), (5, 4), (8, 4)])
def test_ceil_divide_is_triton_s(number: int, divisor: int) -> None:
    assert ceil_divide(number, divisor) == triton.cdiv(number, divisor)
