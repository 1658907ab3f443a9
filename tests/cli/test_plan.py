"""`opensora-fast plan`: what it rests on stands beside every number, and --world-size and the mix matter."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from opensora_fast.benchmarks.environment import Environment
from opensora_fast.benchmarks.rows import Row, append_rows, read_rows
from opensora_fast.cli import run
from opensora_fast.costs.hardware import DATASHEETS

LABEL = "counted, not measured"


@pytest.fixture(autouse=True)
def no_committed_rows(monkeypatch):
    """Times are counted whatever rows of GPUs the project holds by now; tests of rows bring their own."""
    monkeypatch.setattr("opensora_fast.benchmarks.report.step_rows.find_committed_rows", lambda gpu: None)


@pytest.fixture
def plan(capsys):
    """plan(*words) runs the command; returns (exit code, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["plan", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def plan_json(plan):
    def call(*words: object) -> dict:
        code, out, error = plan(*words, "--json")
        assert code == 0, error
        return json.loads(out)

    return call


def test_quack_needs_less_memory_and_says_that_times_are_not_its_own(plan, plan_json):
    words = ("stage2", "--gpu", "H100", "grad_checkpoint=0")
    for ours, quack in zip(
        plan_json(*words)["buckets"], plan_json(*words, "--linear", "quack")["buckets"], strict=True
    ):
        assert 0.8 < quack["peak"] / ours["peak"] < 0.97
        assert quack["fewest_recomputed"] <= ours["fewest_recomputed"]
    assert "times are those of cuBLAS" in plan(*words, "--linear", "quack")[1]
    assert "cuBLAS" not in plan(*words)[1]
    code, _, error = plan(*words, "--linear", "apex")
    assert code != 0 and "--linear apex: unknown; choose one of torch, quack" in error


def test_every_line_with_a_time_says_that_it_is_counted(plan):
    code, out, error = plan("stage1", "--world-size", 64, "--gpu", "H800")
    assert code == 0, error
    lines = out.splitlines()
    assert lines[0] == "stage1 on 64 × H800"
    buckets = [line for line in lines if re.match(r"\d+p?, \d+ frame", line)]
    assert len(buckets) == 11 and all(line.endswith(LABEL) for line in buckets)
    projections = [line for line in lines if "projection" in line]
    assert len(projections) == 2 and all(line.endswith(f"({LABEL})") for line in projections)
    assert "balance=False (as configured)" in projections[0] and "(as configured)" not in projections[1]
    assert any("not in them: communication between GPUs" in line for line in lines)
    assert any("assumed, as no --data-path or --mix is given" in line for line in lines)


def test_its_lines_fit_a_wide_terminal_and_say_what_is_shared(plan):
    lines = plan("stage3", "--world-size", 64, "--gpu", "H800")[1].splitlines()
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("every bucket fits"))]
    assert max(len(line) for line in table if not line.startswith("encoders")) <= 120
    assert any("optimizer and average 0.2: 1/64 of it" in line for line in lines)
    assert any("captions are taken to have all 200 tokens" in line for line in lines)


def test_processes_that_share_micro_batches_need_less_memory_and_take_fewer_of_them(plan, plan_json):
    words = ("stage3", "--world-size", 64, "--gpu", "H800")
    alone, shared = plan_json(*words), plan_json(*words, "sp_size=4")
    for one, of_four in zip(alone["buckets"], shared["buckets"], strict=True):
        assert of_four["peak"] < one["peak"] and of_four["largest_batch"] > one["largest_batch"]
        assert of_four["tokens"] == one["tokens"]
        if one["frames"] * one["batch_size"] >= 4:
            assert of_four["seconds"] < 0.6 * one["seconds"]
    # The same videos on the same GPUs: at the counted limit about the same rate.
    rates = [projection["projections"][0]["tokens_per_s"] for projection in (alone, shared)]
    assert rates[1] == pytest.approx(rates[0], rel=0.35)
    assert "each micro-batch is computed by 4 processes together (sp_size)" in plan(*words, "sp_size=4")[1]
    code, _, error = plan("stage3", "--world-size", 6, "sp_size=4")
    assert code == 1 and "sp_size=4: 6 processes do not form groups of 4" in error


