"""A GPU machine without network has torch, triton and little else: what is meant for it must start there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Neither the suites nor the GPU tests of the kernels may need these.
ABSENT = ("av", "bs4", "diffusers", "ftfy", "matplotlib", "nvidia.dali", "pandas", "pyarrow", "PIL", "transformers")


@pytest.fixture
def run_there():
    """Runs Python code in a process in which ABSENT cannot be imported; returns what it prints."""

    def run(code: str) -> str:
        code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); {code}"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    return run


def test_the_gpu_tests_of_the_benchmarks_page_are_collected(run_there):
    command = re.search(r'pytest -m "(.*)" ((?:tests/[\w/.]+ ?)+)', (ROOT / "benchmarks/README.md").read_text())
    chosen, paths = command[1], command[2].split()
    arguments = ["-m", chosen, "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    output = run_there(f"import pytest; sys.exit(pytest.main({arguments!r}))")
    for name in ("bfloat16", "test_losses_never_wait_for_the_gpu", "share_a_pool", "cuda_graphs_give_the_same_results"):
        assert name in output
    assert "error" not in output.splitlines()[-1]


def test_attention_is_profiled_without_a_plot(run_there, tmp_path):
    words = ["profile", "attention", "--seqlens", "16", "--providers", "eager", "--device", "cpu", "--budget", "1s"]
    output = run_there(f"from opensora_fast.cli import run; sys.exit(run({[*words, '--out', str(tmp_path)]!r}))")
    assert "plot: none, as matplotlib is not installed" in output
    assert [path.name for path in tmp_path.iterdir()] == ["attention_spatial.csv"]


def test_the_plan_of_the_first_runs_is_printed(run_there):
    words = ["bench", "--list", "--suite", "push", "--device", "cuda"]
    output = run_there(
        f"import opensora_fast.benchmarks.running.worker; from opensora_fast.cli import run; sys.exit(run({words!r}))"
    )
    assert "fits into 540 s" in output
