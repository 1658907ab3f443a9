"""Every kernel built for sm_90 without a GPU: no spills, matrix instructions in attention, and a budget that holds.

The budget has sm_80 and sm_100 as well, which take too long for every run of the tests: `opensora-fast kernels compile
--check-budget` builds all three. After a change that should need more, or for another Triton, write the budget anew and
look at its difference: `opensora-fast kernels compile --write-budget`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from opensora_fast.kernels.compilation import BUDGET_PATH, check_budget, compile_kernels, find_faults


def run_python(*arguments: str, **variables: str) -> list[dict]:
    """What Python prints with these arguments and variables of the environment; in a process of its own, for this one
    interprets the kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def name(row: dict) -> str:
    return f"{row['kernel']} {row['dtype']} ({row['config']}; {row['note']})"


# One test, so that the builds are made once however many processes run tests. They take about 100 s of CPU time, on as
# many cores as there are, where Triton's cache is empty, and 10 s from the cache.
@pytest.mark.timeout(1200)
def test_builds_for_sm_90() -> None:
    builds = run_python("-m", "opensora_fast", "kernels", "compile", "--arch", "sm_90", "--json")
    fields = {"kernel", "arch", "config", "dtype", "registers", "spills", "shared", "hgmma"}
    assert len(builds) >= 24
    assert all(fields <= set(row) and row["registers"] > 0 for row in builds)
    assert {row["dtype"] for row in builds} >= {"bf16", "fp16", "fp32"}
    assert [name(row) for row in builds if row["spills"]] == [], "these builds spill"
    attention = [row for row in builds if row["attention"]]
    assert attention, "no build says that it is of attention"
    assert [name(row) for row in attention if not row["matrix"]] == [], "these builds do not use the matrix units"
    groups = [row for row in attention if row["num_warps"] >= 4]
    assert [name(row) for row in groups if not row["hgmma"]] == [], "these builds use those of older GPUs"
    assert [name(row) for row in builds if row["unwritten_descriptors"]] == [], "they multiply what nothing wrote"
    assert [name(row) for row in builds if row["programs"] < 1] == [], "these builds fit on no multiprocessor"
    for row in builds:
        side_by_side = re.search(r"\bprograms=(\d+)", row["config"])  # for which the launcher cuts its tiles
        assert side_by_side is None or int(side_by_side[1]) <= row["programs"], name(row)
    assert [name(row) for row in builds if row["loop"]["other"]] == [], "sass.CLASSES lacks instructions of these"
    loops = [row for row in attention if row["unit"] == "score"]
    # 80 columns for 72, in two to five products: the counted work is the loop's, and nothing else is in it. (560: five,
    # of which two groups of four warps both compute the two that make scores of 64 keys.)
    products = {name(row): row["loop_products"] * row["num_warps"] / row["work"] for row in loops}
    assert set(products.values()) <= {160, 240, 320, 400, 560}, products
    narrow = [name(row) for row in loops if any(int(width) < 4 for width in row["loop_loads"] | row["loop_stores"])]
    assert narrow == [], "these read or write less than four bytes at a time in their loop"
    budget = json.loads(BUDGET_PATH.read_text())
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget belongs to triton {budget['triton']}, installed is {triton.__version__}")
    assert check_budget(builds, budget["rows"]) == []


def test_the_environment_changes_no_build() -> None:
    """Triton asks it whether products and sums may be fused, where it is not told."""
    script = "import json; from opensora_fast.kernels.compilation import compile_case\n"
    script += "from opensora_fast.kernels.rows.gelu_tanh import compile_cases\n"
    script += "print(json.dumps([compile_case(case, 'sm_90') for case in compile_cases('sm_90')[:1]]))"
    plain = run_python("-c", script)
    assert plain[0]["registers"] > 0
    assert run_python("-c", script, TRITON_DEFAULT_FP_FUSION="0") == plain


@pytest.mark.timeout(600)
def test_what_was_chosen_by_measurement_is_built_rightly_for_sm_90() -> None:
    """It runs on those GPUs in the place of the default. A choice may spill, if it was faster still."""
    builds = run_python(str(Path(__file__).parent / "measured_builds.py"))
    assert builds, "every choice is the default, so that nothing is left to be built"
    assert [build for build in builds if build["unwritten_descriptors"]] == []
    attention = [build for build in builds if build["attention"]]
    assert [build for build in attention if not build["matrix"] or build["warps"] >= 4 and not build["hgmma"]] == []


def row(**changes) -> dict:
    build = {"kernel": "a", "arch": "sm_90", "config": "", "dtype": "bf16", "note": "", "registers": 64, "shared": 512}
    return build | changes


@pytest.mark.parametrize(
    ("build", "fault"),
    [
        (row(registers=65), "a / sm_90 /  / bf16 / : 65 registers, budget 64"),
        (row(shared=1024), "a / sm_90 /  / bf16 / : 1024 shared, budget 512"),
        (row(dtype="fp16"), "a / sm_90 /  / fp16 / : not in the budget"),
    ],
)
def test_a_build_over_its_budget_is_named(build, fault) -> None:
    assert check_budget([row(registers=60)], [row()]) == []
    assert fault in check_budget([build], [row()])


def test_a_budget_without_a_build_is_named() -> None:
    faults = check_budget([row()], [row(), row(kernel="b")])
    assert faults == ["b / sm_90 /  / bf16 / : in the budget, but not built"]


def test_faults_are_spills_what_is_wrong_with_matrix_instructions_and_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(
        "opensora_fast.kernels.compilation.read_budget", lambda: {"triton": triton.__version__, "rows": [row()]}
    )
    build = row(attention=True, matrix=4, hgmma=4, unwritten_descriptors=0, spills=0, num_warps=4)
    assert find_faults([build]) == []
    assert find_faults([build | {"spills": 8}]) == ["a / sm_90 /  / bf16 / : 8 bytes of spills"]
    assert find_faults([build | {"hgmma": 0}]) == ["a / sm_90 /  / bf16 / : no HGMMA"]
    assert find_faults([build | {"hgmma": 0, "num_warps": 2}]) == []
    unwritten = "a / sm_90 /  / bf16 / : 2 matrix instructions whose descriptors are not written on every path"
    assert find_faults([build | {"unwritten_descriptors": 2}]) == [unwritten]
    trap = build | {"arch": "sm_100", "matrix": 0, "hgmma": 0}
    assert "a / sm_100 /  / bf16 / : no matrix instruction" in find_faults([trap])
    assert find_faults([build | {"registers": 65}]) == ["a / sm_90 /  / bf16 / : 65 registers, budget 64"]


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="--arch sm_70: unknown"):
        compile_kernels(["sm_70"])
    with pytest.raises(ValueError, match="--arch: none given"):
        compile_kernels([])


def test_an_interpreter_builds_nothing(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        compile_kernels(["sm_90"])
