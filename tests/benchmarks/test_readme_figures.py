"""The README's figure and tables are those of the committed rows."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_toys import make_row

from opensora_fast.benchmarks import readme
from opensora_fast.benchmarks.readme import (
    BEGIN,
    END,
    FIGURE,
    build_block,
    read_results,
    replace_block,
)
from opensora_fast.benchmarks.report.results import Results
from opensora_fast.benchmarks.report.training_figure import NOT_MEASURED, build_figure
from opensora_fast.benchmarks.report.training_lines import training_lines
from opensora_fast.benchmarks.rows import append_rows

ROOT = Path(__file__).parents[2]
STEP = {"level": "step", "op": "", "direction": "training", "workload": "240p×16", "tokens": 32400}


def test_the_readme_is_up_to_date(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_committed_rows_are_of_a_known_state():
    folders = read_results(ROOT / "benchmarks" / "results")
    assert folders
    for results in folders:
        assert results.folder.name == results.device_name
        for row in results.rows:
            assert row.environment.commit and not row.environment.dirty, row.name


def test_without_rows_nothing_is_claimed():
    block = build_block([])
    ours = next(line for line in block.splitlines() if "ours" in line and line.startswith("|"))
    assert ours.count(NOT_MEASURED) == 5 and not any(character.isdigit() for character in ours.split("|", 2)[2])
    assert "No speed on a GPU has been measured yet" in " ".join(block.split()) and "22.5" in block
    figure = build_figure(training_lines([]))
    assert figure.count(f"ours on H200: {NOT_MEASURED}") == 5 and 'class="ours"' not in figure


def test_a_measured_row_takes_its_place():
    slow, fast = (
        make_row(**STEP, provider=name, p50_ms=time) for name, time in (("ours", 300.0), ("ours-recompute", 400.0))
    )
    peer = make_row(**STEP, provider="compile", p50_ms=100.0)
    block = build_block([Results(None, (slow, fast, peer))])
    ours = next(line for line in block.splitlines() if line.startswith("| **ours"))
    assert ours == f"| **ours on one H200** | {NOT_MEASURED} | **108** | {' | '.join([NOT_MEASURED] * 3)} |"
    assert "Measured: H200 at aaaaaaaaa." in block and "No speed" not in block


def test_upstream_of_the_same_videos_stands_below_ours():
    ours = make_row(**STEP, p50_ms=300.0, shape="B=5 T=16")
    upstream = make_row(**STEP, provider="upstream", p50_ms=1500.0, shape="B=5 T=16")
    smaller = make_row(**STEP, provider="upstream", p50_ms=500.0, shape="B=2 T=16")
    block = build_block([Results(None, (ours, smaller, upstream))])
    assert "| Open-Sora's model as shipped, same H200 and run | – | 21.6 | – | – | – |" in block
    text = " ".join(block.split())
    assert "in our writing" in text and "flash attention has not been measured on one H200 yet" in text
    assert "as shipped" not in build_block([Results(None, (ours, smaller))])
    genuine = make_row(**STEP, provider="open-sora", p50_ms=1620.0, shape="B=5 T=16")
    assert build_block([Results(None, (ours, upstream, genuine))]) == block  # the faster of the two
    genuine = make_row(**STEP, provider="open-sora", p50_ms=1400.0, shape="B=5 T=16")
    flash = make_row(**STEP, provider="upstream-flash", p50_ms=600.0, shape="B=5 T=16")
    block = build_block([Results(None, (ours, upstream, flash, genuine))])
    assert "| Open-Sora's model as shipped, same H200 and run | – | 23.1 | – | – | – |" in block
    assert "| Open-Sora's model with flash attention, same H200 and run | – | 54.0 | – | – | – |" in block
    figure = build_figure(training_lines([Results(None, (ours, upstream, flash, genuine))])).replace("&#x27;", "'")
    assert "Open-Sora's model with flash attention, same H200: 54.0" in figure
    assert "Open-Sora's model as shipped, same H200: 23.1" in figure and "torch.compile" not in figure
    assert figure.count(f"Open-Sora's model as shipped, same H200: {NOT_MEASURED}") == 4
    assert "same H200" not in build_figure(training_lines([Results(None, (ours, smaller))]))
    text = " ".join(block.split())
    assert "its own code" in text and "flash attention has not been measured" not in text


def test_each_measured_gpu_stands_under_its_own_name():
    """Never under the name of an H200, and not left out as if nothing had been measured."""
    row = make_row(**STEP, p50_ms=300.0)
    other = make_row(**STEP, p50_ms=400.0, device_name="nvidia-h100-80gb-hbm3")
    block = build_block([Results(None, (other,))])
    assert f"| **ours on one H100** | {NOT_MEASURED} | **81.0** |" in block
    assert "limit of one H100, counted" in block and "H200" not in block and "No speed" not in block
    assert "ours on H100: 81.0" in build_figure(training_lines([Results(None, (other,))]))
    folders = [Results(None, (other,)), Results(None, (row,))]
    both = build_block(folders)
    assert f"| **ours on one H200** | {NOT_MEASURED} | **108** |" in both
    assert f"| **ours on one H100** | {NOT_MEASURED} | **81.0** |" in both
    assert "Measured: H200 at aaaaaaaaa; H100 at aaaaaaaaa." in " ".join(both.split())
    figure = build_figure(training_lines(folders))
    assert "ours on H200: 108" in figure and "ours on H100: 81.0" in figure
    assert figure.count("limit of H100 and H800: ") == 5  # their rates are the same


def test_peers_of_another_gpu_stand_beside_none_of_this():
    ours, flash = (make_row(**STEP, provider=name, p50_ms=400.0) for name in ("ours", "upstream-flash"))
    other = replace(ours, environment=replace(ours.environment, device_name="nvidia-h100-80gb-hbm3"))
    block = build_block([Results(None, (ours, flash)), Results(None, (other,))])
    assert "same H200 and run | – | 81.0" in block and "same H100" not in block


@pytest.mark.parametrize("change", [{"torch": "2.12.0"}, {"driver": "590.1"}, {"dirty": True}])
def test_peers_of_other_versions_or_changed_sources_stand_beside_none(change):
    ours, flash = make_row(**STEP, p50_ms=400.0), make_row(**STEP, provider="upstream-flash", p50_ms=400.0, **change)
    assert "same H200" not in build_block([Results(None, (ours, flash))])
    later = make_row(**STEP, provider="upstream-flash", p50_ms=400.0, date="2026-12-24")  # a run that was continued
    assert "same H200" in build_block([Results(None, (ours, later))])


def test_a_row_with_peers_stands_before_a_faster_one_without():
    alone = make_row(**STEP, p50_ms=300.0, shape="B=5 T=16")
    beside = make_row(**STEP | {"tokens": 19440}, p50_ms=200.0, shape="B=3 T=16")
    peer = make_row(**STEP | {"tokens": 19440}, p50_ms=300.0, shape="B=3 T=16", provider="compile-recompute-half")
    slower = replace(peer, provider="compile-one-order", p50_ms=400.0)
    block = build_block([Results(None, (alone, beside, slower, peer))])
    assert f"| **ours on one H200** | {NOT_MEASURED} | **97.2** |" in block
    assert "| torch.compile, same H200 and run | – | 64.8 | – | – | – |" in block
    assert "Blocks recompute what does not fit: 240p on one H200 (compile half)." in " ".join(block.split())
    assert "Open-Sora's rows" not in block


def test_it_says_that_open_sora_recomputes_where_it_need_not():
    rows = [make_row(**STEP, p50_ms=300.0), make_row(**STEP, provider="upstream-flash", p50_ms=900.0)]
    every = "Open-Sora's rows recompute all blocks, as its stages 2 and 3 do"
    assert f"{every}." in " ".join(build_block([Results(None, tuple(rows))]).split())
    large = STEP | {"workload": "720p×16", "tokens": 57600}
    rows += [make_row(**large, p50_ms=700.0), make_row(**large, provider="upstream-flash", p50_ms=2000.0)]
    rows.append(make_row(**STEP, provider="upstream-flash-stored", p50_ms=800.0))
    block = build_block([Results(None, tuple(rows))])
    assert f"{every}; with flash attention none at 240p, as in its stage 1." in " ".join(block.split())
    # The fastest of them stands in the table.
    assert "Open-Sora's model with flash attention, same H200 and run | – | 40.5 | – | – | 28.8 |" in block


def refused_beside(row, result, **change) -> dict:
    """A line of refused.jsonl of what was measured in the run of a row."""
    environment = row.environment
    refused = {
        "key": list(replace(row, provider="compile").key),
        "result": result,
        "error": 2.0,
        "error_limit": 1.0,
        "device_name": environment.device_name,
        "commit": environment.commit,
        "dirty": environment.dirty,
        "date": environment.date,
    }
    return refused | change


@pytest.mark.parametrize(("result", "what"), [("gradient of the parameters", "gradients"), ("output", "results")])
def test_what_was_measured_wrong_is_not_called_unmeasured(result, what):
    ours = make_row(**STEP, p50_ms=300.0)
    folders = [Results(None, (ours,), (refused_beside(ours, result),))]
    assert f"| torch.compile, same H200 and run | – | wrong {what}, no time | – | – | – |" in build_block(folders)
    figure = build_figure(training_lines(folders))
    assert figure.count(f"torch.compile, same H200: wrong {what}, no time") == 1
    assert figure.count(f"torch.compile, same H200: {NOT_MEASURED}") == 4
    right = make_row(**STEP, p50_ms=400.0, provider="compile-one-order")
    assert "| torch.compile, same H200 and run | – | 81.0 | – | – | – |" in build_block(
        [Results(None, (ours, right), folders[0].refused)]
    )


@pytest.mark.parametrize("change", [{"commit": "b" * 40}, {"device_name": "nvidia-h100-80gb-hbm3"}, {"dirty": True}])
def test_what_was_wrong_in_another_run_says_nothing_of_this(change):
    ours = make_row(**STEP, p50_ms=300.0)
    refused = refused_beside(ours, "gradient of the parameters", **change)
    assert "torch.compile" not in build_block([Results(None, (ours,), (refused,))])


def test_only_the_block_is_rewritten():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_block(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="README.md has no block between"):
        replace_block("no markers", "new")


def test_rewriting_and_checking(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks" / "results" / "nvidia-h200").mkdir(parents=True)
    append_rows(tmp_path / "benchmarks/results/nvidia-h200/step.csv", [make_row(**STEP, p50_ms=300.0)])
    page = tmp_path / "README.md"
    page.write_text(f"# x\n{BEGIN}\n{END}\n")
    monkeypatch.setattr(readme.kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    assert readme.main(["--check"]) == 1
    assert "out of date: README.md, benchmarks/results/training.svg" in capsys.readouterr().out
    for mistaken in ("--chekc", "--help"):
        with pytest.raises(SystemExit):
            readme.main([mistaken])
    assert not (tmp_path / FIGURE).exists()
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    assert "**108**" in page.read_text() and 'class="ours"' in (tmp_path / FIGURE).read_text()
    append_rows(tmp_path / "benchmarks/results/nvidia-h200/step.csv", [make_row(**STEP, p50_ms=290.0)])
    assert readme.main(["--check"]) == 1


def test_the_figure_is_well_formed():
    from xml.etree import ElementTree

    root = ElementTree.fromstring(build_figure(training_lines([])))
    width = float(root.get("width"))
    bars = [element for element in root.iter() if element.tag.endswith("rect") and element.get("x")]
    assert len(bars) == 13  # two limits of five resolutions, and three published
    assert all(0 < float(bar.get("width")) and float(bar.get("x")) + float(bar.get("width")) < width for bar in bars)
