"""The doctor: what it says of what is there, missing, or not what its name says."""

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from opensora_fast import doctor
from opensora_fast.cli import run
from opensora_fast.data.decoding import dali_decoder


@pytest.fixture
def versions(monkeypatch):
    """Pretend that some distributions are installed (a version) or not (None)."""
    real = doctor.find_version

    def pretend(**changes):
        changes = {name.replace("_", "-"): version for name, version in changes.items()}
        monkeypatch.setattr(doctor, "find_version", lambda name: changes[name] if name in changes else real(name))

    return pretend


def get(report, name):
    return next(package for package in report.packages if package.name == name)


def test_this_machine(capsys):
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__
    assert report["kernels"]["cpu"].startswith("reference")
    assert report["problems"] == []
    names = {package["name"]: package for package in report["packages"]}
    assert names["safetensors"]["state"] == "ok"
    assert run(["doctor"]) == 0
    assert "all that is required is here" in capsys.readouterr().out


def test_a_missing_requirement_is_a_problem_with_its_fix(versions, capsys):
    versions(pyarrow=None)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pyarrow" in out and "pip install pyarrow" in out and "not ready" in out


def test_optional_packages_are_no_problem(versions):
    versions(flash_attn=None, colossalai=None, nvidia_dali_cuda130=None, nvidia_dali_cuda120=None)
    report = doctor.examine()
    assert report.problems == []
    assert get(report, "flash-attn").state == "optional"
    assert re.search("torch to 2.5.1 or older.*pip install --no-deps colossalai==0.5.0", get(report, "colossalai").fix)
    assert "nvidia-dali is a decoy" in get(report, "nvidia-dali-cuda130").fix
    assert not any("DALI" in decoder for decoder in report.decoders)


@pytest.mark.parametrize(("version", "is_told"), [("2.3.5", False), ("2.4.0", True), ("3.0.0rc1", True)])
def test_a_numpy_that_the_interpreter_does_not_take_is_told(versions, version, is_told):
    versions(numpy=version)
    report = doctor.examine()
    assert any(f"needs numpy below 2.4, but {version} is installed" in note for note in report.notes) == is_told
    assert report.problems == []


def test_the_dali_placeholder_is_told(versions):
    versions(nvidia_dali="1.0.0", nvidia_dali_cuda130="2.4.0")
    report = doctor.examine()
    assert get(report, "nvidia-dali").state == "wrong"
    assert get(report, "nvidia-dali-cuda130").state == "ok"
    assert any("nvidia-dali 1.0.0 is a placeholder" in note for note in report.notes)


def test_the_apex_of_pypi_is_told_from_nvidias(versions, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "apex" else real(name))
    versions(apex="0.9.10.dev0")
    report = doctor.examine()
    assert get(report, "apex").state == "wrong"
    assert any("web toolkit" in note for note in report.notes)
    (tmp_path / "normalization").mkdir()
    versions(apex="0.1")
    report = doctor.examine()
    assert get(report, "apex").state == "ok"
    assert not any("apex" in note for note in report.notes)  # T5 is kept from using it


def test_a_torch_that_cannot_be_imported_is_a_problem(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # makes the import raise
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: torch " in out and "cannot be imported" in out and "CPU build" in out and "kernels" in out


def test_kernels_need_triton(versions, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor.examine().kernels["cuda"] == "usable"
    versions(triton=None)
    assert doctor.examine().kernels["cuda"] == "not usable: triton is missing"


@pytest.mark.parametrize("is_there", [True, False])
def test_dali_decodes_on_a_gpu_where_the_driver_has_its_library_for_video(versions, monkeypatch, is_there):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    versions(nvidia_dali_cuda130="2.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(dali_decoder, "_loads", lambda library: is_there)
    report = doctor.examine()
    assert any(decoder.startswith("DALI on the GPU") for decoder in report.decoders) == is_there
    assert any("DRIVER_CAPABILITIES=compute,utility,video" in note for note in report.notes) != is_there


def test_triton_that_does_not_belong_to_torch(versions):
    report = doctor.Report()
    versions(triton="3.6.0")
    doctor._compare_triton(report, "2.13.0+cpu")
    assert report.notes == ["torch 2.13.0+cpu is made for triton 3.7.x, but 3.6.0 is installed"]
    versions(triton="3.7.1")
    report = doctor.Report()
    doctor._compare_triton(report, "2.13.0+cpu")
    assert report.notes == []
