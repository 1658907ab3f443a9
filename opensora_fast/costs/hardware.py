"""Rates and memory of GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from opensora_fast.suggest import suggest

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU. `source` says whether they are a datasheet's or measured.

    Attributes:
        matrix_flops: dense bf16 FLOP/s.
        bandwidth: bytes/s of device memory, read plus written.
        memory: bytes of device memory, 0 where nobody needs it.
    """

    name: str
    matrix_flops: float
    bandwidth: float
    source: str
    memory: int = 0

    def is_like(self, other: Gpu) -> bool:
        """Whether one computes as fast as the other: H100 and H800 are one chip, and differ in NVLink."""
        return (self.matrix_flops, self.bandwidth) == (other.matrix_flops, other.bandwidth)


# Dense bf16 rate and memory bandwidth by the datasheets, of the SXM part where a name says nothing else; memory as
# nvidia-smi shows it, which is 7 % more than the 80, 141 and 180 GB of their names.
DATASHEETS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 2.039e12, "datasheet, 80 GB SXM", 81920 * MIB),
        Gpu("A100 40GB", 312e12, 1.555e12, "datasheet", 40960 * MIB),
        Gpu("A100 PCIe", 312e12, 1.935e12, "datasheet, 80 GB", 81920 * MIB),
        Gpu("H100", 989.4e12, 3.35e12, "datasheet, SXM", 81559 * MIB),
        Gpu("H100 PCIe", 756e12, 2.0e12, "datasheet", 81559 * MIB),
        Gpu("H100 NVL", 835.5e12, 3.9e12, "datasheet", 95830 * MIB),
        Gpu("H800", 989.4e12, 3.35e12, "datasheet, SXM", 81559 * MIB),
        Gpu("H200", 989.4e12, 4.8e12, "datasheet, SXM", 143771 * MIB),
        Gpu("H200 NVL", 835.5e12, 4.8e12, "datasheet", 143771 * MIB),
        Gpu("B200", 2250e12, 8.0e12, "datasheet, SXM", 183359 * MIB),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name such as "H200" or "H100 PCIe", in any case.

    Raises:
        ValueError: none is known by that name.
    """
    by_name = {gpu.name.upper(): gpu for gpu in DATASHEETS.values()}
    if name.upper() not in by_name:
        raise ValueError(f"no GPU {name!r}: {suggest(name, DATASHEETS)}")
    return by_name[name.upper()]


def recognize_gpu(device_name: str) -> Gpu | None:
    """The GPU behind a name as drivers and benchmark rows write it, such as "NVIDIA H100 PCIe"; None for others.

    A part of a GPU (MIG) is none: it has a share of the rates and the memory.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))  # a GH200 is no H200
    if "MIG" in words:
        return None
    named = {gpu: set(gpu.name.upper().split()) for gpu in DATASHEETS.values()}
    return max((gpu for gpu in named if named[gpu] <= words), key=lambda gpu: len(named[gpu]), default=None)
