"""The device and the dtype that a person names on a command line or in a configuration, and what a device tells."""

from __future__ import annotations

import torch

# By the names that configurations give them.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_device_name(name: str) -> str:
    """The name, if it is that of a device; it need not be here. ValueError otherwise."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: choose cpu or cuda")
    return name


def choose_device(name: str | None) -> torch.device:
    """The device of a name; None is CUDA where there is one. ValueError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if check_device_name(name) == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU; `opensora-fast doctor` says why, --device cpu works here")
    return torch.device(name)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device. From the host to a GPU the host does not wait for what that still has to do, as it would
    with memory that is not page-locked."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def count_memory_retries(device: torch.device) -> int:
    """How often torch has found no room on a GPU so far, and waited to give back to the driver what it keeps for reuse.

    Where that goes on as the shapes of steps change, the memory lies in pieces. 0 on a CPU.
    """
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0
