"""A server with OpenAI's routes whose answers to chats are written by a test, event by event."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Write = Callable[[bytes], None]
"""Sends bytes of an answer; raises OSError once the client has gone."""
Answer = Callable[[Write], None]


def event(delta: dict[str, Any] | None = None, finish_reason: str | None = None, **further: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return f"data: {json.dumps({'choices': choices, **further})}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def says(*texts: str) -> Answer:
    """An answer of these pieces, and its usage."""

    def answer(write: Write) -> None:
        for text in texts:
            write(event({"content": text}))
        write(event({}, "stop"))
        write(event(usage={"prompt_tokens": 3, "completion_tokens": len(texts)}) + DONE)

    return answer


class ChatServer:
    """`answers` are given in turn, the last again and again; `requests` are the bodies that came.

    A client without the `key` gets the status `refusal`.
    """

    def __init__(self, *answers: Answer, model: str = "scripted", key: str | None = None, refusal: int = 401) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self._model, self._key = model, key
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": owner._model}]} if self._is_known() else None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if not self._is_known():
                    return self._send(refusal, None)
                owner.requests.append(json.loads(body))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                answer = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                with contextlib.suppress(OSError):
                    answer(self._write_chunk)
                    self._write_chunk(b"")

            def _is_known(self) -> bool:
                return owner._key is None or self.headers["authorization"] == f"Bearer {owner._key}"

            def _send(self, status: int, value: Any) -> None:
                body = json.dumps(value or {"error": {"message": "wrong key"}}).encode()
                self.send_response(status if value else refusal)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _write_chunk(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[ChatServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