def test_rates_of_bfloat16_are_not_passed_off_as_those_of_float32(plan_json, rows):
    (note,) = plan_json("stage1", "--gpu", "H200", "dtype=fp32")["notes"]
    assert "rates are those of bfloat16" in note
    assert plan_json("stage1", "--gpu", "H200")["notes"] == plan_json("stage1", "--rows", rows)["notes"] == []


def test_the_gpu_is_assumed_aloud(plan):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert "64 × H200 (assumed, as --gpu is not given)" in plan("image", "--world-size", 64)[1]


def test_this_machines_gpu_is_taken_with_the_memory_it_has(plan_json, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=40 * 2**30))
    gpu = plan_json("image", "--world-size", 64)["gpu"]
    assert (gpu["name"], gpu["memory"], gpu["note"]) == ("A100 40GB", 40 * 2**30, "this machine's")


def test_more_processes_hold_less_of_the_optimizer_each_and_wait_longer(plan_json):
    one, many = (plan_json("stage3", "--gpu", "H800", "--world-size", number) for number in (2, 256))
    assert many["memory"]["optimizer"] < one["memory"]["optimizer"] / 100
    assert many["projections"][0]["idle"] > one["projections"][0]["idle"] > 0
    assert all(plan["projections"][1]["idle"] < 0.02 for plan in (one, many))


def test_balance_raises_the_projection_and_the_configuration_chooses(plan_json):
    plan = plan_json("stage2", "--gpu", "H800", "--world-size", 64, "balance=True")
    shuffled, balanced = plan["projections"]
    assert plan["balance"] is True and (shuffled["balanced"], balanced["balanced"]) == (False, True)
    assert balanced["tokens_per_s"] > 1.5 * shuffled["tokens_per_s"]
    # Idle shares and rates tell the same: the same work in less time.
    assert shuffled["tokens_per_s"] / balanced["tokens_per_s"] == pytest.approx(
        (1 - shuffled["idle"]) / (1 - balanced["idle"]), rel=1e-3
    )


def test_one_process_never_waits(plan_json):
    plan = plan_json("stage3", "--gpu", "H200")
    assert [order["idle"] for order in plan["projections"]] == pytest.approx([0, 0])


def test_what_does_not_fit_is_named_with_its_fix(plan):
    code, out, error = plan("stage3", "--gpu", "H800", "--world-size", 64, "grad_checkpoint=False")
    assert code == 0, error
    assert re.search(
        r"warning: bucket_config\['720p'\]\[16\]: batch size 3 needs \d+\.\d GiB .*grad_checkpoint=\d+", out
    )
    fewest = int(re.search(r"every bucket fits with grad_checkpoint=(\d+) or more; grad_checkpoint is 0", out)[1])
    assert "warning" in plan("stage3", "--gpu", "H800", "--world-size", 64, f"grad_checkpoint={fewest - 1}")[1]
    assert "warning" not in plan("stage3", "--gpu", "H800", "--world-size", 64, f"grad_checkpoint={fewest}")[1]


def test_what_never_fits_is_told_apart_from_what_recomputing_makes_fit(plan, plan_json):
    words = ("stage1", "--gpu", "H800", "bucket_config={'144p': {16: (1.0, 2)}, '720p': {4000: (1.0, 1)}}")
    assert plan_json(*words)["memory"]["fewest_recomputed_blocks"] is None
    lines = plan(*words)[1].splitlines()
    assert any(
        line.startswith("no number of recomputed blocks makes every bucket fit; grad_checkpoint is") for line in lines
    )
    buckets = {line.split(",")[0]: line for line in lines if re.match(r"\d+p, \d+ frame", line)}
    assert "never fits" in buckets["720p"] and "never fits" not in buckets["144p"]


