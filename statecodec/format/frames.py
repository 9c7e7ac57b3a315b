"""zstd frames that state their size: what a frame says of itself is checked before anything is decompressed."""

from __future__ import annotations

import threading

import zstandard

from statecodec.buffers import Bytes
from statecodec.errors import CorruptFile, FormatError
from statecodec.limits import MAX_WINDOW

MAGIC = b"\x28\xb5\x2f\xfd"
_local = threading.local()


def frame_size(frame: Bytes) -> int:
    """The content size that a frame states. Raises FormatError for other data, other windows, a dictionary."""
    if frame[:4].tobytes() != MAGIC:
        raise FormatError("a compressed plane is not a zstd frame")
    try:
        said = zstandard.get_frame_parameters(frame.data)
    except zstandard.ZstdError as error:
        raise CorruptFile(f"a zstd frame cannot be read: {error}") from error
    if said.content_size == zstandard.CONTENTSIZE_UNKNOWN or said.window_size > MAX_WINDOW or said.dict_id:
        raise FormatError(
            f"zstd frame of {said.content_size} bytes, window {said.window_size}; its size must be stated, its window "
            f"be at most {MAX_WINDOW}"
        )
    return int(said.content_size)


def decompress(frame: Bytes, out: Bytes) -> None:
    """One frame into a buffer of exactly its size. Raises FormatError, CorruptFile."""
    size = frame_size(frame)
    if size != out.size:
        raise FormatError(f"zstd frame of {size} bytes; expected {out.size} bytes")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    try:
        with _local.decompressor.stream_reader(frame.data) as stream:
            done, target = 0, out.data
            while done < out.size and (n := stream.readinto(target[done:])):
                done += n
            if done != out.size or stream.read(1):
                raise CorruptFile(f"a zstd frame gives {done} bytes, expected {out.size}")
    except zstandard.ZstdError as error:
        raise CorruptFile(f"a zstd frame cannot be unpacked: {error}") from error
