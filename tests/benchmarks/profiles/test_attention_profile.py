"""`profile attention` where a length or a provider does not do what it should."""

from dataclasses import replace

import pytest
import torch

from opensora_fast.benchmarks.measuring.provider import Provider, of_function
from opensora_fast.benchmarks.measuring.session import DeviceLostError
from opensora_fast.benchmarks.profiles import attention
from opensora_fast.benchmarks.providers.attention import ATTENTION_PROVIDERS, naive_attend
from opensora_fast.benchmarks.providers.attention_work import attend_run_by_run
from opensora_fast.benchmarks.rows import read_rows
from opensora_fast.benchmarks.running import runner
from opensora_fast.benchmarks.suites import attention_lengths
from opensora_fast.cli import run


@pytest.fixture
def take_part(monkeypatch):
    """Makes a provider one of those that can be profiled, by the name "guest"."""

    def add(prepare) -> None:
        providers = (*ATTENTION_PROVIDERS, Provider("guest", prepare))
        for module in (attention, attention_lengths):
            monkeypatch.setattr(module, "ATTENTION_PROVIDERS", providers)

    return add


def profile(out, lengths: str, providers: str) -> int:
    words = ["--device", "cpu", "--seqlens", lengths, "--providers", providers, "--budget", "0.1"]
    return run(["profile", "attention", *words, "--out", str(out)])


def read(out) -> dict[tuple[str, str, str], str]:
    return {(row.workload, row.direction, row.provider): row.status for row in read_rows(out / "attention_spatial.csv")}


def attend(work):
    return attend_run_by_run(work, naive_attend)


def test_every_length_is_compiled(tmp_path, take_part):
    """After too many shapes of one function torch.compile computes it as eager does, under its own name."""
    take_part(of_function(torch.compile(attend, backend="eager", dynamic=False)))
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        assert profile(tmp_path, "4,6,8,10,12", "guest") == 0
    assert list(read(tmp_path).values()) == ["ok"] * 10


def test_a_length_that_fails_costs_its_own_rows(tmp_path, take_part, monkeypatch, capsys):
    """As where the scores in float64 do not fit into the GPU's memory."""
    make_contest = attention_lengths._make_contest

    def fail_at_16(template, *arguments):
        if template.workload == "length 16":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return make_contest(template, *arguments)

    monkeypatch.setattr(attention_lengths, "_make_contest", fail_at_16)
    assert profile(tmp_path, "8,16,4", "eager") == 0
    rows = read(tmp_path)
    assert {workload for (workload, _, _), status in rows.items() if status == "ok"} == {"length 8", "length 4"}
    assert "eager: failed (2 rows): OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


def test_a_sequence_that_is_longer_than_the_inputs_of_checks_is_checked_itself(tmp_path):
    """Once: smaller inputs would be as large."""
    assert profile(tmp_path, "600", "eager") == 0
    assert {row.checked_on for row in read_rows(tmp_path / "attention_spatial.csv")} == {""}


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "(stopped)"),
        (DeviceLostError([], "illegal memory access"), 1, "a provider left the GPU unusable: illegal memory access"),
    ],
)
def test_what_was_measured_before_the_end_is_kept(tmp_path, monkeypatch, capsys, stop, code, message):
    cases = []

    def length_case(*arguments):
        def measure(session, names):
            if len(cases) > 1:
                raise stop
            cases.append(arguments)
            return case.measure(session, names)

        case = attention_lengths.length_case(*arguments)
        return replace(case, measure=measure)

    monkeypatch.setattr(attention, "length_case", length_case)
    assert profile(tmp_path, "8,4,2", "eager") == code
    assert message in capsys.readouterr().err
    assert {workload for workload, _, _ in read(tmp_path)} == {"length 8", "length 4"}
    assert (tmp_path / "attention_spatial.svg").exists()


def test_a_place_where_nothing_can_be_written_is_told_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(runner, "_measure", lambda *arguments: pytest.fail("measured for nothing"))
    assert profile(tmp_path / "file", "4", "eager") == 1
    assert f"File exists: {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_wrong_result_has_no_row_and_is_told_below_the_table(tmp_path, take_part, capsys):
    take_part(of_function(lambda work: 1.1 * attend(work)))
    assert profile(tmp_path, "4", "guest,eager") == 0
    assert {provider for _, _, provider in read(tmp_path)} == {"eager"}
    assert "wrong, so no time: op spatial_attention forward length 4 guest: the error of its" in capsys.readouterr().out


def test_only_what_has_a_time_is_traced(tmp_path, take_part):
    def crash(work):
        raise RuntimeError("boom")

    take_part(of_function(crash))
    words = ["--device", "cpu", "--seqlens", "4,8", "--providers", "guest,eager,ours", "--budget", "0.1", "--trace"]
    assert run(["profile", "attention", *words, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("trace_*")] == ["trace_spatial_8_eager.json"]


@pytest.mark.filterwarnings("error")
def test_where_nothing_could_be_measured_the_reasons_are_written(tmp_path, take_part, capsys):
    take_part(lambda work: None)
    assert profile(tmp_path, "4", "ours,guest") == 1
    assert "no provider could be measured; the table says why for each" in capsys.readouterr().err
    assert set(read(tmp_path).values()) == {"unavailable", "failed"}
