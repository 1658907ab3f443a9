"""What the report says of rows, and what it does not say."""

import html
import importlib.util
import math
import random
import re
from dataclasses import replace

import pytest
from bench_toys import make_row
from gpu_like_rows import gpu_like_rows

from opensora_fast.benchmarks.jobs.convergence import EAGER, PERTURBED, SEEDS, Curve, write_curve
from opensora_fast.benchmarks.measuring.accuracy import Part
from opensora_fast.benchmarks.measuring.refused import Refused
from opensora_fast.benchmarks.measuring.session import Session
from opensora_fast.benchmarks.report.page import CPU_NOTE, SECTIONS, write_report
from opensora_fast.benchmarks.report.predictions import judge_prediction
from opensora_fast.benchmarks.report.results import Results, group, published_for, rate, time_text
from opensora_fast.benchmarks.report.steps import best_step, compared_steps, speed_ups
from opensora_fast.benchmarks.report.training_lines import COMPILED
from opensora_fast.benchmarks.rows import append_rows, level_path
from opensora_fast.benchmarks.running import supervise
from opensora_fast.benchmarks.shapes import Pack
from opensora_fast.benchmarks.suites import NAMES
from opensora_fast.benchmarks.suites.scale import scale_of
from opensora_fast.cli import run
from opensora_fast.costs.hardware import DATASHEETS

STEP = {"level": "step", "op": "", "direction": "training", "shape": "B=5 T=16 S=405", "tokens": 32400}
# 4.2 TB/s and 800 TFLOP/s.
CEILINGS = (
    make_row(
        level="copy", op="", direction="copy", dtype="uint8", bytes=4.2e9, flops=0.0, p50_ms=1.0, provider="torch"
    ),
    make_row(level="gemm", op="square", flops=8e11, p50_ms=1.0, provider="cublas"),
)


def results_of(*rows):
    return Results(None, tuple(rows))


def write_rows(folder, rows):
    for row in rows:
        append_rows(level_path(folder, row.level), [row])
    return folder


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL))


def section_of(page, title):
    return html.unescape(page.read_text().split(f"<h2>{title}</h2>")[1].split("</section>")[0])


def test_sections_without_rows_say_which_command_makes_them(tmp_path):
    page = write_report(
        write_rows(tmp_path, [make_row(level="loader", op="h264", direction="decode", provider="pyav")])
    )
    assert page == tmp_path / "report.html"
    empty = [section for section in SECTIONS if section.title != "Decoding"]
    assert {section.suite for section in SECTIONS} <= set(NAMES)
    for section in empty:
        content = section_of(page, section.title)
        assert f"opensora-fast bench --suite {section.suite} --device cuda --out {tmp_path}" in content
        assert "<svg" not in content and 'class="bar' not in content
        assert section.lack in section_of(page, "At a glance")
    assert "No rows" not in section_of(page, "Decoding")
    assert "our training steps at 144p, 240p, 360p, 480p, 720p" in text_of(page)
    assert "speed of any of this project's kernels" in section_of(page, "At a glance")


def test_every_section_has_rows_when_everything_was_measured():
    results = results_of(*gpu_like_rows())
    assert [section.title for section in SECTIONS if not section.has_rows(results)] == []


def test_an_op_that_no_resolution_is_part_of_has_its_card(tmp_path):
    ops = [row for row in gpu_like_rows() if row.op in ("adamw", "gelu_tanh") and row.provider in ("eager", "ours")]
    page = write_report(write_rows(tmp_path, ops))
    cards = section_of(page, "Ops").split("Ours against the best of the others")[0]
    assert "P=767452064" in cards and cards.count("adamw") == 1
    assert "B=5 T=16 S=405" in cards and "S=1590" not in cards  # all others at one resolution


def test_a_page_of_cpu_rows_says_so_and_claims_no_speed(tmp_path):
    cpu = {"device_name": "cpu-x86_64", "driver": ""}
    rows = [make_row(**STEP, provider=name, **cpu) for name in ("upstream", "eager", "compile", "ours")]
    page = write_report(write_rows(tmp_path, rows))
    assert CPU_NOTE in text_of(page)
    glance = section_of(page, "At a glance")
    assert "tokens/s" not in glance and "<b>×" not in glance
    text = text_of(page)
    assert "H800" not in text and "projection" not in text.lower()
    assert "--device cpu" in section_of(page, "Ops")


