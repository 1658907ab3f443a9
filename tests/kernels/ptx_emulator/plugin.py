"""For pytest: runs tests of kernels on the emulator, those in bfloat16 too, which need a GPU otherwise.

    cd tests/kernels; TRITON_INTERPRET=0 PYTHONPATH=. python -m pytest -p ptx_emulator.plugin -m gpu test_gelu_tanh.py

float32 takes the kernels that it takes on a CPU; on a GPU it has tiles of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .driver import emulate, launches


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET", "1") != "0":
        raise pytest.UsageError("set TRITON_INTERPRET=0: what Triton interprets is not built")


@pytest.fixture(autouse=True, scope="session")
def emulator() -> Iterator[None]:
    from opensora_fast.kernels import dispatch

    with emulate(), pytest.MonkeyPatch.context() as patches:
        # "auto" still means the reference: it asks where a tensor is.
        patches.setattr(dispatch, "interpreting", lambda: True)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"emulated launches: {dict(launches)}")
