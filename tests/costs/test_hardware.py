"""GPUs are found by the names people and drivers give them."""

import pytest

from opensora_fast.costs.hardware import DATASHEETS, find_gpu, recognize_gpu


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"])
def test_names_of_drivers_and_rows_are_recognized(name):
    assert recognize_gpu(name) is DATASHEETS["H100"]


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "nvidia-gb200", "NVIDIA H20", "cpu-x86_64", ""])
def test_other_devices_are_not_taken_for_those_whose_name_they_hold(name):
    assert recognize_gpu(name) is None


def test_a_wrong_name_is_answered_with_the_nearest():
    assert find_gpu("h200").name == "H200"
    with pytest.raises(ValueError, match="no GPU 'H20': did you mean H200. known are A100, H100"):
        find_gpu("H20")