def test_rows_of_two_devices_are_refused(tmp_path):
    append_rows(tmp_path / "op.csv", [make_row()])
    append_rows(tmp_path / "step.csv", [make_row(**STEP, device_name="cpu-x86_64")])
    with pytest.raises(ValueError, match="holds rows of cpu-x86_64, nvidia-h200; a report is about one device"):
        write_report(tmp_path)


def test_the_newest_row_counts(tmp_path):
    old, new = make_row(p50_ms=7.654), make_row(p50_ms=3.21)
    page = write_report(write_rows(tmp_path, [old, new]))
    assert "3.21" in text_of(page) and "7.654" not in text_of(page)


def test_head_and_large_figures(tmp_path):
    rows = [*CEILINGS]
    for name, milliseconds in (("upstream", 900.0), ("eager", 500.0), ("compile", 400.0), ("ours", 300.0)):
        rows.append(
            make_row(**STEP, provider=name, p50_ms=milliseconds, flops=1.36e14, bytes=7.5e10, roofline_share=0.6)
        )
    rows[-1] = replace(rows[-1], error=3e-3)
    other = replace(rows[-1], provider="xformers").without_time("unavailable", "xformers is not installed")
    page = write_report(write_rows(tmp_path, [*rows, other]))
    text, glance = text_of(page), section_of(page, "At a glance")
    assert "torch 2.11.0, triton 3.6.0, Python 3.12.3 · driver 580.1 · commit aaaaaaaaaaaa · 2026-11-22" in text
    assert "<b>108 k</b>" in glance and "<b>63%</b>" in glance  # 32400 tokens in 300 ms, 188 at the ceilings
    assert "<b>×3.00</b>" in glance and "<b>×1.33</b>" in glance and "<b>75%</b>" in glance
    assert "xformers is not installed" in text and "1 unavailable, 0 failed" in glance


@pytest.mark.parametrize("change", [{"commit": "b" * 40}, {"dirty": True}, {"torch": "2.12.0"}, {"date": "2026-12-24"}])
def test_a_page_of_rows_of_several_states_says_so(tmp_path, change):
    page = write_report(write_rows(tmp_path, [make_row(), make_row(provider="eager", **change)]))
    said = "Not all of these rows are of the same sources and versions" in section_of(page, "At a glance")
    assert said == ("date" not in change)


def test_shares_are_of_the_best_ceilings_even_where_these_were_measured_later():
    """What was measured first is held against what the page calls the limit, as all else."""
    row = make_row(level="gemm", op="qkv", provider="cublas", flops=6e11, bytes=1.0, roofline_share=0.75)
    early, best = results_of(*CEILINGS, row, make_row(level="gemm", op="fc1", flops=1e12)).latest[2:]
    assert early.roofline_share == pytest.approx(0.6) and best.roofline_share == pytest.approx(1.0)


def test_every_sampling_step_is_shown(tmp_path):
    """One video, whose graph replays, beside the two of the same resolution that more providers took part in."""
    sampling = {"level": "sampling", "op": "", "workload": "144p×16"}
    rows = [make_row(**sampling, shape="B=2 T=16 S=144", provider=name) for name in ("eager", "compile", "ours")]
    rows += [make_row(**sampling, shape="B=1 T=16 S=144", provider=name) for name in ("ours", "ours-graph")]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Sampling steps")
    assert "B=2 T=16 S=144" in content and "B=1 T=16 S=144" in content and "ours-graph" in content


def test_the_page_says_whose_rates_its_floors_are_counted_at(tmp_path):
    rows = [make_row(), make_row(workload="length 16"), make_row(workload="length 32")]
    for folder, given, source in (("a", rows, "H200's datasheet"), ("b", [*CEILINGS, *rows], "the ceilings measured")):
        page = write_report(write_rows(tmp_path / folder, given))
        assert f"the full width of a bar is the floor at {source}" in section_of(page, "Ops")
        assert f"counted operations and bytes at {source}" in section_of(page, "Attention over length")


