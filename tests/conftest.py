"""Settings of the whole test run."""

import os
from collections.abc import Iterator

import pytest
import torch
from triton_interpreter import refuse_access_outside_arguments

# Triton reads this when it is first imported: without a GPU its kernels run on the CPU, in numpy. "auto" still means
# the reference there, so nothing but the kernel tests notices.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run: on the GPU, or interpreted on the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[None]:
    """Triton's interpreter as the kernel tests use it, where there is no GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from opensora_fast.benchmarks.interpreter import interpret_quickly

    with interpret_quickly(), refuse_access_outside_arguments():
        yield
