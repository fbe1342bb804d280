"""Whether a client wants a page. Probes and programs ask for `/` as well, and get TGI's answer there."""

from __future__ import annotations

import re

_HTML = frozenset({"text/html", "application/xhtml+xml"})
_MEDIA_RANGE = re.compile(r"(?:\*/\*|[\w!#$&^.+-]+/(?:\*|[\w!#$&^.+-]+))\Z")


def prefers_html(accept: str) -> bool:
    """Whether HTML is among the best of what the header names, and better than just anything.

    A header that no browser writes means no: Java's clients name text/html and then `*`, which is no media range.
    """
    qualities = _qualities_of(accept)
    others = [quality for media, quality in qualities.items() if media not in _HTML]
    html = qualities.get("text/html", 0.0)
    return html > max(0.0, qualities.get("*/*", 0.0)) and html >= max(others, default=0.0)


def _qualities_of(accept: str) -> dict[str, float]:
    """Media range -> quality; empty if the header is malformed."""
    qualities: dict[str, float] = {}
    for item in accept.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        if not _MEDIA_RANGE.match(media):
            return {}
        weights = [text.removeprefix("q=") for text in parameters if text.startswith("q=")]
        try:
            qualities[media] = float(weights[0]) if weights else 1.0
        except ValueError:
            return {}
    return qualities
