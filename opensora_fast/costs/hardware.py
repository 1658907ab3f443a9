"""Rates and memory of GPUs."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

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


# Dense bf16 rate and memory bandwidth of the SXM parts by their datasheets; memory as nvidia-smi shows it, which is
# 7 % more than the 80, 141 and 180 GB of their names.
DATASHEETS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 312e12, 2.039e12, "datasheet, 80 GB SXM", 81920 * MIB),
        Gpu("H100", 989.4e12, 3.35e12, "datasheet, SXM", 81559 * MIB),
        Gpu("H800", 989.4e12, 3.35e12, "datasheet, SXM", 81559 * MIB),
        Gpu("H200", 989.4e12, 4.8e12, "datasheet, SXM", 143771 * MIB),
        Gpu("B200", 2250e12, 8.0e12, "datasheet, SXM", 183359 * MIB),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name such as "H200", in any case.

    Raises:
        ValueError: none is known by that name.
    """
    gpu = DATASHEETS.get(name.upper())
    if gpu is None:
        near = difflib.get_close_matches(name.upper(), DATASHEETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no GPU {name!r}: {hint}known are {', '.join(DATASHEETS)}")
    return gpu


def recognize_gpu(device_name: str) -> Gpu | None:
    """The GPU behind a name as drivers and benchmark rows write it, such as "NVIDIA H200"; None for others."""
    words = re.split(r"[^A-Z0-9]+", device_name.upper())  # a GH200 is no H200
    return next((gpu for name, gpu in DATASHEETS.items() if name in words), None)
