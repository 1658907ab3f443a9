"""What a row says about where it was measured: hardware, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from opensora_fast import kernels

DIRTY_SUFFIX = "-dirty"


@dataclass(frozen=True)
class Environment:
    """`device_name` is the folder of the results: the GPU's name, or "cpu" and its architecture.

    `commit` is "" where nobody knows it: a copy of the sources without its history. `dirty`: the sources differ from
    it.
    """

    device_name: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str
    dirty: bool
    date: str

    @property
    def undated(self) -> Environment:
        """Equal for the same machine, versions and sources."""
        return replace(self, date="")


@lru_cache(maxsize=8)
def describe_environment(device: str, commit: str | None = None) -> Environment:
    """Reads the environment once per process.

    Args:
        device: "cuda" or "cpu".
        commit: of a copied tree, as `git describe --always --abbrev=40 --dirty` prints it where the copy was made.

    Raises:
        ValueError: the commit is no commit, or the tree is a checkout of another.
    """
    commit, dirty = find_source_state(commit)
    return Environment(
        device_name=_device_name(device),
        driver=query_gpu("driver_version") if device == "cuda" else "",
        torch=torch.__version__,
        triton=installed_version("triton"),
        python=platform.python_version(),
        commit=commit,
        dirty=dirty,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, "" when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def query_command(*fields: str) -> list[str]:
    """The command that asks nvidia-smi for fields ("clocks.sm", …) of the first GPU that this process may use.

    nvidia-smi counts all GPUs, whatever CUDA_VISIBLE_DEVICES leaves of them. For a part of one (MIG) it is the host's
    first.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    number = "0" if not first or first.startswith("MIG-") else first
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={number}"]


def query_gpu(*fields: str) -> str:
    """The answer to `query_command` with commas between, "" where there is none."""
    command = query_command(*fields)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def find_source_state(commit: str | None = None, root: Path | None = None) -> tuple[str, bool]:
    """(commit, whether the tree differs from it) of this package's source; see `describe_environment`.

    Committed results may be written while measuring, so `benchmarks/results` does not make a tree dirty.
    """
    root = root or Path(kernels.__file__).parent.parent
    found = _run_git(root, "rev-parse", "HEAD")
    # A source tree copied into another project's checkout must not take that one's commit.
    if found is not None and _run_git(root, "ls-files", "--error-unmatch", "benchmarks/environment.py") is not None:
        given = found if commit is None else commit.removesuffix(DIRTY_SUFFIX)
        if not given or not found.startswith(given):  # its own may be given: one command serves it and a copy
            raise ValueError(f"--commit {commit}: the sources are a checkout of {found[:12]}; leave --commit out")
        changes = _run_git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return found, changes != ""
    if commit is None:
        return "", False
    name = commit.removesuffix(DIRTY_SUFFIX)
    if not re.fullmatch(r"[0-9a-f]{7,40}", name):
        raise ValueError(
            f"--commit {commit!r}: not a commit; give what `git describe --always --abbrev=40 --dirty` prints"
        )
    return name, commit.endswith(DIRTY_SUFFIX)


def _device_name(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    return name.lower().replace(" ", "-")


def _run_git(root: Path, *arguments: str) -> str | None:
    """Output of a git command in `root`; None where it fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
