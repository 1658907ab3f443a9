"""`opensora-fast demo` runs everything on one device."""

import pytest
import torch

from opensora_fast.cli import demo


class AllCommandsRun(Exception):
    pass


@pytest.mark.parametrize(
    ("given", "has_gpu", "expected"), [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu")]
)
def test_one_device_is_chosen_and_given_to_every_command(tmp_path, monkeypatch, given, has_gpu, expected):
    devices = []

    def run(*words):
        if words[0] in ("train", "sample", "profile"):
            devices.append((words[0], words[words.index("--device") + 1]))
        if words[:4] == ("profile", "attention", "--kind", demo.PROFILED_KINDS[-1]):
            raise AllCommandsRun

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(demo, "_run", run)
    with pytest.raises(AllCommandsRun):
        demo.command(tmp_path / "out", steps=30, device=given)
    names = ["train", "sample", "sample", *["profile"] * len(demo.PROFILED_KINDS)]
    assert devices == [(name, expected) for name in names]
