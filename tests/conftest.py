"""Settings of the whole test run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from triton_interpreter import refuse_access_outside_arguments

# Triton reads this when it is first imported: without a GPU its kernels run on the CPU, in numpy. "auto" still means
# the reference there, so nothing but the kernel tests notices.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says something of the machine, not of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.pluginmanager.has_plugin("ptx_emulator.plugin"):
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
    from opensora_fast.benchmarks.jobs.interpreter import interpret_quickly

    with interpret_quickly(), refuse_access_outside_arguments():
        yield


@pytest.fixture
def code(tmp_path) -> Iterator[object]:
    """Something to put into a file of weights: reading it must not run what it holds, which would leave a file."""
    left = tmp_path / "executed"

    class Code:
        def __reduce__(self):
            return Path.touch, (left,)

    yield Code()
    assert not left.exists()


@pytest.fixture(scope="session")
def launcher() -> Iterator[subprocess.Popen]:
    """See `tests/train/forked_processes.py`."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "train" / "forked_processes.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_together(launcher) -> Callable[..., list[dict]]:
    """run_together(world_size, arguments, fault=None) runs `opensora-fast` with these arguments in several processes
    and returns, of each rank, `code`, `out` and `error`. A fault is dict(kind=..., rank=..., step=...). With `function`
    it calls "module:name" with them, which returns the code."""

    def run(world_size, arguments, fault=None, segment=1 << 13, seconds=120, function=None):
        job = {"world_size": world_size, "arguments": list(map(str, arguments)), "function": function}
        job |= {"segment": segment, "fault": fault, "seconds": seconds}
        launcher.stdin.write(json.dumps(job) + "\n")
        launcher.stdin.flush()
        return json.loads(launcher.stdout.readline())

    return run
