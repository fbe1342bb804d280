"""Where pytgi runs: a sentence in place of a traceback for anybody else.

Python of any version 3 reads this file and those that import it first, which therefore do without younger syntax.
"""

import sys

MIN_PYTHON = (3, 11)


class UnsupportedHostError(ImportError):
    """The text says what pytgi needs and what is here."""


def check_host(platform: str = sys.platform, version: "tuple[int, ...]" = sys.version_info[:2]) -> None:
    """Raise UnsupportedHostError unless pytgi can run on this platform and this Python."""
    if not platform.startswith("linux"):
        name = {"darwin": "macOS", "win32": "Windows"}.get(platform, platform)
        way = "WSL 2 or a container" if platform == "win32" else "a container"
        raise UnsupportedHostError(f"pytgi runs on Linux only, and this is {name}: use {way}")
    if version < MIN_PYTHON:
        present, required = (".".join(map(str, numbers)) for numbers in (version, MIN_PYTHON))
        raise UnsupportedHostError(f"pytgi needs Python {required} or newer, and this is {present}")
