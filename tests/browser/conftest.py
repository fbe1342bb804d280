"""The fixtures of this folder."""

from tests.browser.fixtures import browser, page, playground, server, shared_server, watch, watched

__all__ = ["browser", "page", "playground", "server", "shared_server", "watch", "watched"]
