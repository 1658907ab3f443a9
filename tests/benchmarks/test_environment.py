"""Where a row says it is from: a checkout knows its commit, a copy has to be told."""

import shutil
import subprocess
from pathlib import Path

import pytest

from opensora_fast.benchmarks import environment
from opensora_fast.benchmarks.environment import describe_environment, find_source_state


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path):
    """A small repository that looks like this one."""
    folder = tmp_path / "checkout"
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "benchmarks" / "environment.py").write_text("")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "First")
    return folder


def test_a_checkout_knows_its_commit_and_whether_it_is_changed(checkout):
    commit, dirty = find_source_state(root=checkout)
    assert len(commit) == 40 and not dirty
    (checkout / "benchmarks" / "results" / "op.csv").write_text("rows being written")
    assert find_source_state(root=checkout) == (commit, False)
    (checkout / "new.py").write_text("")
    assert find_source_state(root=checkout) == (commit, True)
    with pytest.raises(ValueError, match=f"a checkout of {commit[:12]}; leave --commit out"):
        find_source_state("a" * 40, checkout)


def test_a_checkout_may_be_told_its_own_commit(checkout):
    """So that one command serves it and a copy of it; whether it is changed is found out, not believed."""
    commit, _ = find_source_state(root=checkout)
    for given in (commit, commit[:12], f"{commit}-dirty"):
        assert find_source_state(given, checkout) == (commit, False)
    for given in ("", "-dirty"):
        with pytest.raises(ValueError, match="leave --commit out"):
            find_source_state(given, checkout)


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, ("", False)), ("a" * 40, ("a" * 40, False)), ("abc1234-dirty", ("abc1234", True))],
)
def test_a_copy_has_to_be_told(checkout, tmp_path, given, found):
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    assert find_source_state(given, copy) == found


def test_a_copy_inside_another_checkout_does_not_take_its_commit(checkout):
    copy = checkout / "vendored"
    (copy / "benchmarks").mkdir(parents=True)
    (copy / "benchmarks" / "environment.py").write_text("")
    assert find_source_state(root=copy) == ("", False)


@pytest.mark.parametrize("given", ["main", "", "-dirty", "abc"])
def test_what_is_no_commit_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="not a commit; give what `git describe"):
        find_source_state(given, tmp_path)


def test_the_cpu_is_a_device_of_its_own():
    found = describe_environment("cpu")
    assert found.device_name.startswith("cpu-") and found.driver == ""
    assert found.torch and found.triton and found.date.endswith("Z")


def test_a_gpu_that_does_not_answer_leaves_fields_empty(monkeypatch):
    def fail(*arguments, **keywords):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    assert environment.query_gpu("clocks.sm", "clocks.mem") == ""
    assert find_source_state(root=Path("/")) == ("", False)
