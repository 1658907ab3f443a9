"""The model of Open-Sora 1.1."""

from .backends import Backends
from .config import STDiT2Config
from .stdit2 import STDiT2

__all__ = ["Backends", "STDiT2", "STDiT2Config"]
