"""One home for the ops: a program started in the checkout can find the folder under another name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_in_checkout(code: str) -> subprocess.CompletedProcess:
    """With the checkout on the path, as `python -m` and `python -c` have it there."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_transformers_leaves_the_ops_registered() -> None:
    process = run_in_checkout(
        "import sys, torch\n"
        "from opensora_fast.kernels import gelu_tanh\n"
        "import contextlib, transformers.integrations.hub_kernels\n"
        "with contextlib.suppress(ModuleNotFoundError):  # before diffusers 0.35\n"
        "    import diffusers.models.attention_dispatch\n"
        "assert 'kernels' in sys.modules, 'transformers has not looked; this test shows nothing'\n"
        "assert [name for name in sys.modules if name.startswith('kernels.')] == []\n"
        "torch.ops.opensora_fast.gelu_tanh.default._op()\n"
    )
    assert (
        process.stderr.strip().splitlines()[-1].startswith("RuntimeError: opensora_fast::gelu_tanh() is missing value")
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from kernels import gelu_tanh", "kernels.gelu_tanh: `kernels` is a folder of opensora_fast's sources here"),
        ("import kernels.gelu_tanh", "kernels: import opensora_fast.kernels; an op can be registered under one name"),
    ],
)
def test_the_folder_under_its_bare_name_says_what_to_import(statement: str, message: str) -> None:
    assert message in run_in_checkout(statement).stderr.strip().splitlines()[-1]
