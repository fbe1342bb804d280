"""The files of the pages, read once, with the headers that they need. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
PLAYGROUND = "playground.html"
DASHBOARD = "dashboard.html"
STARTING = "starting.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""The content security policy: nothing of other origins, no script or style within the page, nobody's frame."""


@dataclasses.dataclass(frozen=True, slots=True)
class PageFile:
    """A page, or a script or style of one."""

    name: str
    body: bytes

    @property
    def is_page(self) -> bool:
        return self.name.endswith(".html")

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer. Browsers keep the file, and ask each time whether it is still the same."""
        return {
            "content-type": MEDIA_TYPES[Path(self.name).suffix],
            "etag": self.etag,
            "cache-control": "private, no-cache",
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }


@functools.cache
def page_files() -> Mapping[str, PageFile]:
    """Name -> file."""
    return {path.name: PageFile(path.name, path.read_bytes()) for path in sorted(SOURCE.iterdir())}