def test_ours_beside_open_sora_alone_is_a_comparison(tmp_path):
    """As where torch.compile was wrong; a step of ours alone is none."""
    times = {"240p×16": {"upstream": 900.0, "ours": 300.0}, "480p×16": {"upstream": 800.0, "ours": 400.0}}
    times["144p×16"] = {"ours": 250.0}
    rows = [
        make_row(**{**STEP, "workload": workload}, provider=name, p50_ms=time)
        for workload, of_workload in times.items()
        for name, time in of_workload.items()
    ]
    works = compared_steps(results_of(*rows).works("step", ""))
    assert [work.first.workload for work in works] == ["240p×16", "480p×16"]
    page = write_report(write_rows(tmp_path, rows))
    glance = section_of(page, "At a glance")
    assert "on Open-Sora as shipped, training steps at 240p, 480p" in glance and "×2.00–3.00" in glance
    assert "108 k" in glance  # of the fastest of the compared, 32400 tokens in 300 ms
    steps, others = section_of(page, "Training steps").split("Other buckets and lengths")
    assert "Open-Sora on H800" in steps and "240p" not in others and "144p" in others


def test_wrong_results_are_listed(tmp_path):
    row = make_row(provider="wrong")
    parts = (Part("blocks.3.attn.weight", 0.9, 0.7, 0.01),)
    refused = [Refused(row, "gradient of qkv", 0.5, 0.1), Refused(row, "gradient of the parameters", 0.6, 0.1, parts)]
    Session("cpu", tmp_path).record([make_row()], refused)
    before = tmp_path / "refused.jsonl"  # as it was written before parts were named
    before.write_text(before.read_text().replace('"parts": [], ', ""))
    content = section_of(write_report(tmp_path), "Wrong, failed or unavailable")
    assert "gradient of qkv" in content and "5.00e-01" in content and "No result was wrong" not in content
    assert "blocks.3.attn.weight (90%; error 0.7, eager's 0.01)" in content
    assert str(refused[1]).endswith(
        "over its limit 0.1; most of it: blocks.3.attn.weight (90%; error 0.7, eager's 0.01)"
    )


@pytest.mark.parametrize(("date", "status"), [("2026-11-23", "failed"), ("2026-11-21", "ok")])
def test_a_time_of_before_it_was_found_wrong_is_none(tmp_path, date, status):
    row = make_row()
    Session("cpu", tmp_path).record([row], [Refused(make_row(date=date), "output", 0.5, 0.1)])
    (latest,) = Results.read(tmp_path).latest
    assert latest.status == status
    assert latest.reason == ("wrong, the error of its output is 0.5 of at most 0.1" if status == "failed" else "")


def test_a_line_of_refused_rows_that_was_cut_off_is_named(tmp_path):
    Session("cpu", tmp_path).record([make_row()], [Refused(make_row(provider="wrong"), "output", 0.5, 0.1)] * 2)
    path = tmp_path / "refused.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"refused\.jsonl:2: not a refused row: .*; delete this line"):
        write_report(tmp_path)


def test_the_page_says_what_the_times_of_ops_are_of(tmp_path):
    rows = [make_row(timed="graph"), make_row(provider="eager", timed="calls: RuntimeError: it waits", p50_ms=2.0)]
    content = section_of(write_report(write_rows(tmp_path / "new", rows)), "Ops")
    assert "Times are of the kernels of a call alone, replayed as a CUDA graph; those marked as calls" in content
    assert "2 ms · calls" in content and "1 ms · calls" not in content and "calls: RuntimeError: it waits" in content
    table = content.partition("Ours against the best of the others")[2]
    assert "timed otherwise" in table  # 2 ms over 1 ms would be a comparison of the host's work with the kernels'
    content = section_of(write_report(write_rows(tmp_path / "old", [replace(row, timed="") for row in rows])), "Ops")
    assert "Times are of single calls, the host's work included." in content and "· calls" not in content
    assert "timed otherwise" not in content


def test_the_waterfall_shows_each_gain_with_its_error(tmp_path):
    rows = [
        make_row(**STEP, provider="upstream", p50_ms=900.0),
        make_row(**STEP, provider="upstream-flash", p50_ms=600.0, error=2e-3),
        make_row(**STEP, provider="ours").without_time("failed", "out of memory"),
    ]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Waterfall")
    assert "×1.50 on the one before" in content and "error 2.0e-03 of at most 4.0e-03" in content
    assert "out of memory" in content and "not in these rows" in content


