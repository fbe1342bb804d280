"""The pages for browsers: who gets them, their headers, how they are turned off, and where a start says they are."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.__main__ import ready_lines
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from server.ui.accept import prefers_html
from server.ui.pages import SOURCE, page_files
from tests.unit.server.harness import FakeEngine, client_of, make_config

CHROMIUM = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7"
)
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
FILES = [file.name for file in page_files().values() if not file.is_page]


@pytest.mark.parametrize("accept", [CHROMIUM, FIREFOX, "text/html", "Text/HTML, */*; q=0.01"])
async def test_a_browser_gets_the_playground_at_the_root(client: httpx.AsyncClient, accept: str) -> None:
    response = await client.get("/", headers={"accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == (SOURCE / "playground.html").read_text() == (await client.get("/ui")).text
    asked = await client.head("/", headers={"accept": accept})
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["etag"] == response.headers["etag"]


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "",
        "*/*",
        "application/json",
        "text/html, */*",
        "text/html;q=0.5, application/json",
        "text/html;q=0",
        "text/html;q=much",
        "text/*",
        JAVA,
    ],
)
async def test_anybody_else_gets_tgis_answer(client: httpx.AsyncClient, engine: FakeEngine, accept: str | None) -> None:
    headers = {} if accept is None else {"accept": accept}
    response, health = await client.get("/", headers=headers), await client.get("/health")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers.keys() == health.headers.keys()
    engine.healthy = False
    assert (await client.get("/", headers=headers)).status_code == 503


async def test_a_browsers_post_is_a_prompt(client: httpx.AsyncClient) -> None:
    response = await client.post("/", json={"inputs": "x"}, headers={"accept": CHROMIUM})
    assert response.json() == [{"generated_text": "xHello, world!"}]


async def test_a_page_comes_also_from_a_server_that_cannot_answer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.healthy = False
    assert (await client.get("/", headers={"accept": CHROMIUM})).status_code == 200


async def test_pages_and_files_run_nothing_that_is_not_theirs(client: httpx.AsyncClient) -> None:
    for path in ["/ui", "/dashboard", *(f"/ui/{name}" for name in FILES)]:
        headers = (await client.get(path)).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self'",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }, path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("etags", ["{}", "W/{}", '"other", {}'])
async def test_a_browser_that_has_a_file_is_not_sent_it_again(client: httpx.AsyncClient, etags: str) -> None:
    first = await client.get("/ui/pages.css")
    again = await client.get("/ui/pages.css", headers={"if-none-match": etags.format(first.headers["etag"])})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = await client.get("/ui/pages.css", headers={"if-none-match": '"other"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("name", ["nothing.js", "playground.html", "..%2Fpages.py", "", "a/b"])
async def test_there_are_no_other_files(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/ui/{name}")
    assert (response.status_code, response.content) == (404, b"")


@pytest.mark.parametrize("changes", [{"is_ui_disabled": True}, {"is_strict_tgi": True}], ids=["flag", "strict"])
async def test_without_pages_a_browser_is_like_anybody(
    engine: FakeEngine, model_folder: Path, changes: dict[str, Any]
) -> None:
    app = create_app(engine, make_config(**changes), TextTokenizer.from_folder(str(model_folder), 1))
    async with client_of(app) as client:
        response = await client.get("/", headers={"accept": CHROMIUM})
        assert (response.status_code, response.content) == (200, b"")
        for path in ("/ui", "/ui/pages.css", "/dashboard", "/dashboard/events"):
            assert (await client.get(path)).status_code == 404
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert not [path for path in paths if path.startswith(("/ui", "/dashboard"))]


async def test_the_pages_need_no_key_and_do_not_hold_it(engine: FakeEngine, model_folder: Path) -> None:
    app = create_app(engine, make_config(api_key="s3cret"), TextTokenizer.from_folder(str(model_folder), 1))
    async with client_of(app) as client:
        page = await client.get("/", headers={"accept": CHROMIUM})
        assert page.status_code == 200 and "s3cret" not in page.text
        assert (await client.get("/ui/pages.css")).status_code == 200


def test_the_qualities_of_a_header_decide() -> None:
    assert prefers_html("text/html;q=0.9, application/json;q=0.8, */*;q=0.7")
    assert not prefers_html("text/html;q=0.8, application/json;q=0.9")


@dataclasses.dataclass
class Listener:
    """A socket that is bound, also on hosts without IPv6."""

    family: int
    name: tuple[Any, ...]

    def getsockname(self) -> tuple[Any, ...]:
        return self.name


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "http://localhost:80/"),
        ("::", "http://localhost:80/"),
        ("10.0.0.7", "http://10.0.0.7:80/"),
        ("fd00::7", "http://[fd00::7]:80/"),
    ],
)
def test_a_start_says_where_the_page_is_before_it_says_that_it_is_ready(host: str, address: str) -> None:
    listener: Any = Listener(socket.AF_INET6, (host, 80, 0, 0)) if ":" in host else Listener(socket.AF_INET, (host, 80))
    assert ready_lines(make_config(), listener) == [f"A page for browsers is at {address}", "Connected"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (socket.AF_INET, {"is_ui_disabled": True}),
        (socket.AF_INET, {"is_strict_tgi": True}),
        (socket.AF_INET, {"ready_line": "A replica is ready"}),
        (socket.AF_UNIX, {}),
    ],
)
def test_a_start_names_no_page_where_there_is_none_for_people(family: int, changes: dict[str, Any]) -> None:
    listener: Any = Listener(family, ("0.0.0.0", 80))
    config = make_config(**changes)
    assert ready_lines(config, listener) == [config.ready_line]
