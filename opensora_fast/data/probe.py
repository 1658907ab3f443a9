"""Find out frames, size and frame rate of media files, and make a manifest of a folder or of a table of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opensora_fast.data.decoding.clips import IMAGE_EXTENSIONS, ClipError, is_image_path
from opensora_fast.data.decoding.picture_size import is_hidden
from opensora_fast.data.decoding.pyav_decoder import count_processors, describe
from opensora_fast.data.decoding.still_images import check_levels, upright_size
from opensora_fast.data.decoding.turned_videos import read_turn
from opensora_fast.data.decoding.video_index import check_file, codec_name, open_video, read_packets
from opensora_fast.data.decoding.worker_threads import Overdue, WorkerThreads
from opensora_fast.data.manifest import IMAGE_FPS, check_target, read_table, to_text, write_table
from opensora_fast.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .3gp .avi .mkv .webm .mpg .mpeg .ts .mts .m2ts .flv .wmv .ogv .gif".split()
)

Depth = Literal["header", "packets", "frames"]
"""How much of a file is read. header: what the container states. packets: the frames are counted without decoding
them, and the first is decoded. frames: all are decoded. Images are opened (header) or decoded (else)."""

TIME_LIMIT = 120.0
"""Seconds for one file."""
LESS = ": cut long videos into clips, or have less of them read (`data probe --fast`, `data validate` without `--deep`)"
QUEUED_PER_WORKER = 16


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds: frames (1 for an image), sizes in pixels, frames per second, name of the format."""

    num_frames: int
    height: int
    width: int
    fps: float
    codec: str


@dataclass(frozen=True)
class ProbeResult:
    """A manifest table and the files that were left out: (path, reason)."""

    table: pd.DataFrame
    unreadable: list[tuple[str, str]]


def probe_media(path: str | Path, depth: Depth = "packets") -> MediaInfo:
    """Look into a video or image file. ClipError, with the reason, if it cannot be used."""
    path = str(path)
    check_file(path)
    return probe_image(path, depth) if is_image_path(path) else probe_video(path, depth)


def probe_image(path: str, depth: Depth) -> MediaInfo:
    """Look into an image file with Pillow."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            check_levels(image)
            size = upright_size(image)
            if depth != "header":
                image.load()
            return MediaInfo(1, *size, IMAGE_FPS, (image.format or "").lower())
    except Exception as error:  # Pillow's readers let all kinds of exceptions out on damaged files
        raise ClipError(f"cannot be read as an image: {describe(error)}") from None


def probe_video(path: str, depth: Depth) -> MediaInfo:
    """Look into a video file with PyAV."""
    import av

    try:
        with open_video(path) as (container, stream):
            num_frames = _count_frames(container, stream, depth)
            context = stream.codec_context
            rate = stream.average_rate or stream.base_rate
            if num_frames == 0:
                raise ClipError("there is no frame in the video")
            if context.height < 1 or context.width < 1:
                raise ClipError("the file states no frame size")
            if not rate and num_frames > 1:
                raise ClipError("the file states no frame rate")
            sides = (context.height, context.width)
            height, width = reversed(sides) if read_turn(path).swaps_sides else sides
            return MediaInfo(
                num_frames=num_frames,
                height=height,
                width=width,
                fps=float(rate) if rate else IMAGE_FPS,
                codec=codec_name(stream),
            )
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise ClipError(f"cannot be read as a video: {describe(error)}") from None


def _count_frames(container: InputContainer, stream: VideoStream, depth: Depth) -> int:
    if depth == "header" and stream.frames > 0:
        return stream.frames
    if depth == "frames":
        return sum(len(packet.decode()) for packet in read_packets(container, stream))
    count = 0
    decoded = False
    codec = codec_name(stream)
    for packet in read_packets(container, stream):
        if depth == "packets" and not decoded:
            decoded = bool(packet.decode())
        # A packet that is marked for discarding lies outside what an edit list shows; decoders drop its frame. A hidden
        # picture is only a reference for others.
        shown = packet.size > 0 and not packet.is_discard
        count += shown and not (codec == "vp8" and is_hidden(codec, bytes(packet)))
    if depth == "packets" and count > 0 and not decoded:
        raise ClipError("not one frame can be decoded")
    return count


def find_media(folder: str | Path, leave_out: Callable[[Path, str], None] = lambda path, reason: None) -> list[Path]:
    """Video and image files below a folder, by extension, sorted; hidden ones are left out.

    `leave_out` is told of folders that are not searched, with the reason: links, which may lead in a circle, and those
    that this user may not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder" if folder.exists() else f"{folder}: no such file or folder")

    def tell(error: OSError) -> None:
        leave_out(Path(error.filename), f"cannot be searched: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=tell):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                leave_out(path, "a link to a folder is not followed: probe that folder, or link its files")
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
        ]
    return sorted(found)