def test_published_figures_and_projections_are_called_so(tmp_path):
    names = ("upstream", "eager", "compile", "ours")
    rows = [make_row(**STEP, provider=name, p50_ms=300.0, flops=1.36e14, bytes=7.5e10) for name in names]
    page = write_report(write_rows(tmp_path, [*CEILINGS, *rows]))
    content = section_of(page, "Training steps")
    assert "22.5 k" in content and "published, B=16, with VAE and T5" in content
    assert "projection from this nvidia-h200, not measured" in content
    assert [round(item.tokens_per_s) for item in published_for("240p×16")] == [22500]
    assert published_for("256×16") == []  # of STDiT 1.0


def test_every_kind_of_step_is_shown(tmp_path):
    ops = ("", "with encoders", "sustained", "of tomorrow")
    rows = [make_row(**{**STEP, "op": op}, p50_ms=300.0 + 10 * index) for index, op in enumerate(ops)]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Training steps")
    assert all(title in content for title in ("With VAE and T5", "Sustained", "of tomorrow", "Other buckets"))
    assert all(f"{row.tokens_per_s / 1e3:.3g}" in content for row in rows)


def test_a_projection_slows_only_what_memory_bounds():
    row = make_row(**STEP, p50_ms=300.0, flops=1.36e14, bytes=8.4e10)
    low, high = results_of(*CEILINGS, row).project_step(row, DATASHEETS["H800"])
    # At best 20 of 300 ms are memory's, at worst all but 170 ms of matrix products.
    assert high == pytest.approx(32400 / (280 + 20 * 4.8 / 3.35) * 1e3)
    assert low == pytest.approx(32400 / (170 + 130 * 4.8 / 3.35) * 1e3)
    assert results_of(row).project_step(row, DATASHEETS["H800"]) is None
    assert results_of(*CEILINGS, row).project_step(row, DATASHEETS["H200"]) is None
    of_no_datasheet = [
        replace(item, environment=replace(item.environment, device_name="nvidia-l40s")) for item in (*CEILINGS, row)
    ]
    assert results_of(*of_no_datasheet).project_step(of_no_datasheet[-1], DATASHEETS["H800"]) is None


def test_floors_come_from_measured_ceilings_or_the_datasheet():
    step = make_row(**STEP, p50_ms=300.0, flops=1.6e14, bytes=8.4e10)
    op = make_row(flops=1.6e14, bytes=8.4e10)
    measured = results_of(*CEILINGS, step, op)
    assert measured.floor_ms(step) == pytest.approx(200 + 20)
    assert measured.floor_ms(op) == pytest.approx(200)
    assert results_of(step).floor_ms(step) == pytest.approx(1.6e17 / 989.4e12 + 8.4e13 / 4.8e12)
    unknown = replace(step, environment=replace(step.environment, device_name="some-gpu"))
    assert math.isnan(results_of(unknown).floor_ms(unknown))
    on_cpu = [replace(row, environment=replace(row.environment, device_name="cpu-x86_64")) for row in (*CEILINGS, op)]
    assert math.isnan(results_of(*on_cpu).floor_ms(on_cpu[-1]))


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (make_row(bytes=4e9, p50_ms=1.0), "goal reached"),  # 95 % of 4.2 TB/s; 85–92 predicted
        (make_row(bytes=4e9, p50_ms=1.08), "good"),
        (make_row(bytes=4e9, p50_ms=1.3), "missed"),
        (make_row(level="gemm", op="qkv", provider="cublas", flops=6.8e11, p50_ms=1.0), "as predicted"),
        (make_row(level="gemm", op="qkv", provider="cublas", flops=5e11, p50_ms=1.0), "slower than predicted"),
        (make_row(level="gemm", op="qkv", provider="cublas", flops=9e11, p50_ms=1.0), "faster than predicted"),
        (make_row(level="launch", op="", provider="ours-op", p50_ms=0.004), "goal reached"),
        (make_row(level="launch", op="", provider="ours-op", p50_ms=0.02), "missed"),
        (make_row(**STEP, provider="ours", p50_ms=300.0), "missed"),  # 108 k of 115–135 k
    ],
)
def test_predictions_are_judged(row, verdict):
    predicted, measured, found = judge_prediction(results_of(*CEILINGS, row), row)
    assert found == verdict and predicted and measured


