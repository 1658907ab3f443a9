"""The tests that need a GPU, without one: bfloat16, on an emulator of the PTX that is built for sm_90.

The emulator is `ptx_emulator`; it takes a process of its own, for in this one Triton interprets the kernels.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
FILES = (
    "test_adamw.py",
    "test_bias_gradient.py",
    "test_cross_attention.py",
    "test_gelu_tanh.py",
    "test_qk_norm_rotary.py",
    "test_residual_norm.py",
    "test_spatial_attention.py",
    "test_temporal_attention.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them itself")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_bfloat16_on_the_emulator(file) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "ptx_emulator.plugin", "-p", "no:xdist", "-q", "-m", "gpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    process = subprocess.run([*command, str(FOLDER / file)], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    # No test is skipped, and what ran is what was built.
    summary = r"^\d+ passed, \d+ deselected(, \d+ warnings?)? in "
    assert re.search(summary, process.stdout, flags=re.MULTILINE), process.stdout[-2000:]
    assert re.search(r"^emulated launches: \{'.+': \d+.*\}$", process.stdout, flags=re.MULTILINE)


def test_no_file_with_tests_in_bfloat16_is_left_out() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--collect-only", "-q", "-m", "gpu and not slow"]
    process = subprocess.run([*command, "-k", "bfloat16", str(FOLDER)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert sorted(set(re.findall(r"(test_\w+\.py)::", process.stdout))) == list(FILES)
