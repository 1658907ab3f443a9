"""Damage clips in many ways and see that a decoder neither crashes nor hangs and lists what it cannot decode.

    python -m opensora_fast.data.fuzz_clips --count 1000 --decoder pyav --out DIR
    python -m opensora_fast.data.fuzz_clips --count 1000 --decoder dali --out DIR

DIR/clips/bad_clips.jsonl lists the clips that were refused. The exit code is 0 only if no clip was missed: one is
missed if it was given out although a plain decoder, which skips over errors, finds fewer frames than were asked for.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensora_fast.data.bad_clips import BadClipLog
from opensora_fast.data.decoding.clips import BadClip, ClipRequest, Decoder, choose_frames, is_image_path
from opensora_fast.data.decoding.decoders import build_decoder
from opensora_fast.data.demo_clips import CARTOON, STREET, Cut, find_source_videos, transcode
from opensora_fast.progress import Progress

KINDS = ("truncated", "bit_flipped", "empty", "wrong_extension", "text", "zero_frames")
HOPELESS = frozenset(("empty", "text", "zero_frames"))
"""Kinds of damage that leave no frame."""

FRAMES_ASKED = 8
SIZE = (144, 256)
CLIPS_AT_A_TIME = 8

SOURCE_CUTS = (
    Cut("rabbit.mp4", CARTOON, "", (0, 48), size=(144, 256)),
    Cut("street.mp4", STREET, "", (137, 185), size=(136, 320)),
    Cut("rabbit.webm", CARTOON, "", (0, 48), size=(144, 256)),
    Cut("street.webm", STREET, "", (137, 185), size=(136, 320)),
    Cut("street.avi", STREET, "", (137, 169), size=(136, 320)),
    Cut("street.png", STREET, "", (137, 138), size=(136, 320)),
)
SOURCE_FRAMES = {cut.name: cut.frames[1] - cut.frames[0] for cut in SOURCE_CUTS}
DALI_SOURCES = (".webm", ".avi", ".png")


@dataclass
class FuzzReport:
    """What became of damaged clips.

    Attributes:
        outcomes: (kind of damage, "decoded" or "listed") -> clips.
        reasons: beginning of the reason -> clips.
        missed: descriptions of clips that should have been listed and were not.
        seconds: of decoding, altogether.
        slowest: seconds of the slowest call for CLIPS_AT_A_TIME clips.
    """

    outcomes: collections.Counter = field(default_factory=collections.Counter)
    reasons: collections.Counter = field(default_factory=collections.Counter)
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0

    def __str__(self) -> str:
        lines = [f"{sum(self.outcomes.values())} clips in {self.seconds:.1f} s, slowest call {self.slowest:.1f} s"]
        for kind in KINDS:
            decoded, listed = self.outcomes[kind, "decoded"], self.outcomes[kind, "listed"]
            lines.append(f"  {kind:16} {listed:5} listed as bad, {decoded:5} still decodable")
        lines += [f"  {count:5} x {reason}" for reason, count in self.reasons.most_common(12)]
        return "\n".join([*lines, f"{len(self.missed)} missed", *self.missed])


def write_sources(folder: Path) -> list[Path]:
    """Small good clips in H.264, VP9 and MJPEG and an image, from real videos. ValueError if those are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in find_source_videos().items():
        transcode(source, [cut for cut in SOURCE_CUTS if cut.source == name], folder, on_file=lambda: None)
    return [folder / cut.name for cut in SOURCE_CUTS]


def damage(kind: str, source: Path, rng: np.random.Generator) -> tuple[bytes, str]:
    """A damaged copy of a file: its content and its ending."""
    content = bytearray(source.read_bytes())
    if kind == "truncated":
        return bytes(content[: rng.integers(1, len(content))]), source.suffix
    if kind == "bit_flipped":
        # Half of them in the headers, where most of the harm is done.
        end = len(content) if rng.random() < 0.5 else min(len(content), 2000)
        for place in rng.integers(0, end, rng.integers(1, 40)):
            content[place] ^= 1 << int(rng.integers(0, 8))
        return bytes(content), source.suffix
    if kind == "empty":
        return b"", source.suffix
    if kind == "wrong_extension":
        others = [suffix for suffix in (".mp4", ".webm", ".avi", ".mkv", ".png", ".jpg") if suffix != source.suffix]
        return bytes(content), str(rng.choice(others))
    if kind == "text":
        lines = "Not a video.\n" * int(rng.integers(1, 200))
        texts = (lines, "#EXTM3U\nother.mp4\n", "ffconcat version 1.0\nfile other.mp4\n")
        return str(rng.choice(texts)).encode(), source.suffix
    if kind == "zero_frames":
        return make_container_without_frames(source.suffix), source.suffix
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def make_container_without_frames(suffix: str) -> bytes:
    """A well-formed file with a video stream in it and no frame. For images, only their first bytes."""
    import io

    import av

    formats = {".mp4": ("mp4", "libx264"), ".webm": ("webm", "libvpx-vp9"), ".avi": ("avi", "mjpeg")}
    if suffix not in formats:
        return b"\x89PNG\r\n\x1a\n"
    name, codec = formats[suffix]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = 144, 256
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        container.start_encoding()
    return buffer.getvalue()