def test_a_token_of_a_mixed_pack_stands_beside_those_of_uniform_ones(tmp_path):
    scale = scale_of("cuda")
    pack = scale.mixed_steps[0]
    packs = [(pack, 1.05), *((Pack.of(part), 1.0) for part in pack.uniform_parts(scale.tokens))]
    rows = [
        make_row(
            **{**STEP, "workload": item.name, "shape": f"{item.text} L=120", "tokens": item.tokens},
            provider="ours",
            p50_ms=item.tokens / 100_000 * 1e3 * factor,
        )
        for item, factor in packs
    ]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Training steps")
    assert "Mixed packs" in content and "×1.050" in content and "10,500 ns a token, 10,000 ns in uniform" in content
    assert "×1.03 is the goal" in content


def test_without_a_row_of_ours_there_is_no_comparison(tmp_path):
    rows = [make_row(provider="eager"), make_row().without_time("unavailable", "needs a CUDA GPU")]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Ops")
    assert "None of this project's kernels has a time here" in content and "× best other" not in content


def test_loss_curves_stand_beside_what_they_may_be(tmp_path):
    """Convergence is judged apart from the errors of single results."""
    row = make_row(level="convergence", workload="demo", op="", direction="against seeds", error=0.03, error_limit=0.1)
    for seed in SEEDS:
        for provider, shift in ((EAGER, 0.0), (PERTURBED, 1e-6), ("ours", 1e-3)):
            loss = tuple(1 / step + 0.1 * seed + shift for step in range(1, 31))
            write_curve(
                Curve(provider, seed, "x", "", loss, (1,) * 30, (1.0,) * 30), tmp_path / "convergence" / "demo-bf16"
            )
    page = write_report(write_rows(tmp_path, [make_row(error=1e-3), row]))
    content, glance = section_of(page, "Convergence"), section_of(page, "At a glance")
    assert content.count("<svg") == 2 and "30.0%" in content and "3.00e-02 of at most 1.00e-01" in content
    assert "ours, seed 43" in content and "eager, seeds 42 and 44" in content
    assert "<b>30%</b>" in glance and "<b>25%</b>" in glance
    only = write_report(write_rows(tmp_path / "only", [row]))
    assert "speed of any of this project's kernels" in section_of(only, "At a glance")


def test_misses_come_first(tmp_path):
    rows = [*CEILINGS, make_row(bytes=4e9, p50_ms=1.0), make_row(op="gate_residual", bytes=4e9, p50_ms=1.3)]
    content = section_of(write_report(write_rows(tmp_path, rows)), "Predictions")
    assert 0 < content.index("missed") < content.index("goal reached")


def test_speed_ups_are_of_the_same_work_only():
    rows = [
        make_row(**{**STEP, "workload": workload}, provider=name, p50_ms=time)
        for workload, times in (("240p×16", (900.0, 500.0, 400.0, 300.0)), ("720p×16", (900.0, 700.0, 600.0)))
        for name, time in zip(("upstream", "eager", "compile", "ours"), times, strict=False)
    ]
    assert speed_ups(results_of(*rows), ("upstream",)) == [("240p×16", pytest.approx(3.0))]


def test_a_filled_step_beside_open_sora_stands_before_a_small_one_of_more_providers(tmp_path):
    """With the recomputing variants that fit; one that another resolution lacks takes nothing from it."""
    filled = {"upstream-flash": 900.0, "compile-recompute-half": 450.0, "ours-recompute-half": 300.0}
    small = {"eager": 400.0, "compile": 300.0, "ours": 200.0, "ours-graph": 100.0}
    rows = [make_row(**STEP | {"shape": "B=5"}, provider=name, p50_ms=time) for name, time in filled.items()]
    rows += [make_row(**STEP | {"shape": "B=2", "tokens": 12960}, provider=name, p50_ms=t) for name, t in small.items()]
    results = results_of(*rows)
    (work,) = compared_steps(results.works("step", ""))
    assert work.first.shape == "B=5" and best_step(results).provider == "ours-recompute-half"
    assert speed_ups(results, COMPILED) == [("240p×16", pytest.approx(1.5))]
    glance = section_of(write_report(write_rows(tmp_path, rows)), "At a glance")
    assert "on Open-Sora with flash attention, training steps at 240p" in glance and "×3.00" in glance


