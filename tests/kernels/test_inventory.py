"""`opensora-fast kernels list` and the errors of its neighbors."""

import json

import pytest
import torch

from opensora_fast import kernels
from opensora_fast.cli import run
from opensora_fast.kernels.inventory import OPS, list_ops


def test_every_op_of_the_package_is_listed_with_what_it_replaces() -> None:
    described = {op.name: op for op in list_ops()}
    public = {name for name in kernels.__all__ if hasattr(torch.ops.opensora_fast, name)}
    assert public <= set(OPS) == set(described)
    for op in described.values():
        assert op.replaces, f"{op.name}: no 'Replaces in …:' in its docstring"
        assert op.limits, f"{op.name}: no 'Limits:' in its docstring"


def test_status_and_dtypes_follow_the_registration() -> None:
    described = {op.name: op for op in list_ops()}
    assert described["modulated_norm"].status == "Triton, forward and backward"
    assert described["modulated_norm"].dtypes == "float32, float16, bfloat16"
    assert described["patchify"].status == "plain PyTorch" and "float64" in described["patchify"].dtypes


def test_the_list_is_printed_for_people_and_programs(capsys) -> None:
    assert run(["kernels", "list"]) == 0
    assert "gelu_tanh: Triton, forward and backward\n    replaces:" in capsys.readouterr().out
    assert run(["kernels", "list", "--json"]) == 0
    assert [op["name"] for op in json.loads(capsys.readouterr().out)] == list(OPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "--arch", "sm_70"], "--arch sm_70: unknown; choose among sm_80, sm_90, sm_100"),
        (["compile", "--arch", "sm_90", "--write-budget"], "--write-budget: the budget is of all architectures"),
        (["autotune", "--op", "softmax"], "--op softmax: nothing to tune"),
        pytest.param(
            ["autotune"],
            "autotune measures on a CUDA GPU, and torch sees none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_exit_with_1_and_one_message(arguments, message, capsys) -> None:
    assert run(["kernels", *arguments]) == 1
    assert message in capsys.readouterr().err
