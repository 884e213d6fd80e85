"""The few bytes of fragmented MP4 (ISO/IEC 14496-12) needed to append one encoded piece after another.

A fragmented MP4 is a header (`ftyp`, `moov`) followed by any number of fragments (`moof` with the table
of frames, `mdat` with the frames). A file that ends after any fragment is complete and plays. ffmpeg
numbers the fragments of every piece from 1 and times them from 0; `Fragments` puts them in line.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, whole box) of each top-level box in `data`, which must hold whole boxes only."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        if size < 8 or start + size > len(data):
            raise ValueError(f"torn MP4 box {kind!r} of {size} bytes at byte {start} of {len(data)}")
        yield kind, data[start : start + size]
        start += size


def split_piece(data: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Header and fragments, each as (moof, mdat), of one encoded piece."""
    header, fragments, table = b"", [], b""
    for kind, box in boxes(data):
        if kind in (b"ftyp", b"moov"):
            header += box
        elif kind == b"moof":
            table = box
        elif kind == b"mdat":
            fragments.append((table, box))
    return header, fragments


def placed(table: bytes, sequence_number: int, delay: int) -> bytes:
    """The `moof` box with its sequence number set and its decode time moved by `delay` ticks."""
    box = bytearray(table)
    struct.pack_into(">I", box, box.index(b"mfhd") + 8, sequence_number)
    time = box.index(b"tfdt") + 8  # kind (4 bytes), version (1), flags (3), then the time itself
    form = ">Q" if box[time - 4] == 1 else ">I"
    struct.pack_into(form, box, time, struct.unpack_from(form, box, time)[0] + delay)
    return bytes(box)
