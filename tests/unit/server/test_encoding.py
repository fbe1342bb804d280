"""Bodies that a client has compressed, and marks of an encoding within them."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from server.edge.encoding import PIECE_BYTES, GzipReader
from server.errors import BodyError
from tests.unit.server.harness import FakeEngine

CHAT = json.dumps({"messages": [{"role": "user", "content": "hey " * 100}], "max_tokens": 10}).encode()
NATIVE = json.dumps({"inputs": "hey " * 100, "parameters": {"max_new_tokens": 10}}).encode()
BODIES = pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/generate", NATIVE)])


async def post(
    client: httpx.AsyncClient, path: str, content: bytes | AsyncIterator[bytes], encoding: str = "gzip"
) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return await client.post(path, content=content, headers=headers)


async def in_pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@BODIES
@pytest.mark.parametrize("encoding", ["gzip", "GZIP", " x-gzip "])
@pytest.mark.parametrize("level", [0, 9])
async def test_gzip_is_read(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: bytes, encoding: str, level: int
) -> None:
    plain = await post(client, path, body, "identity")
    packed = await post(client, path, gzip.compress(body, level), encoding)
    dripped = await post(client, path, in_pieces(gzip.compress(body, level), 7), encoding)
    assert [plain.status_code, packed.status_code, dripped.status_code] == [200, 200, 200]
    first, *others = [request.prompt_token_ids for request in engine.requests]
    assert others == [first, first]


@BODIES
@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "compress", "gzip, gzip", "gzip, br"])
async def test_another_encoding_is_refused_by_its_name(
    client: httpx.AsyncClient, path: str, body: bytes, encoding: str
) -> None:
    response = await post(client, path, body, encoding)
    assert response.status_code == 415
    assert f"Content-Encoding `{encoding}` is not supported" in response.text


@BODIES
async def test_files_one_after_the_other_are_one_body(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    packed = b"".join(gzip.compress(part) for part in (body[:7], b"", body[7:]))
    assert (await post(client, path, packed)).status_code == 200


@BODIES
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda packed: packed[:-1], "its end is missing"),
        (lambda packed: b"", "its end is missing"),
        (lambda packed: packed + b"x", "its end is missing"),
        (lambda packed: packed + b"no file", "it is no gzip file"),
        (lambda packed: packed + packed[:-1], "its end is missing"),
        (lambda packed: packed[:-8] + bytes(8), "it is no gzip file"),
        (lambda packed: gzip.decompress(packed), "it is no gzip file"),
        (lambda packed: zlib.compress(gzip.decompress(packed)), "it is no gzip file"),
    ],
)
async def test_what_is_no_gzip_file(
    client: httpx.AsyncClient, path: str, body: bytes, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    response = await post(client, path, spoil(gzip.compress(body)))
    assert response.status_code == 400
    assert f"Failed to decompress the request body: {reason}" in response.text


@BODIES
async def test_the_limit_is_of_what_the_body_becomes(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: bytes
) -> None:
    for content in (gzip.compress(body + b" " * 20_000), gzip.compress(bytes(10**8))):
        response = await post(client, path, in_pieces(content, 10_000))
        assert response.status_code == 413
        assert "length limit exceeded" in response.text
    assert not engine.requests


def test_a_bomb_is_taken_in_pieces() -> None:
    pieces = GzipReader().push(gzip.compress(bytes(10**8)))
    assert len(next(pieces)) == PIECE_BYTES
    assert len(next(pieces)) == PIECE_BYTES


async def test_a_file_that_becomes_nothing_has_a_limit_too(client: httpx.AsyncClient) -> None:
    """Empty blocks take room in the file and none in what it becomes."""
    packer = zlib.compressobj(wbits=31)
    empty = b"".join(packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(10_000))
    response = await post(client, "/generate", in_pieces(empty, 5_000))
    assert response.status_code == 413


def test_all_comes_out_whatever_the_pieces() -> None:
    text = bytes(range(256)) * 2_000 + b"x" * 1_000_000
    for size in (1_000, 10**7):
        reader, packed = GzipReader(), gzip.compress(text)
        parts = [packed[start : start + size] for start in range(0, len(packed), size)]
        assert b"".join(piece for part in parts for piece in reader.push(part)) == text
        reader.finish()
    with pytest.raises(BodyError):
        GzipReader().finish()


@BODIES
async def test_a_byte_order_mark_is_no_part_of_the_json(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    assert (await post(client, path, codecs.BOM_UTF8 + body, "identity")).status_code == 200
    assert (await post(client, path, gzip.compress(codecs.BOM_UTF8 + body))).status_code == 200
    assert (await post(client, path, codecs.BOM_UTF8 * 2 + body, "identity")).status_code == 400
    assert (await post(client, path, codecs.BOM_UTF16_LE + body, "identity")).status_code == 400


@BODIES
async def test_tgi_reads_neither(strict_client: httpx.AsyncClient, path: str, body: bytes) -> None:
    for content, encoding in ((gzip.compress(body), "gzip"), (codecs.BOM_UTF8 + body, "identity")):
        response = await post(strict_client, path, content, encoding)
        assert response.status_code == 400
        assert response.text.startswith("Failed to parse the request body as JSON: expected value")