def fuzz(decoder: Decoder, sources: Sequence[Path], count: int, folder: Path, seed: int = 0) -> FuzzReport:
    """Decode `count` damaged copies of good clips; FOLDER/bad_clips.jsonl lists those that were refused."""
    rng = np.random.default_rng(seed)
    report = FuzzReport()
    log = BadClipLog(folder / "bad_clips.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("decode damaged clips", total=count, unit="clips") as progress:
        for start in range(0, count, CLIPS_AT_A_TIME):
            rows = range(start, min(count, start + CLIPS_AT_A_TIME))
            kinds = [KINDS[row % len(KINDS)] for row in rows]
            requests = []
            for row, kind in zip(rows, kinds, strict=True):
                source = sources[row // len(KINDS) % len(sources)]
                content, suffix = damage(kind, source, rng)
                path = folder / f"{row:04d}_{kind}{suffix}"
                path.write_bytes(content)
                requests.append(_make_request(row, path, source, rng))
            began = time.perf_counter()
            results = decoder.decode(requests)
            seconds = time.perf_counter() - began
            report.seconds += seconds
            report.slowest = max(report.slowest, seconds)
            for kind, request, result in zip(kinds, requests, results, strict=True):
                _judge(report, log, kind, request, result)
            progress.advance(len(rows), listed=log.count)
    return report


def _make_request(row: int, path: Path, source: Path, rng: np.random.Generator) -> ClipRequest:
    total = SOURCE_FRAMES[source.name]
    frames = (0,) if total == 1 else choose_frames(total, FRAMES_ASKED, 2, rng)
    return ClipRequest(row, str(path), frames, SIZE)


def _judge(report: FuzzReport, log: BadClipLog, kind: str, request: ClipRequest, result: object) -> None:
    if isinstance(result, BadClip):
        log.add(result, epoch=0, micro_batch=request.row // CLIPS_AT_A_TIME)
        report.outcomes[kind, "listed"] += 1
        report.reasons["".join(letter for letter in result.reason[:60] if not letter.isdigit())] += 1
        Path(request.path).unlink()
        return
    report.outcomes[kind, "decoded"] += 1
    found = 0 if kind in HOPELESS else count_decodable_frames(request.path)
    if found < len(request.frames):
        report.missed.append(f"{request.path}: {found} frames can be decoded, {len(request.frames)} were given out")
    else:
        Path(request.path).unlink()


def count_decodable_frames(path: str) -> int:
    """Frames that PyAV (or, for images, Pillow) decodes when errors are skipped over."""
    import av
    from PIL import Image

    count = 0
    try:
        if is_image_path(path):
            with Image.open(path) as image:
                image.load()
            return 1
        with av.open(path) as container:
            for packet in container.demux(video=0):
                try:
                    count += len(packet.decode())
                except av.FFmpegError:
                    continue
    except (av.FFmpegError, OSError, SyntaxError, ValueError, IndexError):
        return count
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz_clips", description="Decode damaged clips.")
    parser.add_argument("--count", type=int, default=1000, help="damaged clips")
    parser.add_argument("--decoder", choices=("pyav", "dali"), default="pyav")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where DALI decodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for one clip")
    parser.add_argument("--out", type=Path, required=True, help="folder for clips and bad_clips.jsonl")
    options = parser.parse_args(arguments)
    sources = write_sources(options.out / "sources")
    if options.decoder == "dali":
        sources = [path for path in sources if path.suffix in DALI_SOURCES or options.device == "cuda"]
    decoder = build_decoder(options.decoder, device=options.device, time_limit=options.time_limit)
    try:
        report = fuzz(decoder, sources, options.count, options.out / "clips", options.seed)
    finally:
        decoder.close()
    print(report)
    print(f"processes lost to crashes or hangs: {getattr(decoder, 'restarts', 0)}")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
