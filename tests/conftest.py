"""Settings of the whole test run."""

import os

import pytest
import torch

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