def read_caption(path: Path) -> str:
    """The caption of a file: the text beside it (clip.txt for clip.mp4), or else the words of its name."""
    sidecar = path.with_suffix(".txt")
    if sidecar.is_file():
        try:
            return " ".join(sidecar.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise ClipError(f"its caption {sidecar.name} is not UTF-8 text") from None
        except OSError as error:
            raise ClipError(f"its caption {sidecar.name} cannot be read: {error.strerror}") from None
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


def probe_folder(
    folder: str | Path, out: str | Path, *, depth: Depth = "packets", workers: int | None = None
) -> ProbeResult:
    """Write a manifest of all videos and images below a folder.

    Paths below the folder of the manifest are written relative to it, so that both can be moved together.

    Args:
        folder: where to look.
        out: the manifest to write, .csv or .parquet.
        depth: how much of every file is read.
        workers: files probed side by side; one per core by default.

    Raises:
        ValueError: no folder, no media in it, no readable file, or a manifest that exists already; then nothing is
            written.
    """
    import pandas as pd

    out = Path(out)
    check_target(out)
    unreadable: list[tuple[str, str]] = []
    paths = find_media(folder, lambda path, reason: unreadable.append((_printable(path), reason)))
    if not paths:
        extensions = ", ".join(sorted(VIDEO_EXTENSIONS | IMAGE_EXTENSIONS))
        raise ValueError(
            f"there is no video or image below {folder} (looked for {extensions}){_list_left_out(unreadable)}"
        )

    home = out.parent.resolve()

    def probe_one(path: Path) -> dict[str, Any]:
        if _printable(path) != str(path):
            raise ClipError("its name is not UTF-8 text, which a manifest cannot hold: rename it")
        measured = _measure(path, depth)
        return {"path": _relative_path(path, home), "text": read_caption(path), **measured}

    rows = _probe_all(probe_one, paths, [_printable(path) for path in paths], unreadable, workers, f"below {folder}")
    table = pd.DataFrame(list(rows.values()))
    write_table(table, out)
    return ProbeResult(table, unreadable)


def probe_table(
    source: str | Path, out: str | Path, *, depth: Depth = "packets", workers: int | None = None
) -> ProbeResult:
    """Write a manifest of the files that a table names, with their frames, sizes and frame rates.

    The other columns stay as they are, captions too. Paths are written as by `probe_folder`.

    Args:
        source: CSV or Parquet file with the columns path and text; a relative path counts from its folder.
        out: the manifest to write, .csv or .parquet.
        depth: how much of every file is read.
        workers: files probed side by side; one per core by default.

    Raises:
        ValueError: the table cannot be read, no file of it can, or the manifest exists already; then nothing is
            written.
    """
    import pandas as pd

    source, out = Path(source), Path(out)
    check_target(out)
    if source.suffix.lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
        raise ValueError(f"{source} is a video or image: give the folder that holds it, or a table that names it")
    table = read_table(source, needed=("path", "text")).reset_index(drop=True)
    names = list(to_text(table["path"]))
    home = out.parent.resolve()
    unreadable: list[tuple[str, str]] = []

    def probe_one(name: str) -> dict[str, Any]:
        if not name:
            raise ClipError("path is empty")
        path = source.parent / name
        return {"path": _relative_path(path, home), **_measure(path, depth)}

    rows = _probe_all(probe_one, names, names, unreadable, workers, f"of {source}")
    table = table.loc[list(rows)].assign(**pd.DataFrame(list(rows.values()), index=list(rows)))
    write_table(table, out)
    return ProbeResult(table, unreadable)


def _measure(path: Path, depth: Depth) -> dict[str, Any]:
    """The columns of a manifest that tell what a file holds."""
    info = probe_media(path, depth)
    sizes = {"num_frames": info.num_frames, "height": info.height, "width": info.width}
    return {**sizes, "fps": round(info.fps, 6), "codec": info.codec}


def _probe_all(
    probe_one: Callable[[Any], dict[str, Any]],
    items: Sequence[Any],
    names: Sequence[str],
    unreadable: list[tuple[str, str]],
    workers: int | None,
    place: str,
) -> dict[int, dict[str, Any]]:
    """Number of the item → its row; an entry in `unreadable` for each that cannot be used. ValueError if none can."""
    rows: dict[int, dict[str, Any]] = {}
    with Progress("probe files", total=len(items), unit="files") as progress:
        for number, result in enumerate(map_files(probe_one, items, workers)):
            if isinstance(result, ClipError):
                unreadable.append((names[number], str(result)))
            else:
                rows[number] = result
            progress.advance(1, unreadable=len(unreadable))
    if not rows:
        raise ValueError(
            f"none of the {len(items)} files {place} can be read; nothing was written{_list_left_out(unreadable)}"
        )
    return rows


def map_files(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int | None = None, time_limit: float = TIME_LIMIT
) -> Iterator[Any]:
    """Results of function(item), computed by threads, in the order of the items.

    In place of a result stands the `ClipError` that the function raised, or one that says it took too long.
    """

    def call(item: Any) -> Any:
        try:
            return function(item)
        except ClipError as error:
            return error

    threads = WorkerThreads(workers or count_processors(), "probe files")
    try:
        step = threads.count * QUEUED_PER_WORKER
        for start in range(0, len(items), step):
            for result in threads.map(call, items[start : start + step], time_limit):
                yield ClipError(f"took longer than {time_limit:g} s{LESS}") if isinstance(result, Overdue) else result
    finally:
        threads.close()


def _list_left_out(unreadable: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {path}: {reason}" for path, reason in unreadable[:10])


def _printable(path: Path) -> str:
    """The path, with \\xff for a byte that is not UTF-8 (Python holds it as half a character, which no file takes)."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _relative_path(path: Path, home: Path) -> str:
    # Of a link the name counts: what it leads to may lack the ending that tells an image from a video.
    absolute = path.parent.resolve() / path.name
    return absolute.relative_to(home).as_posix() if absolute.is_relative_to(home) else str(absolute)
