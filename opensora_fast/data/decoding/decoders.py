"""Which decoder serves which file: chosen once, openly, and told to the user."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import av
import torch

from opensora_fast.data.decoding.clips import BadClip, ClipError, ClipRequest, Decoder, UnsupportedClip
from opensora_fast.data.decoding.dali_decoder import CODECS, DaliDecoder, find_obstacle
from opensora_fast.data.decoding.isolated_decoder import IsolatedDecoder
from opensora_fast.data.decoding.pyav_decoder import TIME_LIMIT, PyAVDecoder, count_processors
from opensora_fast.data.decoding.video_index import codec_name, open_video
from opensora_fast.data.reporting import print_line

DECODERS = ("auto", "pyav", "dali")
ISOLATION_FACTOR = 4.0
"""The process around a decoder waits longer than the decoder itself, which knows more about what is slow."""


def build_decoder(
    name: str = "auto",
    *,
    device: str = "cpu",
    threads: int | None = None,
    time_limit: float = TIME_LIMIT,
    report: Callable[[str], None] = print_line,
) -> Decoder:
    """Make a decoder.

    | name   | device "cuda"                                        | device "cpu"                     |
    |--------|------------------------------------------------------|----------------------------------|
    | "auto" | DALI on the GPU, PyAV for what DALI does not support; PyAV for all where DALI cannot | PyAV for all |
    | "dali" | DALI on the GPU; other codecs are bad clips          | DALI for VP8, VP9, MJPEG; others are bad clips |
    | "pyav" | PyAV                                                 | PyAV                             |

    Of its own codecs DALI does not support files that hide frames, are turned when they are shown, or have 2 GiB. On
    the CPU it runs in a process of its own, so that a crash costs one clip; "auto" leaves it out there, as it gives the
    same frames more slowly (`opensora-fast bench --suite loader`).

    Args:
        name: see above.
        device: "cpu" or "cuda", where DALI decodes and, for DALI on the GPU, where clips are.
        threads: of the CPU; by default one for each processor that may be used.
        time_limit: seconds for one clip.
        report: told in a sentence who decodes what.

    Raises:
        ValueError: unknown name or device, or DALI is asked for and missing.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}; got {name!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    on_gpu = device == "cuda" and name != "pyav"
    threads = count_processors() if threads is None else threads
    make_pyav = functools.partial(PyAVDecoder, threads=threads, time_limit=time_limit)
    if name == "dali":
        dali_device = "gpu" if on_gpu else "cpu"
        report(f"decoder: DALI on the {dali_device.upper()} for {', '.join(CODECS[dali_device])}; others are bad clips")
        make_dali = functools.partial(DaliDecoder, dali_device, threads=threads, time_limit=time_limit)
        if on_gpu or find_obstacle("cpu"):
            return make_dali()  # raises if there is an obstacle
        return IsolatedDecoder(make_dali, ISOLATION_FACTOR * time_limit, threads)
    obstacle = find_obstacle("gpu") if on_gpu else ""
    if on_gpu and not obstacle:
        report(f"decoder: DALI on the GPU for {', '.join(CODECS['gpu'])}; PyAV for what it does not support")
        return RoutedDecoder(DaliDecoder("gpu", threads=threads, time_limit=time_limit), make_pyav(), report)
    report(f"decoder: PyAV for all codecs{f' ({obstacle})' if obstacle else ''}")
    return make_pyav()


class RoutedDecoder:
    """DALI for the clips it supports, PyAV for the rest and for images. Both give the same frames.

    Args:
        dali: for the codecs in its `codecs`.
        pyav: for everything else, files that cannot be opened included.
        report: told, once for each codec that occurs, who decodes it, and why where it is PyAV for one of DALI's.
    """

    def __init__(self, dali: DaliDecoder, pyav: PyAVDecoder, report: Callable[[str], None]) -> None:
        self.threads = max(dali.threads, pyav.threads)
        self.dali = dali
        self.pyav = pyav
        self._report = report
        self._told: set[tuple[str, str]] = set()
        self._find_codec = functools.lru_cache(maxsize=1 << 20)(find_codec)

    def decode(self, requests: Sequence[ClipRequest]) -> list[torch.Tensor | BadClip]:
        """See `clips.Decoder`; all clips are on DALI's device."""
        codecs = ["image" if request.is_image else self._find_codec(request.path) for request in requests]
        results: list[torch.Tensor | BadClip] = [None] * len(requests)
        by_dali = [place for place, codec in enumerate(codecs) if codec in self.dali.codecs]
        for place, result in zip(by_dali, self.dali.decode([requests[place] for place in by_dali]), strict=True):
            results[place] = result
        left = [place for place, result in enumerate(results) if result is None or isinstance(result, UnsupportedClip)]
        for place, (codec, result) in enumerate(zip(codecs, results, strict=True)):
            pair = codec, "PyAV" if place in left else "DALI"
            if pair not in self._told:
                why = (
                    f" where DALI cannot: {result.path} {result.reason}" if isinstance(result, UnsupportedClip) else ""
                )
                self._report(f"decoder: {pair[1]} decodes {codec}{why}")
            self._told.add(pair)
        for place, result in zip(left, self.pyav.decode([requests[place] for place in left]), strict=True):
            results[place] = result if isinstance(result, BadClip) else self.dali.place(result)
        return results

    def close(self) -> None:
        self.dali.close()
        self.pyav.close()


def find_codec(path: str) -> str:
    """Name of the video codec of a file, such as "h264"; "unreadable" if it cannot be opened."""
    try:
        with open_video(path) as (_, stream):
            return codec_name(stream)
    except (ClipError, av.FFmpegError, OSError, ValueError):
        return "unreadable"
