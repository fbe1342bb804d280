"""The playground in front of a real engine: its stream comes token by token, and stop gives its blocks back."""

from __future__ import annotations

import time
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.browser.browser import watched_page
from tests.browser.playground import Playground
from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import launched

NUM_TOKENS = 60
MAX_FREEING_S = 2.0


def test_sixty_tokens_are_seen_as_they_come_and_stop_frees_blocks(browser: Browser, tmp_path: Path) -> None:
    with launched(build_demo_model("--small"), tmp_path) as server, watched_page(browser, server.url) as (page, _):
        playground = Playground.open(page)
        playground.show_settings()
        playground.setting("ignore_eos").check()
        playground.setting("max_tokens").fill(str(NUM_TOKENS))
        playground.note_growth()
        answer = playground.chat("Count from 1 to 40.")
        expect(answer).to_contain_text(f"{NUM_TOKENS} tokens")
        growth = playground.growth()
        num_seen = sum(later > earlier for earlier, later in zip(growth, growth[1:], strict=False))
        print(f"{num_seen} growing views of {NUM_TOKENS} tokens")
        assert num_seen > NUM_TOKENS / 3, "a frame may show several tokens, but not all"

        playground.setting("max_tokens").fill("1500")
        playground.note_growth()
        playground.ask("Count from 1 to 400.")
        while len(playground.growth()) < 5:
            page.wait_for_timeout(10)
        assert server.metrics()["pytgi_kv_blocks_used"] > 0
        playground.stop.click()
        stopped = time.perf_counter()
        while server.metrics()["pytgi_kv_blocks_used"] > 0:
            assert time.perf_counter() - stopped < MAX_FREEING_S
            time.sleep(0.02)
        print(f"blocks were free {time.perf_counter() - stopped:.2f} s after stop")
        playground.settled()
        expect(playground.answers.last).to_contain_text("stopped")
