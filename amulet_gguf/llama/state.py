"""The saved state of a sequence, as llama.cpp writes it."""

from __future__ import annotations

import struct

from amulet_gguf.errors import EngineError


def fit_streams(data: bytes, n_cells: int, n_streams: int) -> bytes:
    """Return the saved cache of a sequence for a context of another number of sequences.

    After two words of its own, llama.cpp writes the number of streams, then for each the count of its
    cells, which is 0 but for the one that holds the sequence, and the cells behind it. It refuses to
    read another number.
    """
    try:
        (before,) = struct.unpack_from("<I", data, 8)
        start = 12
        while struct.unpack_from("<I", data, start) == (0,):
            start += 4
        end = len(data) - 4 * (before - 1 - (start - 12) // 4)
        is_known = struct.unpack_from("<I", data, start) == (n_cells,) and not any(data[end:])
    except struct.error:
        is_known = False
    if not is_known:
        raise EngineError("the saved cache of the conversation is of an unknown form")
    return data[:8] + struct.pack("<I", n_streams) + data[start:end] + bytes(4 * (n_streams - 1))
