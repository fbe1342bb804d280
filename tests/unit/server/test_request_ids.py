"""`X-Request-Id`: what a client sends comes back and is in the log, unless it could do harm there."""

from __future__ import annotations

import httpx
import pytest

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hey"}]})
COMPLETION = ("/v1/completions", {"prompt": "x", "stream": True})
NATIVE = ("/generate", {"inputs": "x"})
ROUTES = pytest.mark.parametrize(("path", "body"), [CHAT, COMPLETION, NATIVE])
GOOD = ["a", "req_0123456789abcdef", "Root=1-67891233-abcdef012345678912345678", "0" * 128, "a/b:c+d@e.f_g-h="]
BAD = ["", "0" * 129, "a b", 'a"b', "a\tb", "a;b", "é"]


def ids_in(caplog: pytest.LogCaptureFixture) -> list[str | None]:
    lines = [record for record in caplog.records if record.message == "Success"]
    return [vars(record)["span"].get("request_id") for record in lines]


@ROUTES
@pytest.mark.parametrize("request_id", GOOD)
async def test_an_id_comes_back_and_is_logged(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, object], request_id: str
) -> None:
    with caplog.at_level("INFO", "server"):
        response = await client.post(path, json=body, headers={"X-Request-ID": request_id})
    assert (response.status_code, response.headers["x-request-id"]) == (200, request_id)
    assert ids_in(caplog) == [request_id]


@ROUTES
@pytest.mark.parametrize("request_id", BAD)
async def test_an_id_that_could_do_harm_is_none(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, object], request_id: str
) -> None:
    with caplog.at_level("INFO", "server"):
        response = await client.post(path, json=body, headers={b"x-request-id": request_id.encode()})  # type: ignore[dict-item]
    (logged,) = ids_in(caplog)
    assert logged is not None and logged.startswith("req_")
    assert response.headers.get("x-request-id") == (logged if path.startswith("/v1/") else None)


async def test_ids_of_ours_differ_and_are_there_for_refusals_too(client: httpx.AsyncClient) -> None:
    path, body = CHAT
    answers = [await client.post(path, json=body | {"temperature": value}) for value in (1, 1, -1)]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


@ROUTES
async def test_tgi_knows_no_ids(strict_client: httpx.AsyncClient, path: str, body: dict[str, object]) -> None:
    response = await strict_client.post(path, json=body, headers={"x-request-id": "a"})
    assert (response.status_code, response.headers.get("x-request-id")) == (200, None)