def test_a_chip_of_the_same_rates_is_projected_to_one_number(tmp_path):
    rows = [replace(row, environment=replace(row.environment, device_name="nvidia-h100-80gb-hbm3")) for row in CEILINGS]
    for name in ("upstream-flash", "compile", "ours"):
        step = {**STEP, "flops": 1e14, "bytes": 1e11, "p50_ms": 300.0, "tokens": 32400}
        rows.append(make_row(**step, provider=name, device_name="nvidia-h100-80gb-hbm3"))
    content = section_of(write_report(write_rows(tmp_path, rows)), "Training steps")
    assert ">108 k<" in content and "108–108" not in content


def test_rows_of_the_same_work_are_grouped():
    rows = [make_row(), make_row(provider="eager"), make_row(dtype="float32"), make_row(shape="B=1 T=16 S=405")]
    assert [len(work.rows) for work in group(rows)] == [2, 1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_make_a_page(tmp_path, seed):
    """Few rows, of any levels, on any device, some without a time, a count or a limit."""
    draw = random.Random(seed)
    device = draw.choice(["nvidia-h200", "nvidia-a100-sxm4-80gb", "some-gpu", "cpu-x86_64"])
    rows = []
    for row in draw.sample(gpu_like_rows(), draw.choice([1, 3, 12])):
        row = replace(row, environment=replace(row.environment, device_name=device))
        chance = draw.random() if row.status == "ok" else 1.0
        if chance < 0.2:
            row = row.without_time("failed", '<b>"boom" & `x`</b>')
        elif chance < 0.3 and row.level not in ("copy", "gemm"):
            row = replace(row, flops=0.0, bytes=0.0, roofline_share=math.nan)
        elif chance < 0.4:
            row = replace(row, error=0.0, error_limit=0.0)
        elif chance < 0.6:
            row = replace(row, provider='<i>"p" & q</i>')
        rows.append(row)
    page = write_report(write_rows(tmp_path, rows)).read_text()
    assert '<i>"' not in page and '<b>"' not in page and "nan" not in page.lower()


def test_numbers_as_text():
    assert [rate(value) for value in (2599.0, 141_234.0, 1.5e6)] == ["2.6 k", "141 k", "1.5 M"]
    assert [time_text(value) for value in (0.0123, 1.234, 250.4, 1500.0)] == ["12.3 µs", "1.23 ms", "250 ms", "1.5 s"]


def test_the_command_writes_reports_without_measuring(tmp_path, capsys):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_rows(folder, [make_row()])
    assert run(["bench", "--report", *map(str, folders)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"report: {folder / 'report.html'}" for folder in folders]
    assert all((folder / "report.html").stat().st_size > 5000 for folder in folders)
    assert run(["bench", "--report", str(tmp_path / "none")]) == 1
    assert "holds no benchmark rows; `opensora-fast bench --out" in capsys.readouterr().err
    assert run(["bench", "--report", str(next(folders[0].glob("*.csv")))]) == 1
    assert ".csv is a file; give the folder that holds it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "has_matplotlib", "written"),
    [(0, True, True), (3, True, True), (130, True, True), (137, True, True), (1, True, False), (0, False, False)],
)
def test_a_run_ends_with_a_report(tmp_path, monkeypatch, capsys, code, has_matplotlib, written):
    """Whatever became of the report, the exit code is that of the measurement."""

    def measure(plan):
        write_rows(tmp_path, [make_row(**STEP)])
        return code

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(supervise, "supervise", measure)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: find_spec(name, *rest) if has_matplotlib or name != "matplotlib" else None,
    )
    assert run(["bench", "--device", "cpu", "--out", str(tmp_path)]) == code
    output, errors = capsys.readouterr()
    assert ("the process that measures died" in errors) == (code == 137)
    assert (f"report: {tmp_path / 'report.html'}" in output) == written == (tmp_path / "report.html").exists()
    assert ("no report.html: matplotlib is not installed" in output) == (not has_matplotlib)
