"""The planned cases, and one of every kind measured on the CPU."""

import gc
import math
import weakref
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from bench_toys import make_row

from opensora_fast import STDiT2Config
from opensora_fast.benchmarks.measuring.provider import Provider
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.predictions import predict
from opensora_fast.benchmarks.providers.attention_work import KINDS
from opensora_fast.benchmarks.providers.models import BoundModel, model_provider
from opensora_fast.benchmarks.providers.variants import VARIANT_OF
from opensora_fast.benchmarks.rows import read_folder
from opensora_fast.benchmarks.running.runner import run_cases
from opensora_fast.benchmarks.shapes import VIDEO_SIZES, Pack, Workload
from opensora_fast.benchmarks.suites import NAMES, encoders, list_cases, models
from opensora_fast.benchmarks.suites.attention_lengths import DEFAULT_LENGTHS
from opensora_fast.benchmarks.suites.estimates import STARTUP_S, mean_frame_tokens, step_seconds, with_estimate
from opensora_fast.benchmarks.suites.scale import STORED_BYTES, scale_of
from opensora_fast.costs.hardware import DATASHEETS
from opensora_fast.costs.memory import MemoryModel, ModelSize, usable_memory
from opensora_fast.costs.operations import VideoBatch


@pytest.fixture(autouse=True)
def a_plan_for_an_h200(monkeypatch):
    """Whatever GPU this machine may have."""
    monkeypatch.setattr("opensora_fast.benchmarks.suites.scale._own_gpu", lambda: None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", NAMES)
def test_every_row_is_planned_once(suite, device):
    cases = list_cases(suite, device)
    assert len({case.identity for case in cases}) == len(cases)
    assert [case.value for case in cases] == sorted((case.value for case in cases), reverse=True)
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


CUBLAS = {"cublas", "cublas-split", "cublas-transposed"}
# What two runs of nine minutes are to measure: level, op, workload begins so, providers.
PUSHED = [
    ("copy", "", "", {"torch-cuda"}),
    ("launch", "", "", {"ours-op", "cuda-graph"}),
    *(("gemm", op, "32768", CUBLAS | {"quack"}) for op in ("qkv", "proj", "fc1", "fc2")),
    ("op", "mlp", "240p×16", {"compile", "quack", "ours"}),
    ("op", "vae_encode", "240p×4", {"eager", "eager-channels-last", "compile"}),
    ("op", "adamw", "767.5 M parameters", {"upstream", "torch-fused", "compile-flat", "ours"}),
    *(("op", op, "240p×16", {"compile", "ours"}) for op in ("modulated_norm", "gate_residual_modulated_norm")),
    ("op", "spatial_attention", "240p×16", {"compile", "sdpa-cudnn", "sdpa-flash", "flash-attn-4-padded", "ours"}),
    ("op", "spatial_attention", "240p×16 wide", {"sdpa-cudnn", "ours"}),
    ("op", "spatial_attention", "480p×16", {"ours"}),  # with a head of 128
    *(("op", "spatial_attention", f"length {length}", {"sdpa-cudnn", "ours"}) for length in (144, 920, 1590, 3600)),
    ("op", "temporal_attention", "240p×16", {"ours"}),
    ("block", "", "240p×16", {"upstream", "eager", "eager-cudnn", "compile", "ours"}),
    *(("step", "", f"{name}×16", {"upstream-flash", "ours"}) for name in VIDEO_SIZES),
    *(("step", "", f"{name}×16", {"compile"}) for name in VIDEO_SIZES),
    ("step", "", "240p×16", {"upstream-flash-stored", "compile", "compile-one-order", "ours-quack"}),
    ("step", "", "480p×16", {"compile", "compile-one-order"}),
    ("step", "", "240p×16", {"upstream"}),
    *(("step", "", name, {"eager", "compile", "ours", "ours-graph"}) for name in ("144p×16", "240p×16")),
    ("step", "sustained", "240p×16", {"ours"}),
]


def recomputing_or_not(names) -> set[str]:
    return {name.partition("-recompute")[0] for name in names}


@pytest.mark.parametrize("gpu", ["H200", "H100"])
@pytest.mark.parametrize(("level", "op", "workload", "providers"), PUSHED)
def test_two_runs_of_nine_minutes_measure_what_carries_the_plan(level, op, workload, providers, gpu):
    cases = planned(gpu)
    ends, total = {}, STARTUP_S
    for case in cases:
        total += case.seconds
        ends[case.identity] = total
        assert case.seconds > 0
    found = [
        case
        for case in cases
        if (case.template.level, case.template.op) == (level, op)
        and case.template.workload.startswith(workload)
        and providers <= recomputing_or_not(case.providers)
    ]
    assert found and min(ends[case.identity] for case in found) < 1080 - STARTUP_S


@lru_cache
def planned(gpu: str):
    return list_cases("push", "cuda", gpu=DATASHEETS[gpu])


@pytest.mark.parametrize("gpu", ["H200", "H100"])
def test_the_first_run_of_nine_minutes_has_the_five_resolutions_and_the_second_begins_with_small_steps(gpu):
    first, total = [], STARTUP_S
    for case in planned(gpu):
        total += case.seconds
        first += [case] if total < 540 else []
    assert [case.template.level for case in first[:3]] == ["copy", "gemm", "launch"]  # what the shares are of
    steps = first[3:]
    assert [case.template.workload for case in steps] == ["240p×16", "720p×16", "144p×16", "480p×16", "360p×16"]
    assert all({"upstream-flash", "compile", "ours"} <= recomputing_or_not(case.providers) for case in steps)
    small = planned(gpu)[len(first) : len(first) + 2]
    assert [(case.template.workload, "ours-graph" in case.providers) for case in small] == [
        ("144p×16", True),
        ("240p×16", True),
    ]


def test_open_sora_stores_activations_as_in_its_stage_1_where_they_fit():
    def steps_with_stored(gpu: str) -> list[str]:
        steps = [case for case in planned(gpu) if case.template.level == "step"]
        return [case.template.shape.partition(" L=")[0] for case in steps if "upstream-flash-stored" in case.providers]

    small = ["B=6 T=16 S=144", "B=2 T=16 S=405", "B=48 T=1 S=144"]
    assert steps_with_stored("H200") == ["B=5 T=16 S=405", "B=14 T=16 S=144", *small]
    assert steps_with_stored("H100") == ["B=3 T=16 S=405", "B=48 T=1 S=144"]


@pytest.mark.parametrize("folder", [".", "ebc1d03"])
def test_no_step_is_estimated_shorter_than_it_was(folder):
    rows = read_folder(Path(__file__).parents[3] / "benchmarks/results/nvidia-h200" / folder)
    steps = [row for row in rows if (row.level, row.op, row.status) == ("step", "", "ok")]
    assert steps
    for row in steps:
        estimate = step_seconds(row.provider, row.tokens, mean_frame_tokens(row.shape), DATASHEETS["H200"])
        assert 0.8 * estimate < row.p50_ms / 1e3 < 1.07 * estimate, (row.name, estimate)


def test_the_frames_of_a_mixed_pack_count_by_their_tokens():
    assert mean_frame_tokens("B=5 T=16 S=405 L=120 C=1152 layers=28") == 405
    assert mean_frame_tokens("B=4 T=16 S=144 + B=1 T=1 S=4096 L=120") == (9216 * 144 + 4096 * 4096) / (9216 + 4096)


def test_the_small_steps_of_stage_1_and_of_samplers_are_timed_beside_their_graphs():
    replayed = [case for case in planned("H200") if "ours-graph" in case.providers]
    sizes = [(case.template.level, case.template.workload, case.template.shape.split()[0]) for case in replayed]
    steps, samples = (
        [("144p×16", "B=6"), ("240p×16", "B=2"), ("144p×1", "B=48")],
        [("256×1", "B=1"), ("144p×16", "B=1")],
    )
    assert sizes == [("step", *size) for size in steps] + [("sampling", *size) for size in samples]
    both = ("eager", "compile", "ours", "ours-graph", "compile-graph")
    for case in replayed:
        assert case.providers == (both if case.template.level == "sampling" else ("upstream-flash-stored", *both))


def test_attention_has_a_compiler_beside_the_libraries_and_every_length_once():
    cases = [case for case in planned("H200") if case.template.op.endswith("_attention")]
    compiled = [case.name for case in cases if "compile" in case.providers]
    assert compiled == [f"op {kind}_attention 240p×16" for kind in ("spatial", "temporal", "cross")]
    lengths = [case.name for case in cases if "length" in case.name]
    assert len(set(lengths)) == len(lengths) == sum(len(DEFAULT_LENGTHS[kind, "cuda"]) for kind in KINDS)


def test_other_matrix_products_are_measured_where_they_weigh_most():
    cases = [case for case in list_cases("push", "cuda") if "ours-quack" in case.providers]
    assert [(case.template.level, case.template.workload) for case in cases] == [
        ("step", "240p×16"),
        ("op", "240p×16"),
        ("block", "240p×16"),
        *(("step", f"{name}×16") for name in ("720p", "144p")),
        ("gemm", "32768 tokens, sustained"),
        ("step", "240p×16"),
    ]
    assert all("ours" in case.providers for case in cases[:3])


def test_what_power_decides_is_measured_without_a_pause_by_each_alone():
    cases = list_cases("push", "cuda", words=["sustained"])[:-2]  # the ceilings come with every choice
    assert all(len(case.providers) == 1 for case in cases)
    found = {(case.template.level, case.template.workload, *case.providers) for case in cases}
    products = {("gemm", "32768 tokens, sustained", name) for name in ("cublas", "ours", "quack", "ours-quack")}
    steps = {("step", f"{name}×16", "ours") for name in VIDEO_SIZES}
    assert found == products | steps | {("step", "240p×16", name) for name in ("ours-quack", "ours-quack-graph")}
    assert sum(case.seconds for case in cases) + STARTUP_S < 540


def test_the_second_step_whose_memory_is_a_graphs_is_in_the_call_that_is_measured(monkeypatch):
    taken = []
    monkeypatch.setattr(models, "training_call", lambda bound, work: lambda: taken.append(None))
    call, counts = models._many_steps(None, None), []
    for _ in range(3):  # the first one, that of the memory, and a sample
        call()
        counts.append(len(taken))
    assert counts == [1, 1 + models.SUSTAINED_STEPS, 1 + 2 * models.SUSTAINED_STEPS]


def test_sizes_of_the_comparison_with_float64():
    scale = scale_of("cuda")
    pack = Pack.of(Workload("240p", 16, 5))
    assert scale.check_pack(pack) is pack  # 1.7 GB of scores
    long = scale.check_pack(Pack.of(Workload("720p", 16, 1)))
    assert long.tokens == 2 * 3600
    small = scale_of("cpu")
    assert small.check_pack(pack).tokens < pack.tokens


def counted(tokens: int, stored: float) -> float:
    """Bytes of a step of ours that stores these shares of its activations, by the count that trains go by."""
    size = ModelSize(767_500_000, 767_500_000, 27_000_000)
    videos = VideoBatch(1, 16, tokens // 16)
    return MemoryModel(STDiT2Config.xl_2(), size, 120).peak(videos, round(28 * (1 - stored)))


def test_steps_have_as_many_videos_as_fit_with_what_compile_stores():
    for name, batches in {"H200": [14, 5, 2, 1, 1], "H100": [11, 3, 1, 1, 1], "A100": [11, 3, 1, 1, 1]}.items():
        scale = scale_of("cuda", DATASHEETS[name])
        assert [workload.batch for workload in scale.steps] == batches
        # Ops and blocks, which need little memory, are the same on all.
        assert scale.headline == scale_of("cuda", DATASHEETS["H200"]).headline
    small = scale_of("cuda", replace(DATASHEETS["H100"], memory=24 * 2**30))
    assert all(workload.batch == 1 for workload in small.steps)


@pytest.mark.parametrize("gpu", ["H200", "H100", "B200"])
@pytest.mark.parametrize("suite", ["push", "step"])
def test_each_resolution_has_its_peers_in_one_step_that_fits_the_gpu(suite, gpu):
    scale = scale_of("cuda", DATASHEETS[gpu])
    cases = list_cases(suite, "cuda", gpu=DATASHEETS[gpu])
    steps = [case for case in cases if case.template.level == "step" and not case.template.op]
    for workload in scale.steps:
        own = [
            case for case in steps if (case.template.tokens, case.template.workload) == (workload.tokens, workload.name)
        ]
        fitting = {scale.least_recomputing(name, workload.tokens) for name in ("compile", "ours")}
        assert any({"upstream-flash", *fitting} <= set(case.providers) for case in own)
    # The techniques stand on top of each other where all of them fit.
    (waterfall,) = [case for case in steps if "ours-norms" in case.providers]
    assert waterfall.template.workload == "240p×16" and waterfall.template.tokens <= scale.most_tokens("eager")
    same = [case for case in steps if case.template.shape == waterfall.template.shape]
    assert {*models.WATERFALL, "compile"} <= {name for case in same for name in case.providers}


@pytest.mark.parametrize(
    ("gpu", "compiled", "ours"),
    [
        ("H200", "compile-recompute-quarter", "ours"),
        ("H100", "compile-recompute-three-quarters", "ours-recompute-half"),
    ],
)
def test_a_video_whose_activations_do_not_fit_recomputes_as_few_blocks_as_it_must(gpu, compiled, ours):
    scale = scale_of("cuda", DATASHEETS[gpu])
    tokens = Workload("720p", 16).tokens
    assert (scale.least_recomputing("compile", tokens), scale.least_recomputing("ours", tokens)) == (compiled, ours)
    shares = {"ours": 1.0, "ours-recompute-half": 0.5}
    assert counted(tokens, shares[ours]) < usable_memory(scale.gpu.memory)
    for name in ("eager", "compile", "ours"):
        assert scale.least_recomputing(name, 144) == name
    assert scale.least_recomputing("ours", 10**7) == "ours-recompute"


@pytest.mark.parametrize("gpu", ["H200", "H100"])
def test_no_provider_of_a_planned_step_needs_more_memory_than_there_is(gpu):
    scale, seen = scale_of("cuda", DATASHEETS[gpu]), set()
    for case in planned(gpu):
        for provider in case.providers if case.template.level == "step" else ():
            kind = provider.partition("-")[0]
            if kind in STORED_BYTES:
                share = VARIANT_OF[provider].recompute
                blocks = round(28 * (1 - share)) + (share > 0)
                assert case.template.tokens * blocks * STORED_BYTES[kind] < scale.step_memory, (case.name, provider)
                seen.add(provider)
    assert {"eager", "compile", "ours", "ours-graph", "ours-quack", *models.WATERFALL[3:]} <= seen


def test_what_stays_in_the_memory_beside_a_step_is_counted():
    """Graphs hold what they work in while the others take their turns, and encoders their weights."""
    for case in planned("H100"):
        name = case.template.level, case.template.workload
        if "ours-graph" in case.providers and name in (("step", "144p×16"), ("step", "240p×16")):
            assert case.providers == ("upstream-flash", "eager-recompute", "compile", "ours", "ours-graph")
    (encoded,) = [case for case in planned("H100") if case.template.op == "with encoders"]
    assert encoded.template.tokens == 19440 and "eager-recompute" in encoded.providers


def test_a_longer_case_of_more_providers_is_estimated_longer():
    def seconds(resolution: str, *providers: str) -> float:
        scale = scale_of("cuda")
        return with_estimate(models.step_case(scale, Workload(resolution, 16), providers, 0.0), scale).seconds

    assert 0 < seconds("144p", "ours") < seconds("720p", "ours") < seconds("720p", "ours", "upstream")
    assert seconds("144p", "compile") > seconds("144p", "eager") + 10


def test_the_shipped_buckets_are_there():
    cases = {(case.template.workload, case.template.shape.split()[0]) for case in list_cases("step", "cuda")}
    assert {("144p×16", "B=6"), ("240p×128", "B=2"), ("720p×16", "B=3"), ("1024×1", "B=40")} <= cases


def test_matrix_products_have_the_exact_shapes_both_ways():
    products = [case for case in list_cases("kernels", "cuda") if case.template.level == "gemm"]
    shapes = {(case.template.op, case.template.shape.partition(" ")[2]) for case in products}
    exact = {"qkv": "K=1152 O=3456", "proj": "K=1152 O=1152", "fc1": "K=1152 O=4608", "fc2": "K=4608 O=1152"}
    assert set(exact.items()) <= shapes
    linear = [case for case in products if case.template.op not in ("square", "block")]
    assert all(len(case.directions) == 3 for case in linear)
    assert {case.template.tokens for case in linear} == {9216, 16384, 32768, 65536}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("everything", "cpu"), "suite 'everything' is unknown; choose one of all, push"),
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


def test_a_step_whose_gradients_are_wrong_on_the_timed_inputs_only_gets_no_time(monkeypatch):
    eager = model_provider(VARIANT_OF["eager"])

    def wrong_when_long(work):
        bound = eager.prepare(work)

        def model(latents, *arguments, **conditions):
            output = bound.model(latents, *arguments, **conditions)
            return output if latents.shape[2] < 4 else 2 * output - output.detach()

        return BoundModel(model, work)

    providers = (eager, replace(eager, name="wrong-when-long", prepare=wrong_when_long))
    monkeypatch.setattr(models, "MODEL_PROVIDERS", providers)
    case = models.step_case(scale_of("cpu"), Workload("144p", 4), tuple(provider.name for provider in providers), 0.0)
    rows, refused = case.measure(Session("cpu", seconds_factor=0.01), case.providers)
    assert {(row.provider, row.status) for row in rows} == {("eager", "ok")}
    assert [(item.row.provider, item.result) for item in refused] == [
        ("wrong-when-long", "gradient of the parameters of the timed inputs")
    ]


def test_encoders_leave_the_memory_before_other_steps_are_measured(monkeypatch):
    """T5 takes 9.5 GB, which would be in the peaks of all steps behind it, and may be what they lack."""
    built, build = [], encoders.build_encoders

    def build_watched(scale):
        found = build(scale)
        built.append(weakref.ref(found.text))
        return found

    monkeypatch.setattr(encoders, "build_encoders", build_watched)
    session = Session("cpu", seconds_factor=0.01)
    case = encoders.step_case(scale_of("cpu"), Workload("144p", 1))
    report = run_cases([replace(case, providers=("eager",))], session)
    assert {row.status for row in report.rows} == {"ok"}
    gc.collect()
    assert [reference() for reference in built] == [None]


@pytest.mark.parametrize("frame", [1, 3])
def test_every_frame_of_an_encoder_is_checked(monkeypatch, frame):
    eager = encoders.VAE_PROVIDERS[0]

    def lose_a_frame(work):
        encode = eager.prepare(work)
        kept = torch.ones(encoders.MICRO_BATCH, 1, 1, 1)
        kept[frame] = 0
        return lambda: encode() * kept

    monkeypatch.setattr(encoders, "VAE_PROVIDERS", (Provider("loses", lose_a_frame),))
    case = encoders.vae_case(scale_of("cpu"), Workload("144p", 1))
    rows, refused = case.measure(Session("cpu", seconds_factor=0.01), case.providers)
    assert not rows and [item.row.provider for item in refused] == ["loses"]


def test_predictions_are_for_known_gpus_and_never_rows():
    step = make_row(level="step", op="", direction="training")
    assert predict(step) == "115–135 k tokens/s"
    assert predict(make_row(level="step", op="", direction="training", device_name="nvidia-b200")) == ""
    assert predict(replace(step, tokens=12960)) == ""  # it waits for the host
    # Shares of the bandwidth are the same on a GPU with the same multiprocessors; tokens/s are not.
    assert predict(make_row(op="modulated_norm", device_name="nvidia-h100-80gb-hbm3")) == "85–92 % of copy"
    projected = predict(make_row(level="step", op="", direction="training", device_name="nvidia-h100-80gb-hbm3"))
    assert projected.endswith(" k tokens/s") and projected != predict(step)
    assert predict(make_row(op="spatial_attention", shape="B=5 T=16 S=405 H=16 D=72")) == "260–360 TFLOP/s"
    assert predict(make_row(op="modulated_norm")) == "85–92 % of copy"
    assert predict(make_row(op="modulated_norm", provider="eager")) == ""
    assert predict(make_row(op="adamw", direction="update")) == "77–83 % of copy"
    # 3.5 units of work, 1 at 260 and 2.5 at 200.
    both = make_row(op="spatial_attention", direction="forward+backward", shape="B=5 T=16 S=405 H=16 D=72")
    assert predict(both).startswith("214–")
