"""What a provider is: one way to compute an op, a block or a step, and when it cannot."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..environment import installed_version

Outputs = Tensor | tuple[Tensor, ...]
Bound = Callable[[], Outputs]  # a provider bound to its inputs
Missing = Callable[[Any], str]  # work → why a provider cannot compute it here, "" if it can


def nothing_missing(work: Any) -> str:
    return ""


def torch_version() -> str:
    return torch.__version__


def own_version() -> str:
    return installed_version("opensora_fast")


@dataclass(frozen=True)
class Provider:
    """A way to compute something.

    Attributes:
        name: as in rows.
        prepare: (work) → a call without arguments. What an application does once for many calls (building masks,
            wrapping a model, asking for compilation) is done here and not timed.
        missing: (work) → why it cannot run here, "" if it can.
        version: of the library.
    """

    name: str
    prepare: Callable[[Any], Bound]
    missing: Missing = nothing_missing
    version: Callable[[], str] = torch_version


def of_function(function: Callable[[Any], Outputs]) -> Callable[[Any], Bound]:
    """A `prepare` for a function of the work that needs no preparation."""
    return lambda work: partial(function, work)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile, with shapes as constants, as a user with fixed buckets would have it."""
    return torch.compile(function, dynamic=False, **options)


def forget_compiled() -> None:
    """For new work: torch.compile gives up on a function after eight shapes, and is eager from then on."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def needs_cuda(work: Any) -> str:
    return "" if work.device == "cuda" else "needs a CUDA GPU"


def needs_half(work: Any) -> str:
    if work.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16 only, not {work.dtype}".replace("torch.", "")
    return needs_cuda(work)


def compiles_on_cuda(work: Any) -> str:
    return "" if work.device == "cuda" else "torch.compile is measured on CUDA only"


def needs_module(module: str, distributions: Sequence[str], also: Missing = needs_cuda) -> Missing:
    """A check that a library is installed, imports, and takes the work.

    Args:
        module: imported only where one of the distributions is installed.
        distributions: names under which it is published.
        also: a further check.
    """

    def missing(work: Any) -> str:
        if not any(installed_version(name) for name in distributions):
            return f"{distributions[0]} is not installed"
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken extension module raises anything; the row says what
            return f"{module} cannot be imported: {type(error).__name__}: {error}"
        return also(work)

    return missing


def version_of(distributions: Sequence[str]) -> Callable[[], str]:
    return lambda: next((version for name in distributions if (version := installed_version(name))), "")


def choose_providers(providers: Sequence[Provider], names: Sequence[str] | None) -> list[Provider]:
    """The providers of these names, in their order; all of them for None.

    Raises:
        ValueError: an unknown name.
    """
    known = {provider.name: provider for provider in providers}
    for name in names or ():
        if name not in known:
            raise ValueError(f"provider {name!r} is unknown; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(providers)
