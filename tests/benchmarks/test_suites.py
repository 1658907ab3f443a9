"""The planned cases, and one of every kind measured on the CPU."""

import math

import pytest
from bench_toys import make_row

from opensora_fast.benchmarks.predictions import predict
from opensora_fast.benchmarks.runner import run_cases
from opensora_fast.benchmarks.session import Session
from opensora_fast.benchmarks.shapes import VIDEO_SIZES
from opensora_fast.benchmarks.suites import NAMES, list_cases


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", NAMES)
def test_every_row_is_planned_once(suite, device):
    cases = list_cases(suite, device)
    assert len({case.identity for case in cases}) == len(cases)
    assert [case.value for case in cases] == sorted((case.value for case in cases), reverse=True)
    if suite != "first":  # it repeats cases of other suites with fewer providers
        keys = [key for case in cases for key in case.planned_rows()]
        assert len(keys) == len(set(keys))


def test_the_ceilings_come_first_and_then_the_five_resolutions():
    names = [case.name for case in list_cases("all", "cuda")]
    assert names[0].startswith("copy") and names[1].startswith("gemm square")
    steps = [name for name in names if name.startswith("step")][:5]
    assert {name.split()[1] for name in steps} == {f"{resolution}×16" for resolution in VIDEO_SIZES}
    assert steps[0] == "step 240p×16"


@pytest.mark.parametrize("level", ["op", "block", "step"])
def test_the_peers_stand_beside_ours_at_all_five_resolutions(level):
    cases = [case for case in list_cases("all", "cuda") if case.template.level == level]
    for resolution in VIDEO_SIZES:
        own = [case for case in cases if case.template.workload == f"{resolution}×16"]
        providers = {provider for case in own for provider in case.providers}
        wanted = {"ours", "eager", "upstream", "compile"}
        wanted |= (
            {"sdpa-flash", "sdpa-cudnn", "flex"} if level == "op" else {"eager-flash", "eager-cudnn", "upstream-flash"}
        )
        assert wanted <= providers


def test_the_shipped_buckets_are_there():
    cases = {(case.template.workload, case.template.shape.split()[0]) for case in list_cases("step", "cuda")}
    assert {("144p×16", "B=6"), ("240p×128", "B=2"), ("720p×16", "B=3"), ("1024×1", "B=40")} <= cases


def test_matrix_products_have_the_exact_shapes_both_ways():
    products = [case for case in list_cases("kernels", "cuda") if case.template.level == "gemm"]
    shapes = {(case.template.op, case.template.shape.partition(" ")[2]) for case in products}
    exact = {"qkv": "K=1152 O=3456", "proj": "K=1152 O=1152", "fc1": "K=1152 O=4608", "fc2": "K=4608 O=1152"}
    assert set(exact.items()) <= shapes
    linear = [case for case in products if case.template.op != "square"]
    assert all(len(case.directions) == 3 for case in linear)
    assert {case.template.tokens for case in linear} == {9216, 16384, 32768, 65536}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everything", "cpu"), "suite 'everything' is unknown; choose one of all, first"),
        (("all", "tpu"), "device 'tpu'"),
        (("kernels", "cpu", ["flash-attn-9"]), "provider 'flash-attn-9' is unknown in this suite; known: "),
        (("kernels", "cpu", None, ["spatial", "999p"]), "no case of suite kernels on cpu has the words spatial, 999p"),
    ],
)
def test_unknown_names_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        list_cases(*arguments)


def test_cases_and_providers_can_be_chosen():
    cases = list_cases("kernels", "cuda", ["eager", "ours"], ["spatial", "240p"])
    assert [case.template.level for case in cases[:2]] == ["copy", "gemm"]  # what the shares are relative to
    assert len(cases) > 2
    norms = list_cases("kernels", "cuda", None, ["modulated_norm", "240p"])[2:]
    assert {case.template.op for case in norms} == {"modulated_norm"}  # and not gate_residual_modulated_norm
    for case in cases[2:]:
        assert "spatial" in case.name and case.providers == ("eager", "ours")


def one_of_each_kind():
    """The last, smallest case of every kind."""
    kinds = {}
    for case in list_cases("all", "cpu"):
        template = case.template
        kinds[template.level, template.op, "given" in template.workload, template.workload == "mixed"] = case
    return list(kinds.values())


@pytest.mark.parametrize("case", one_of_each_kind(), ids=lambda case: case.name)
def test_every_kind_of_case_runs_on_the_cpu(case):
    session = Session("cpu", seconds_factor=0.01)
    report = run_cases([case], session)
    assert not report.refused
    assert {row.key for row in report.rows} == set(case.planned_rows())
    assert not [row.reason for row in report.rows if row.status == "failed"]
    measured = [row for row in report.rows if row.status == "ok"]
    assert measured
    for row in measured:
        assert row.p50_ms > 0 and row.error <= row.error_limit
        assert math.isnan(row.roofline_share)  # nobody measured the bandwidth in this session
    unavailable = {row.provider: row.reason for row in report.rows if row.status == "unavailable"}
    assert unavailable.get("ours", "needs a CUDA GPU") == "needs a CUDA GPU"


def test_predictions_are_for_one_gpu_and_never_rows():
    step = make_row(level="step", op="", direction="training")
    assert predict(step) == "115–135 k tokens/s"
    assert predict(make_row(level="step", op="", direction="training", device_name="nvidia-b200")) == ""
    assert predict(make_row(op="spatial_attention", shape="B=5 T=16 S=405 H=16 D=72")) == "260–360 TFLOP/s"
    assert predict(make_row(op="modulated_norm")) == "85–92 % of copy"
    assert predict(make_row(op="modulated_norm", provider="eager")) == ""
    # 3.5 units of work, 1 at 260 and 2.5 at 200.
    both = make_row(op="spatial_attention", direction="forward+backward", shape="B=5 T=16 S=405 H=16 D=72")
    assert predict(both).startswith("214–")
