"""The check that holds every other kernel test: no access outside the arguments of a launch."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy(source, target, length, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(target + columns, tl.load(source + columns), mask=columns < length)


@pytest.mark.skipif(torch.cuda.is_available(), reason="belongs to the interpreter, kernels here run on the GPU")
@pytest.mark.parametrize(("read", "written", "wild"), [(8, 8, False), (7, 8, True), (8, 7, True)])
def test_access_outside_the_arguments_is_an_error(read: int, written: int, wild: bool) -> None:
    memory = torch.arange(64.0)
    source, target = memory[8 : 8 + read], memory[40 : 40 + written]  # neighbors in memory would hide the mistake
    if wild:
        with pytest.raises(triton.runtime.errors.InterpreterError, match="_copy: 1 of 8 addresses are outside"):
            _copy[(1,)](source, target, 8, BLOCK=8)
    else:
        _copy[(1,)](source, target, 8, BLOCK=8)
        assert torch.equal(target, source)
