"""Decoding: every decoder on every codec and resolution.

A row's tokens are those the clips become, so its tokens/s stand beside the tokens/s of a training step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora_fast.data.decoding.clips import BadClip, ClipRequest
from opensora_fast.data.decoding.dali_decoder import CODECS as DALI_CODECS
from opensora_fast.data.decoding.dali_decoder import DaliDecoder, find_obstacle
from opensora_fast.data.decoding.pyav_decoder import PyAVDecoder, count_processors, iterate_frames
from opensora_fast.data.decoding.resize import resize_frame

from ..jobs.coded_clips import CODINGS, read_source, write_coded
from ..measuring.case import Case, Outcome, make_template
from ..measuring.provider import version_of
from ..measuring.race import Check, Entry, run_race
from ..measuring.session import Session
from ..measuring.timing import Call, Sampling
from ..shapes import VIDEO_SIZES, Workload
from .scale import Scale

VALUE = 400.0
FRAMES, INTERVAL, SOURCE_FRAMES = 16, 3, 60
# Mean difference from a plain decode of the whole file, in levels of 255: a level or two of color conversion.
LEVELS = 2.0
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
SECONDS = 3.0


def list_cases(scale: Scale) -> list[Case]:
    """All codecs and resolutions on a GPU host; two codecs at the smallest elsewhere."""
    resolutions, codecs, clips = tuple(VIDEO_SIZES), tuple(CODINGS), 16
    if scale.device == "cpu":
        resolutions, codecs, clips = ("144p",), ("h264", "vp9"), 2
    cases = []
    for resolution in resolutions:
        for codec in codecs:
            value = VALUE + 10 * (codec in ("h264", "vp9")) + 5 * (resolution in ("240p", "720p"))
            cases.append(_case(scale, resolution, codec, clips, value))
    return cases


def _case(scale: Scale, resolution: str, codec: str, clips: int, value: float) -> Case:
    workload = Workload(resolution, FRAMES, clips)
    template = make_template(
        "loader",
        workload.name,
        op=codec,
        shape=f"{clips} clips, every third of {FRAMES * INTERVAL} frames, {count_processors()} threads",
        tokens=workload.tokens,
        dtype="float32",
    )
    providers = ("pyav", "dali-cpu", "dali-gpu")

    def measure(session: Session, names: Sequence[str]) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"clip{CODINGS[codec].ending}"
            source = session.shared("source frames", lambda: read_source(SOURCE_FRAMES))
            write_coded(path, source, workload.pixels, CODINGS[codec])
            numbers = tuple(np.linspace(0, FRAMES * INTERVAL - 1, FRAMES, dtype=int).tolist())
            requests = [ClipRequest(row, str(path), numbers, workload.pixels) for row in range(clips)]
            decoders: list = []
            entries = [_entry(name, codec, requests, decoders) for name in names]
            try:
                sampling = Sampling(session.sampling_seconds(min(SECONDS, 4 * scale.seconds)), 10, warm_up=1)
                return run_race(template, entries, sampling, session, clock="cpu")
            finally:
                for decoder in decoders:
                    decoder.close()

    return Case(template, ("decode",), providers, value, measure)


def _entry(name: str, codec: str, requests: Sequence[ClipRequest], decoders: list) -> Entry:
    """`decoders` receives those that are made, for whoever closes them."""
    makers = {
        "pyav": PyAVDecoder,
        "dali-cpu": partial(DaliDecoder, "cpu"),
        "dali-gpu": partial(DaliDecoder, "gpu"),
    }
    version = version_of(("av",) if name == "pyav" else DALI)()

    def prepare() -> tuple[Call, Callable[[], Check]]:
        decoder = makers[name]()
        decoders.append(decoder)
        decoded: list[list[Tensor | BadClip]] = []

        def call() -> None:
            decoded[:] = [decoder.decode(requests)]

        return call, lambda: _compare(decoded[0], requests)

    return Entry(name, version, "decode", prepare, missing=_missing(name, codec))


def _missing(name: str, codec: str) -> str:
    if name == "pyav":
        return ""
    device = name.removeprefix("dali-")
    if obstacle := find_obstacle(device):
        return obstacle
    return "" if codec in DALI_CODECS[device] else f"DALI does not decode {codec} on the {device.upper()}"


def _compare(decoded: Sequence[Tensor | BadClip], requests: Sequence[ClipRequest]) -> Check:
    """Mean difference from a decode of the whole file, frame by frame, in units of the full range."""
    request = requests[0]
    expected = torch.empty(3, len(request.frames), *request.size)
    wanted = {number: place for place, number in enumerate(request.frames)}
    for number, pixels in enumerate(iterate_frames(request.path)):
        if number in wanted:
            resize_frame(pixels, expected[:, wanted[number]])
    worst = 0.0
    for clip in decoded:
        if isinstance(clip, BadClip):
            raise ValueError(f"{clip.path}: {clip.reason}")
        worst = max(worst, (clip.cpu() - expected).abs().mean().item() / 2)
    return Check(worst, LEVELS / 255)
