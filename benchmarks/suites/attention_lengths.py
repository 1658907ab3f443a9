"""Attention at one attended length: the case that `profile attention` and the suite of ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..measuring.case import Case, Outcome, make_template
from ..measuring.contest import OP_CALLS, Contest, run_contest
from ..measuring.provider import Provider, choose_providers
from ..measuring.replay import recorder_of
from ..measuring.session import Session
from ..measuring.timing import Sampling
from ..providers.attention import ATTENTION_PROVIDERS, ATTENTION_REFERENCE
from ..providers.attention_work import count_attention, make_attention_work
from ..rows import Row

DEFAULT_LENGTHS = {
    ("spatial", "cuda"): (64, 144, 256, 405, 920, 1590, 2304, 3600, 4096),
    ("temporal", "cuda"): (1, 4, 8, 16, 32, 64, 96, 128, 256, 512),
    ("cross", "cuda"): (1, 20, 77, 120, 200),
    ("spatial", "cpu"): (16, 64, 144),
    ("temporal", "cpu"): (1, 4, 16, 32),
    ("cross", "cpu"): (1, 20, 77),
}
# Heads, head size and tokens: ST-DiT-2 XL/2 with enough tokens to fill a GPU, but no more than 65535 sequences, which
# PyTorch's attention cannot launch; a size that a CPU does in milliseconds.
SIZES = {"cuda": (16, 72, 49152), "cpu": (2, 72, 512)}
# Tokens of the comparison with float64, whose scores are kept in memory: 16 frames of 144, two of 4096.
CHECK_TOKENS = {"cuda": 8192, "cpu": 512}


def length_case(kind: str, length: int, device: str, dtype: torch.dtype, seconds: float, value: float) -> Case:
    """Every provider at one attended length; `seconds` for the samples of each direction."""
    template = _make_template(kind, length, device, dtype)

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        providers = choose_providers(ATTENTION_PROVIDERS, names)
        contest = _make_contest(template, kind, length, device, dtype, providers, session.sampling_seconds(seconds))
        return run_contest(contest, session)

    return Case(template, tuple(OP_CALLS), tuple(provider.name for provider in ATTENTION_PROVIDERS), value, measure)


def _make_contest(
    template: Row,
    kind: str,
    length: int,
    device: str,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    seconds: float,
) -> Contest:
    heads, head_size, tokens = SIZES[device]
    work = make_attention_work(kind, length, device, dtype, tokens, heads, head_size)
    shapes, channels = work.layout.shapes, heads * head_size
    counts = count_attention(kind, shapes, work.text_lengths, channels, dtype.itemsize)
    check_work = make_attention_work(kind, length, device, dtype, CHECK_TOKENS[device], heads, head_size)
    if check_work.layout.num_tokens == work.layout.num_tokens:  # one sequence: the timed inputs themselves
        check_work = None
    return Contest(
        template=template,
        work=work,
        providers=providers,
        references=(ATTENTION_REFERENCE,),
        calls=OP_CALLS,
        counts=dict(zip(OP_CALLS, counts, strict=True)),
        sampling=Sampling(seconds),
        check_work=check_work,
        check_name=f"length {length}, {check_work.layout.num_tokens} tokens" if check_work else "",
        make_recorder=recorder_of(device),
    )


def _make_template(kind: str, length: int, device: str, dtype: torch.dtype) -> Row:
    heads, head_size, tokens = SIZES[device]
    tokens = max(tokens // 2, 1) * 2 if kind == "cross" else max(tokens // length, 1) * length
    return make_template(
        "op",
        f"length {length}",
        op=f"{kind}_attention",
        shape=f"N={tokens} length={length} H={heads} D={head_size}",
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
    )
