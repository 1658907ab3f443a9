"""Golden files and stand-ins shared by the diffusion tests."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .toys import ToyModel

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden():
    """Load a golden file by name."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def no_noise(monkeypatch):
    """Every draw of noise gives zeros."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


@pytest.fixture
def toy_model() -> ToyModel:
    return ToyModel()