@pytest.mark.parametrize(
    ("clips", "unit", "seconds"), [(60, "seconds", 1), (60_000, "minutes", 60), (6_000_000, "hours", 3600)]
)
def test_the_time_of_an_epoch_is_told_in_a_unit_that_suits_it(plan, plan_json, tmp_path, clips, unit, seconds):
    path = tmp_path / "mix.csv"
    path.write_text(f"resolution,frames,clips\n144p,16,{clips}\n")
    words = ("stage1", "--gpu", "H200", "--mix", path)
    told = re.search(r"([\d.]+) (\w+) an epoch \(", plan(*words)[1])
    assert told[2] == unit
    assert float(told[1]) * seconds == pytest.approx(plan_json(*words)["projections"][0]["epoch_seconds"], rel=0.01)


def test_cuda_graphs_take_memory_beside_every_step_and_are_advised_where_they_fit(plan, plan_json):
    words = ("stage1", "--gpu", "H200", "--world-size", 64)
    without, with_graphs = plan_json(*words), plan_json(*words, "cuda_graph_tokens=16384")
    held = with_graphs["memory"]["graphs"]
    assert without["memory"]["graphs"] == 0 < held
    for before, after in zip(without["buckets"], with_graphs["buckets"], strict=True):
        assert after["peak"] == before["peak"] + held and after["largest_batch"] < before["largest_batch"]
    (line,) = [line for line in plan(*words, "cuda_graph_tokens=16384")[1].splitlines() if "CUDA graphs" in line]
    assert f"hold {held / 2**30:.1f} GiB beside every step" in line and len(line) <= 120
    advice = {"tokens": 16384, "small": 11, "pairs": 11, "memory": held, "fits": True, "processes": 64}
    assert without["graph_advice"] == advice and with_graphs["graph_advice"] is None
    (line,) = [line for line in plan(*words)[1].splitlines() if "CUDA graphs" in line]
    assert (
        line.startswith("cuda_graph_tokens=16384 would replay") and "11 of 11 buckets; a step is faster where" in line
    )
    assert line.endswith(f"hold {held / 2**30:.1f} GiB (counted): every bucket fits beside them")


def test_a_table_gives_the_steps_of_an_epoch(plan_json, tmp_path):
    rows = [("a.mp4", "x", 60, 144, 256, 24.0)] * 600 + [("b.mp4", "x", 60, 240, 426, 24.0)] * 400
    path = tmp_path / "clips.csv"
    pd.DataFrame(rows, columns=["path", "text", "num_frames", "height", "width", "fps"]).to_csv(path, index=False)
    words = ("stage1", "--gpu", "H200", "--world-size", 8, "--data-path", path, "allow_empty_buckets=True")
    plan = plan_json(*words)
    explained = json.loads(run_explain(path))
    assert plan["steps_per_epoch"] == explained["steps"] > 10
    assert all(order["epoch_seconds"] > 0 for order in plan["projections"])


def run_explain(path) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(["buckets", "explain", str(path), "--config", "stage1", "--world-size", "8", "--json"]) == 0
    return out.getvalue()


def test_a_mix_file(plan_json, tmp_path):
    path = tmp_path / "mix.csv"
    path.write_text("resolution,frames,share\n144p,16,1\n")
    plan = plan_json("stage1", "--gpu", "H200", "--world-size", 64, "--mix", path)
    assert plan["mix"] == f"shares of {path}" and plan["steps_per_epoch"] is None
    # One bucket only: nobody waits, and the cluster is 64 times as fast as a GPU.
    shuffled = plan["projections"][0]
    assert shuffled["idle"] == pytest.approx(0)
    (one,) = [bucket for bucket in plan["buckets"] if (bucket["resolution"], bucket["frames"]) == ("144p", 16)]
    assert shuffled["tokens_per_s"] == pytest.approx(64 * one["tokens_per_s"], rel=0.02)


# ---- fitted ----

