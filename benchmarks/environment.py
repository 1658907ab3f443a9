"""What a row says about where it was measured: hardware, driver, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from opensora_fast import kernels


@dataclass(frozen=True)
class Environment:
    """`device_name` is the folder of the results: the GPU's name, or "cpu" and its architecture."""

    device_name: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str
    dirty: bool
    date: str


@lru_cache(maxsize=2)
def describe_environment(device: str) -> Environment:
    """Reads the environment once per process; `device` is "cuda" or "cpu"."""
    commit, dirty = _source_state()
    return Environment(
        device_name=_device_name(device),
        driver=query_gpu("driver_version") if device == "cuda" else "",
        torch=torch.__version__,
        triton=installed_version("triton"),
        python=platform.python_version(),
        commit=commit,
        dirty=dirty,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, "" when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def query_gpu(field: str) -> str:
    """One field of the first GPU from nvidia-smi ("clocks.sm", "temperature.gpu", …), "" where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _device_name(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    return name.lower().replace(" ", "-")


def _source_state() -> tuple[str, bool]:
    """(commit, whether the tree differs from it) of this package's source; ("", False) outside a checkout."""
    root = Path(kernels.__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "", False
    return commit, bool(status.strip())
