"""Open a video file and find out where decoding may start without changing a single bit of the result.

Frame n of a file is the n-th frame that a decode from the start gives. To begin later, one must know the number of the
keyframe at which one begins, and that nothing after it depends on anything before it:

- Packets are stored in the order of decoding. A keyframe that resets the decoder separates them: all frames before it
  in the file are also shown before it. So the keyframe in the k-th packet is frame k, whatever the order of B-frames.
- That holds for the intra-only codecs, for VP9 and AV1 keyframes, and for the IDR pictures of H.264 and HEVC. Other
  H.264 and HEVC pictures that a container calls keyframes (open groups of pictures) do not reset the decoder, so the
  packet is looked into.
- The packets are counted in the container's index where it is complete (MP4, MOV, AVI), else by reading the file once
  without decoding it (Matroska, WebM, MPEG-TS).
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from opensora_fast.data.decoding.clips import ClipError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Containers that hold their own pictures. Left out are the many formats of libavformat that read a text file as a list
# of other files or addresses (HLS, concat, DASH, SDP) or as pictures (terminal art, subtitles).
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,ivf,obu,h264,hevc,m4v,"
    "mjpeg,gif,mxf,nut,rm,swf,wtv,yuv4mpegpipe,image2,jpeg_pipe,png_pipe,webp_pipe"
)
MAXIMUM_PIXELS = 1 << 26
"""Of one frame: twice an 8K frame. A damaged header may ask for gigabytes."""

RESETTING_CODECS = frozenset(("h264", "hevc", "vp9", "av1", "mjpeg", "prores", "dnxhd", "ffv1", "png", "huffyuv"))
IDR_TYPES = {"h264": (5,), "hevc": (19, 20)}
PICTURE_TYPES = {"h264": range(1, 6), "hevc": range(0, 32)}


def check_file(path: str) -> None:
    """ClipError if there is no such file, or it is empty, or reading it could wait for ever (a pipe, a device)."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ClipError(f"cannot be opened: {error.strerror}") from None
    except ValueError as error:
        raise ClipError(f"is no path of a file: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ClipError("not a regular file")
    if status.st_size == 0:
        raise ClipError("empty file")


@contextmanager
def open_video(source: str | BinaryIO, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file, or the bytes of one, and choose its video stream.

    Args:
        source: path, or a seekable binary stream.
        threads: of the decoder.

    Raises:
        ClipError: it is not a video. av's own errors (`av.FFmpegError`) pass through.
    """
    import av

    options = {"format_whitelist": CONTAINERS}
    if isinstance(source, str):
        check_file(source)
        options["protocol_whitelist"] = "file"
        source = f"file:{source}"  # else "clip:01.mp4" would name the protocol "clip"
    with av.open(source, options=options, metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ClipError("no video stream in it")
        context = stream.codec_context
        if context is None or not context.name:
            raise ClipError("its codec is unknown")
        if context.width * context.height > MAXIMUM_PIXELS:
            raise ClipError(f"frames of {context.width} x {context.height} pixels are larger than is allowed")
        # "explode": an error in the data is an error, not a frame patched up from its neighbors.
        context.options = {"err_detect": "+explode", "max_pixels": str(MAXIMUM_PIXELS)}
        context.thread_count = threads
        context.thread_type = "AUTO"
        yield container, stream


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The packets of a stream from where the container is, and the empty one that flushes the decoder."""
    # Damaged files may bring up further streams while they are read; after the last packet PyAV trips over those.
    with suppress(IndexError):
        yield from container.demux(stream)


def codec_name(stream: VideoStream) -> str:
    """Name of the format ("av1"), not of the library that decodes it ("libdav1d")."""
    return stream.codec_context.codec.canonical_name


@dataclass(frozen=True)
class Keyframe:
    """A packet at which decoding may begin: its number in the file, the time to seek to, and what identifies it."""

    number: int
    seek_timestamp: int
    decode_timestamp: int | None
    position: int | None
    """Byte position in the file; None where the table came from the container's index, whose positions differ."""


@dataclass(frozen=True)
class PacketTable:
    """The packets of a video stream: how many, and which of them are keyframes."""

    count: int
    keyframes: tuple[Keyframe, ...]

    def last_keyframe(self, frame: int) -> Keyframe | None:
        """The last keyframe at or before a frame, None if it is the first packet or there is none."""
        before = [keyframe for keyframe in self.keyframes if keyframe.number <= frame]
        return before[-1] if before and before[-1].number > 0 else None


def read_packet_table(stream: VideoStream, packets: Iterable[Packet]) -> PacketTable:
    """The packet table of a stream.

    Keyframes are left out where packets are marked to be thrown away (edit lists): their frames are not counted.

    Args:
        stream: as `open_video` gives it.
        packets: all of its packets from the start; used only where the container has no complete index.
    """
    entries = list(stream.index_entries)
    if entries and len(entries) == stream.frames:
        # The index holds decode times and the seek wants presentation times. Their difference is that of the first
        # packet, wherever the stream is regular; where it is not, `packets_from` finds another packet and says so.
        first = next(iter(packets), None)
        if first is None or first.pts is None or first.dts is None or any(entry.is_discard for entry in entries):
            return PacketTable(len(entries), ())
        keyframes = (
            Keyframe(number, entry.timestamp + first.pts - first.dts, entry.timestamp, None)
            for number, entry in enumerate(entries)
            if entry.is_keyframe
        )
        return PacketTable(len(entries), tuple(keyframes))
    count = 0
    exact = True
    found = []
    for packet in packets:
        if packet.size == 0:
            continue
        timestamp = packet.dts if packet.pts is None else packet.pts
        if packet.is_keyframe and timestamp is not None and packet.pos is not None:
            found.append(Keyframe(count, timestamp, packet.dts, packet.pos))
        exact = exact and not packet.is_discard
        count += 1
    return PacketTable(count, tuple(found) if exact else ())


def packets_from(container: InputContainer, stream: VideoStream, keyframe: Keyframe) -> Iterator[Packet] | None:
    """The packets from a keyframe on, or None if decoding cannot begin exactly there."""
    container.seek(keyframe.seek_timestamp, stream=stream, backward=True)
    packets = read_packets(container, stream)
    first = next(packets, None)
    if first is None or not _is_at(first, keyframe) or not _resets_decoder(first, stream):
        return None
    return itertools.chain((first,), packets)


def _is_at(packet: Packet, keyframe: Keyframe) -> bool:
    if keyframe.position is None:
        return packet.dts == keyframe.decode_timestamp
    return packet.pos == keyframe.position


def _resets_decoder(packet: Packet, stream: VideoStream) -> bool:
    codec = codec_name(stream)
    if codec not in IDR_TYPES:
        return codec in RESETTING_CODECS and packet.is_keyframe
    extradata = stream.codec_context.extradata
    for nal_unit in _split_nal_units(bytes(packet), codec, extradata):
        kind = nal_unit & 0x1F if codec == "h264" else nal_unit >> 1 & 0x3F
        if kind in PICTURE_TYPES[codec]:
            return kind in IDR_TYPES[codec]
    return False


def _split_nal_units(data: bytes, codec: str, extradata: bytes | None) -> Iterator[int]:
    """First byte of every NAL unit in a packet, which says what it holds.

    MP4 and Matroska write the length before each unit (the extradata starts with version 1 and says how many bytes the
    length has), other containers the start code 0, 0, 1.
    """
    if extradata and extradata[0] == 1:
        length_byte = 4 if codec == "h264" else 21
        if len(extradata) <= length_byte:
            return
        length_size = (extradata[length_byte] & 3) + 1
        position = 0
        while position + length_size < len(data):
            yield data[position + length_size]
            position += length_size + int.from_bytes(data[position : position + length_size], "big")
        return
    position = data.find(b"\0\0\1")
    while 0 <= position < len(data) - 3:
        yield data[position + 3]
        position = data.find(b"\0\0\1", position + 3)
