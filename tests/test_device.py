"""Tensors on their way to a GPU, which stand-ins for tensors take on any machine."""

from types import SimpleNamespace

import pytest
import torch

from opensora_fast.device import count_memory_retries, send

GPU = torch.device("cuda", 0)


def make_tensor(device: str, pin_memory=None):
    """What answers where it was sent, and whether the host does not wait for it."""
    return SimpleNamespace(
        device=torch.device(device),
        pin_memory=pin_memory,
        to=lambda where, non_blocking: (where, non_blocking),
    )


def test_from_the_host_a_tensor_goes_to_a_gpu_through_page_locked_memory():
    pinned = make_tensor("cpu")
    pinned.to = lambda where, non_blocking: ("pinned", where, non_blocking)
    assert send(make_tensor("cpu", pin_memory=lambda: pinned), GPU) == ("pinned", GPU, True)


def test_from_one_gpu_a_tensor_goes_to_another_although_it_cannot_be_page_locked():
    """As the noise of a generator that lives on another GPU does."""
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned|[Cc]annot pin"):
        torch.ones(1, device="meta").pin_memory()
    assert send(make_tensor("cuda:1"), GPU) == (GPU, True)


def test_to_the_host_a_tensor_is_waited_for():
    assert send(make_tensor("cuda:0"), torch.device("cpu")) == (torch.device("cpu"), False)


def test_times_without_room_are_counted_on_a_gpu_and_0_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3 + device.index})
    assert count_memory_retries(GPU) == 3
    assert count_memory_retries(torch.device("cpu")) == 0
