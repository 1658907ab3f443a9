"""Whether it is the memory of a GPU that has run out, and what to change then."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# In messages: of CUDA, which torch ("CUDA error: out of memory") and Triton ("Triton Error [CUDA]: out of memory") pass
# on, and of cuBLAS, where it cannot make a handle.
SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def find_out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error itself, or what it came from, that says that a GPU's memory has run out; None if none does.

    Only torch's allocator raises `torch.OutOfMemoryError`. Memory that CUDA itself needs, for a graph or the code of a
    kernel, is another RuntimeError of torch (`torch.AcceleratorError`) or one of Triton.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def naming_out_of_memory(what: str) -> Iterator[None]:
    """ValueError in place of whatever is raised where a GPU's memory runs out.

    Args:
        what: did not fit, and what to change; goes behind "out of GPU memory".
    """
    try:
        yield
    except Exception as error:
        ran_out = find_out_of_memory(error)
        if ran_out is None:
            raise
        raise ValueError(f"out of GPU memory {what}. {ran_out}") from error