ENVIRONMENT = Environment("nvidia-h200", "550", "2.13.0", "3.7.1", "3.11", "a" * 40, False, "2026-01-01T00:00:00Z")


def step_row(batch: int, frame_tokens: int, milliseconds: float) -> Row:
    tokens = 16 * batch * frame_tokens
    return Row(
        level="step", workload="made up", op="", direction="training", provider="ours", provider_version="",
        shape=f"B={batch} T=16 S={frame_tokens} L=120 C=1152 layers=28", tokens=tokens, dtype="bfloat16", status="ok",
        p50_ms=milliseconds, flops=tokens * (4e9 + 4e5 * frame_tokens), bytes=tokens * 2.3e6 + 3e10,
        memory_bytes=14_000_000_000 + int(2.1e6 * tokens), error=0.0, error_limit=1.0, environment=ENVIRONMENT,
    )  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    """Steps of an H200 that take 1.6 times the time of its datasheet. No run produced these numbers."""
    gpu, made = DATASHEETS["H200"], []
    for batch, frame_tokens in ((1, 144), (4, 144), (20, 144), (1, 405), (6, 405), (1, 1590), (2, 1590), (1, 3600)):
        row = step_row(batch, frame_tokens, 1.0)
        seconds = 1.6 * (row.flops / gpu.matrix_flops + row.bytes / gpu.bandwidth)
        made.append(replace(row, p50_ms=1e3 * seconds))
    folder = tmp_path / "rows"
    append_rows(folder / "step.csv", made)
    return folder


def test_times_are_fitted_to_rows_and_say_so(plan, plan_json, rows):
    words = ("stage1", "--world-size", 64, "--rows", rows)
    fitted = plan_json(*words)
    counted = plan_json("stage1", "--world-size", 64, "--gpu", "H200")
    assert fitted["gpu"]["name"] == "H200" and fitted["times"]["rows"] == 8
    assert fitted["times"]["basis"] == "fitted to 8 rows of H200, worst residual 0.0 %"
    for one, other in zip(fitted["buckets"], counted["buckets"], strict=True):
        assert one["seconds"] == pytest.approx(1.6 * other["seconds"], rel=1e-3)
    assert "8 rows measured" in fitted["memory"]["basis"]
    advised = fitted["graph_advice"]["memory"]
    assert (
        advised == plan_json(*words, "cuda_graph_tokens=16384")["memory"]["graphs"] != counted["graph_advice"]["memory"]
    )
    out = plan("stage1", "--world-size", 64, "--rows", rows)[1]
    assert f"times: {fitted['times']['basis']}\n" in out and LABEL not in out


def test_the_row_that_measured_the_most_memory_decides(plan_json, rows, tmp_path):
    *others, last = read_rows(rows / "step.csv")

    def peaks(folder, factor):
        append_rows(folder / "step.csv", [*others, replace(last, memory_bytes=int(factor * last.memory_bytes))])
        return [bucket["peak"] for bucket in plan_json("stage1", "--world-size", 64, "--rows", folder)["buckets"]]

    as_measured = peaks(tmp_path / "same", 1)
    assert all(more > peak for more, peak in zip(peaks(tmp_path / "more", 2), as_measured, strict=True))
    assert peaks(tmp_path / "less", 0.98) == as_measured


def test_rows_of_an_h100_serve_an_h800_which_is_the_same_chip(plan_json, rows, tmp_path):
    made = [
        replace(row, environment=replace(row.environment, device_name="nvidia-h100-80gb-hbm3"))
        for row in read_rows(rows / "step.csv")
    ]
    append_rows(tmp_path / "h100" / "step.csv", made)
    fitted = plan_json("stage1", "--world-size", 64, "--rows", tmp_path / "h100", "--gpu", "H800")
    assert fitted["gpu"]["name"] == "H800"
    assert fitted["times"]["basis"].startswith("fitted to 8 rows of H100, a chip of the rates of H800, worst residual")
    assert "H800" not in plan_json("stage1", "--rows", tmp_path / "h100")["times"]["basis"]


