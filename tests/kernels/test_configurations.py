"""Choosing a configuration: default, by architecture, measured, forced."""

import json

import pytest
import torch

from opensora_fast.kernels import autotune, configurations
from opensora_fast.kernels.compilation import modules_with
from opensora_fast.kernels.configurations import Configuration, candidates_of, select

SMALL, LARGE = Configuration(BLOCK=16, tile=4, num_warps=2), Configuration(BLOCK=64, tile=4, num_warps=8, num_stages=3)
TABLE = {"kernel": {"any": (SMALL, LARGE), "any@sm_80": (LARGE,)}}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called "NVIDIA Test 1" of sm_90, and an empty folder of measured files."""
    monkeypatch.setattr(configurations, "MEASURED_FOLDER", tmp_path)
    monkeypatch.setattr(configurations, "_describe_gpu", lambda device: ("sm_90", "NVIDIA Test 1"))
    configurations.read_measured.cache_clear()
    yield tmp_path / "nvidia_test_1.json"
    configurations.read_measured.cache_clear()


def test_capitals_reach_the_kernel_and_small_letters_only_the_launcher() -> None:
    assert SMALL.launch == {"BLOCK": 16, "num_warps": 2, "num_stages": 2}
    assert SMALL.choices == {"BLOCK": 16, "tile": 4, "num_warps": 2, "num_stages": 2} and SMALL["tile"] == 4
    assert SMALL == Configuration(BLOCK=16, tile=4, num_warps=2) != LARGE


def test_a_limit_of_registers_is_an_option_of_the_build() -> None:
    limited = Configuration(BLOCK=16, num_warps=2, maxnreg=128)
    assert limited.options == {"maxnreg": 128, "num_warps": 2, "num_stages": 2}
    assert limited.launch == limited.choices == {"BLOCK": 16, **limited.options}
    assert limited != Configuration(BLOCK=16, num_warps=2)


def test_the_first_candidate_is_the_default(gpu) -> None:
    assert select(TABLE, "kernel", "any", CPU) == SMALL == select(TABLE, "kernel", "any", CUDA)


def test_an_architecture_may_have_its_own() -> None:
    assert candidates_of(TABLE, "kernel", "any", "sm_80") == (LARGE,)
    assert candidates_of(TABLE, "kernel", "any", "sm_90") == (SMALL, LARGE)


def test_a_measured_configuration_comes_first(gpu) -> None:
    row = {"kernel": "kernel", "shape_class": "any", "configuration": LARGE.choices}
    gpu.write_text(json.dumps({"rows": [row]}))
    assert select(TABLE, "kernel", "any", CUDA) == LARGE
    assert select(TABLE, "kernel", "any", CPU) == SMALL


def test_what_was_measured_on_a_gpu_alike_comes_before_the_default(gpu, monkeypatch) -> None:
    monkeypatch.setattr(configurations, "MEASURED_ALIKE", {"sm_90": "NVIDIA Test 2"})
    row = {"kernel": "kernel", "shape_class": "any", "configuration": LARGE.choices}
    gpu.with_name("nvidia_test_2.json").write_text(json.dumps({"rows": [row]}))
    assert select(TABLE, "kernel", "any", CUDA) == LARGE
    gpu.write_text(json.dumps({"rows": [row | {"configuration": SMALL.choices}]}))
    configurations.read_measured.cache_clear()
    assert select(TABLE, "kernel", "any", CUDA) == SMALL


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB"])
def test_hoppers_that_nobody_measured_take_what_the_h200_was_fastest_with(name, monkeypatch) -> None:
    def choices(gpu: tuple[str, str]) -> dict[tuple[str, str], Configuration]:
        monkeypatch.setattr(configurations, "_describe_gpu", lambda device: gpu)
        return {place: select(table, *place, CUDA) for table, place in places}

    tables = [module.CONFIGURATIONS for module in modules_with("CONFIGURATIONS")]
    measured = configurations.read_measured("NVIDIA H200")
    places = [(table, place) for table in tables for place in measured if place[0] in table]
    assert len(places) == len(measured) > 10
    found = choices(("sm_90", name))
    assert found == choices(("sm_90", "NVIDIA H200")) != choices(("sm_100", "NVIDIA B200"))


def test_a_measured_configuration_that_is_no_candidate_is_named(gpu) -> None:
    row = {"kernel": "kernel", "shape_class": "any", "configuration": {"BLOCK": 7}}
    gpu.write_text(json.dumps({"rows": [row]}))
    with pytest.raises(ValueError, match="nvidia_test_1.json.*BLOCK.*not a candidate of kernel / any"):
        select(TABLE, "kernel", "any", CUDA)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '<<<<<<< ours\n{"rows": []}',
        "[]",
        '{"rows": [7]}',
        '{"rows": [{"kernel": "kernel", "shape_class": "any"}]}',
        '{"rows": [{"kernel": "kernel", "shape_class": "any", "configuration": [16]}]}',
    ],
)
def test_a_file_that_holds_no_configurations_is_named(gpu, text) -> None:
    """To whoever runs a kernel, and to a tuner, which must not write over it."""
    gpu.write_text(text)
    message = "nvidia_test_1.json: .*no measured configurations .*; delete it and run"
    with pytest.raises(ValueError, match=message):
        select(TABLE, "kernel", "any", CUDA)
    with pytest.raises(ValueError, match=message):
        autotune.write_measured([], "NVIDIA Test 1", {})
    assert gpu.read_text() == text


def test_a_tuner_replaces_what_is_no_longer_a_candidate(gpu) -> None:
    """It could not run otherwise, and it is what the error asks for."""
    rows = [{"kernel": "kernel", "shape_class": "any", "configuration": {"BLOCK": 7}, "workloads": 9}]
    gpu.write_text(json.dumps({"rows": rows}))

    def call(x):
        assert select(TABLE, "kernel", "any", CUDA) in (SMALL, LARGE)
        return 1.0 * x

    workload = autotune.Workload("op", "tiny", (torch.ones(2, requires_grad=True),), call)
    timings = autotune.measure_workload(workload, time=lambda run: 1.0)
    assert [(timing.configuration, timing.reason) for timing in timings] == [(SMALL, ""), (LARGE, "")]
    autotune.write_measured(timings, "NVIDIA Test 1", {})
    assert select(TABLE, "kernel", "any", CUDA) == SMALL


FAULTY = [
    (Configuration(ROWS=64, STEP=64, REMAINDER=32, num_stages=1), "ptxas leaves a matrix descriptor unwritten"),
    (Configuration(ROWS=64, STEP=64, REMAINDER=64, num_stages=2), "reads beyond its shared memory"),
]


@pytest.mark.parametrize(("faulty", "reason"), FAULTY)
def test_what_is_built_wrongly_is_refused_however_it_is_chosen(gpu, monkeypatch, faulty, reason) -> None:
    table = {"kernel": {"any": (SMALL, faulty), "default": (faulty,)}}
    row = {"kernel": "kernel", "shape_class": "any", "configuration": faulty.choices}
    with pytest.raises(ValueError, match=f"kernel / default: ROWS=64 .* is refused: .*{reason}"):
        select(table, "kernel", "default", CUDA)
    with configurations.force("kernel", "any", faulty), pytest.raises(ValueError, match=f"is refused: .*{reason}"):
        select(table, "kernel", "any", CUDA)
    gpu.write_text(json.dumps({"rows": [row]}))
    configurations.read_measured.cache_clear()
    with pytest.raises(ValueError, match=f"is refused: .*{reason}"):
        select(table, "kernel", "any", CUDA)
    with pytest.raises(ValueError, match=f"not a candidate of kernel / any .*{reason}.*; run"):
        select(TABLE, "kernel", "any", CUDA)
    monkeypatch.setattr(configurations, "_describe_gpu", lambda device: ("sm_80", "NVIDIA Test 1"))
    assert select(table, "kernel", "any", CUDA) == faulty  # it is known of sm_90 only


def test_a_tuner_passes_over_what_is_built_wrongly(gpu) -> None:
    faulty, reason = FAULTY[0]
    table = {"kernel": {"any": (SMALL, faulty)}}

    def call(x):
        return select(table, "kernel", "any", CUDA)["BLOCK"] * x

    workload = autotune.Workload("op", "tiny", (torch.ones(2, requires_grad=True),), call)
    good, bad = autotune.measure_workload(workload, time=lambda run: 1.0)
    assert (good.microseconds, bad.microseconds) == (1.0, None) and reason in bad.reason


def test_float32_and_few_rows_may_go_without_pipelining() -> None:
    """They are not multiplied by the instructions that take descriptors."""
    assert not Configuration(ROWS=32, STEP=32, REMAINDER=16, num_stages=1).fault
    assert not Configuration(STEP=32, num_stages=1).fault  # not of the loops with a remainder


def test_force_and_record() -> None:
    with configurations.record_selections() as recorded, configurations.force("kernel", "any", LARGE):
        assert select(TABLE, "kernel", "any", CPU) == LARGE
    assert recorded == {("kernel", "any"): (SMALL, LARGE)}
    assert select(TABLE, "kernel", "any", CPU) == SMALL


def test_a_recorder_goes_on_behind_one_within_it() -> None:
    with configurations.record_selections() as outer:
        with configurations.record_selections() as inner:
            pass
        select(TABLE, "kernel", "any", CPU)
    assert list(outer) == [("kernel", "any")] and not inner


def test_every_table_has_unlike_candidates_and_every_committed_choice_is_one() -> None:
    tables = [module.CONFIGURATIONS for module in modules_with("CONFIGURATIONS")]
    assert tables
    for table in tables:
        for kernel, classes in table.items():
            for shape_class, candidates in classes.items():
                assert candidates and len(set(candidates)) == len(candidates), f"{kernel} / {shape_class}"
                if "@sm_80" not in shape_class and "@sm_100" not in shape_class:
                    assert [candidate.fault for candidate in candidates if candidate.fault] == []
    merged = {key: value for table in tables for key, value in table.items()}
    for path in configurations.MEASURED_FOLDER.glob("*.json"):
        for row in json.loads(path.read_text())["rows"]:
            candidates = merged[row["kernel"]][row["shape_class"]]
            assert row["configuration"] in [candidate.choices for candidate in candidates], path.name


@pytest.mark.parametrize(("capability", "arch"), [
    ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((12, 0), "sm_80"), ((12, 1), "sm_80"),
    ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
])  # fmt: skip
def test_a_gpu_takes_the_tiles_of_the_matrix_units_that_it_has(capability, arch, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 2")
    configurations._describe_gpu.cache_clear()
    try:
        chosen = select(TABLE, "kernel", "any", CUDA)
    finally:
        configurations._describe_gpu.cache_clear()
    assert configurations.built_like(*capability) == arch
    assert chosen is (LARGE if arch == "sm_80" else SMALL)
