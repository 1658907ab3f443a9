"""GPUs are found by the names people and drivers give them."""

import pytest

from opensora_fast.costs.hardware import DATASHEETS, find_gpu, recognize_gpu


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("nvidia-h100-80gb-hbm3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("nvidia-h100-pcie", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
    ],
)
def test_names_of_drivers_and_rows_are_recognized(name, gpu):
    assert recognize_gpu(name) is DATASHEETS[gpu]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GH200 480GB", "nvidia-gb200", "NVIDIA H20", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu-x86_64", ""],
)
def test_other_devices_are_not_taken_for_those_whose_name_they_hold(name):
    assert recognize_gpu(name) is None


def test_a_wrong_name_is_answered_with_the_nearest():
    assert find_gpu("h200").name == "H200"
    assert find_gpu("h100 pcie").name == "H100 PCIe"
    with pytest.raises(ValueError, match="no GPU 'H100-PCIe': did you mean 'H100 PCIe'"):
        find_gpu("H100-PCIe")
    with pytest.raises(ValueError, match="no GPU 'h20': did you mean 'H200'"):
        find_gpu("h20")
    with pytest.raises(ValueError, match="no GPU 'mine': known: A100, A100 40GB, A100 PCIe, H100"):
        find_gpu("mine")