def test_rows_of_another_gpu_and_too_few_are_refused(plan, rows, tmp_path):
    code, _, error = plan("stage1", "--world-size", 64, "--rows", rows, "--gpu", "H800")
    assert code == 1 and "are of H200, --gpu is H800: give rows of H800, or --gpu H200" in error
    few = tmp_path / "few"
    append_rows(few / "step.csv", [step_row(1, 144, 50.0)])
    code, _, error = plan("stage1", "--world-size", 64, "--rows", few)
    assert code == 1 and "has 1 training step on H200 of this model (1152 channels, 28 blocks, bf16), too few" in error
    code, _, error = plan("demo", "--rows", rows)
    assert code == 1 and "has 0 training steps on H200 of this model (144 channels, 3 blocks, fp32), too few" in error


def test_committed_rows_are_used_unasked_and_too_few_are_told(plan, rows, monkeypatch, tmp_path):
    monkeypatch.setattr("opensora_fast.benchmarks.report.step_rows.find_committed_rows", lambda gpu: rows)
    assert "fitted to 8 rows of H200" in plan("stage1", "--world-size", 64, "--gpu", "H200")[1]
    few = tmp_path / "few"
    append_rows(few / "step.csv", [step_row(1, 144, 50.0)])
    monkeypatch.setattr("opensora_fast.benchmarks.report.step_rows.find_committed_rows", lambda gpu: few)
    out = plan("stage1", "--world-size", 64, "--gpu", "H200")[1]
    assert f"note: {few} has 1 training step on H200 of this model" in out and LABEL in out


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stage1", "--gpu", "H20"), "no GPU 'H20': did you mean 'H200'?"),
        (("stage1", "--mix", "a.csv", "--data-path", "b.csv"), "--data-path and --mix both say"),
        (("stage1", "--mix", "missing.csv"), "No such file or directory: missing.csv"),
        (("stage9",), "no shipped configuration of that name"),
        (("stage1", "--rows", "nowhere"), "nowhere: holds no benchmark rows"),
        (("stage1", "balanced=True"), "balanced: unknown key; did you mean 'balance'?"),
    ],
)
def test_mistakes_name_the_thing_and_the_fix(plan, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = plan(*words)
    assert code == 1 and message in error and "Traceback" not in error
    assert plan("stage1", "--world-size", 0)[0] == 2


def test_too_few_micro_batches_for_the_processes(plan, tmp_path):
    path = tmp_path / "mix.csv"
    path.write_text("resolution,frames,clips\n144p,16,60\n")
    code, _, error = plan("stage1", "--world-size", 64, "--mix", path)
    assert code == 1 and f"{path}: 10 micro-batches cannot fill one step of 64 processes with drop_last=True" in error
    code, out, error = plan("stage1", "--world-size", 64, "--mix", path, "drop_last=False")
    assert code == 0 and f"micro-batches: 10 micro-batches of {path}: 1 step an epoch\n" in out


def test_clips_that_fill_no_micro_batch_or_too_many(plan, tmp_path):
    path = tmp_path / "mix.csv"
    path.write_text("resolution,frames,clips\n144p,16,5\n")
    code, _, error = plan("stage1", "--mix", path)
    assert code == 1 and "0 micro-batches cannot fill one step" in error and "smaller batch sizes" in error
    path.write_text("resolution,frames,clips\n144p,16,1e11\n")
    code, _, error = plan("stage1", "--mix", path)
    assert code == 1 and "16666666666 micro-batches are too many to be planned one by one: give share" in error


def test_more_processes_than_micro_batches_that_are_made_up(plan_json):
    """Shares say nothing of an epoch's length, so it is no reason to refuse."""
    many = plan_json("stage1", "--gpu", "H800", "--world-size", 200_000)["projections"][0]
    few = plan_json("stage1", "--gpu", "H800", "--world-size", 512)["projections"][0]
    assert many["idle"] == pytest.approx(few["idle"], abs=0.01)
