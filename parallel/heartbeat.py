"""Signs of life between rank 0 and the others, on a thread of each process: a rank is gone, hangs or says why it ends.

Each sign is a line. An empty one is a beat, `bye` is an orderly end, and anything else is the reason why a rank ends.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from parallel.world import Peer

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BYE = "bye"


class Heartbeat:
    """Beats once a second to every peer, and listens. The first lost rank is reported, once, from the thread.

    Silence is counted in this rank's beats, so that ranks that are paused together don't take each other for hung.
    """

    def __init__(self, peers: Sequence[Peer], timeout_s: float, on_lost: Callable[[str], None]) -> None:
        self._peers = list(peers)
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._silence_s = {peer.rank: 0.0 for peer in peers}
        self._texts = {peer.rank: b"" for peer in peers}
        self._lock = threading.Lock()
        self._is_over = False
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def tell(self, sentence: str) -> None:
        """Tell every peer why this rank ends; from then on silence does not matter."""
        self._end(" ".join(sentence.split()))

    def end(self) -> None:
        """Tell every peer that this rank ends in good order, which is no failure."""
        self._end(BYE)

    def _end(self, line: str) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        for peer in self._peers:
            self._send(peer, line)

    def _send(self, peer: Peer, line: str) -> None:
        with contextlib.suppress(OSError):  # the reading side notices
            peer.heartbeat.send(line.encode() + b"\n", socket.MSG_DONTWAIT)

    def _watch(self) -> None:
        next_beat = time.monotonic()
        while not self._is_over and self._peers:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                for peer in self._peers:
                    self._send(peer, "")
                    self._silence_s[peer.rank] += BEAT_S
            timeout = max(0.0, next_beat - time.monotonic())
            readable, _, _ = select.select([peer.heartbeat for peer in self._peers], [], [], timeout)
            for peer in list(self._peers):
                reason = self._read(peer) if peer.heartbeat in readable else self._check(peer)
                if reason is not None:
                    if not self._is_over:
                        self._on_lost(reason)
                    return

    def _check(self, peer: Peer) -> str | None:
        if self._silence_s[peer.rank] <= self._timeout_s:
            return None
        return f"rank {peer.rank} on {peer.host} hangs: nothing was heard of it for {self._timeout_s:g} s"

    def _read(self, peer: Peer) -> str | None:
        try:
            data = peer.heartbeat.recv(4096)
        except ConnectionResetError:  # the peer left some beats unread
            data = b""
        except OSError as error:
            return f"rank {peer.rank} on {peer.host} can't be reached any more ({error.strerror})"
        if not data:
            return f"rank {peer.rank} on {peer.host} is gone: its own log may say why"
        self._silence_s[peer.rank] = 0.0
        *lines, self._texts[peer.rank] = (self._texts[peer.rank] + data).split(b"\n")
        for line in lines:
            sentence = line.decode(errors="replace")
            if sentence == BYE:
                self._peers.remove(peer)
                return None
            if sentence:
                return sentence
        return None
