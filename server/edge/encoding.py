"""Bodies that a client has compressed (`Content-Encoding`): gzip is read, anything else refused by its name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from server.errors import BodyError

PIECE_BYTES = 1 << 16
"""Bytes that are decompressed at a time, in a fraction of a millisecond."""
MAX_SHOWN_CHARS = 100
_GZIP = 16 + zlib.MAX_WBITS
"""zlib's number of a stream with gzip's header and checksum."""


class PlainReader:
    """A body that comes as it is."""

    def push(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        """Raises BodyError if something is missing."""


class GzipReader(PlainReader):
    """A body of gzip files, usually one. It becomes pieces, so that whoever counts their bytes can stop in time."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(_GZIP)

    def push(self, data: bytes) -> Iterator[bytes]:
        """Raises BodyError."""
        is_more = bool(data)
        while is_more:
            try:
                piece = self._inflater.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise _broken("it is no gzip file") from None
            yield piece
            data = self._inflater.unconsumed_tail
            is_more = bool(data) or len(piece) == PIECE_BYTES
            if self._inflater.eof and (data := self._inflater.unused_data):
                self._inflater, is_more = zlib.decompressobj(_GZIP), True

    def finish(self) -> None:
        if not self._inflater.eof:
            raise _broken("its end is missing")


def reader_of(content_encoding: str) -> PlainReader:
    """A reader of a body with this header. Raises BodyError."""
    match content_encoding.strip().lower():
        case "" | "identity":
            return PlainReader()
        case "gzip" | "x-gzip":
            return GzipReader()
    shown = content_encoding.strip()[:MAX_SHOWN_CHARS]
    raise BodyError(415, f"Content-Encoding `{shown}` is not supported: send the body with gzip, or as it is")


def _broken(reason: str) -> BodyError:
    return BodyError(400, f"Failed to decompress the request body: {reason}")
