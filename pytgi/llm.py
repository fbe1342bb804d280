"""`LLM`: a model to be called from Python, its engine in a process of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import http.client
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar, Unpack, overload

from pytgi.child import Server
from pytgi.errors import RequestError, ServerDiedError
from pytgi.parameters import ChatParameters, GenerateParameters, check_names
from pytgi.permits import Permits, max_connections
from pytgi.results import ChatPiece, ChatResult, GenerateResult, Token
from pytgi.wire import Calls

Message = Mapping[str, Any]
"""A message as OpenAI has it: `{"role": "user", "content": "Hello"}`."""

Texts = list[str] | tuple[str, ...]
Part = TypeVar("Part")

MAX_AT_ONCE = 256
"""Requests of one batch that are under way together; the engine batches them as it has room."""
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
PROGRESS_S = 0.1
CHAT_ROUTE = "/v1/chat/completions"


class LLM:
    """A model that is served to this process alone.

    Any thread may call it. A call that is interrupted, and a stream that is left, end on the server, too. The server
    ends with `close`, with the `with` block, with this object, and with this process.
    """

    def __init__(self, model: str | os.PathLike[str], *, show_progress: bool | None = None, **options: object) -> None:
        """Start the server and wait until it answers. Raises StartError with the cause from its log.

        `model` is a folder or an id on the Hub. `options` are the launcher's flags with underscores: `quantize="int4"`,
        `num_shard=2`, `max_total_tokens=4096`, `disable_grammar_support=True`. `show_progress` writes the latest line
        of the log to stderr while the server starts; None: if that is a terminal.
        """
        self._server = Server(os.fspath(model), options)
        self._stop = weakref.finalize(self, self._server.stop)
        is_shown = sys.stderr is not None and (sys.stderr.isatty() if show_progress is None else show_progress)
        try:
            with _progress(self._server) if is_shown else contextlib.nullcontext():
                self._server.wait_until_ready()
            limit: int = json.loads(Calls().get(self._server.path, "/info"))["max_concurrent_requests"]
            self._permits = Permits(min(limit, max_connections()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server; running requests have three seconds."""
        self._stop()

    @overload
    def generate(self, prompts: str, **parameters: Unpack[GenerateParameters]) -> GenerateResult: ...
    @overload
    def generate(self, prompts: Texts, **parameters: Unpack[GenerateParameters]) -> list[GenerateResult]: ...
    def generate(
        self, prompts: str | Texts, **parameters: Unpack[GenerateParameters]
    ) -> GenerateResult | list[GenerateResult]:
        """Text for a prompt, or for each prompt of a batch in its order. The parameters are those of /generate.

        Raises RequestError for the first refused or failed request; the others of its batch then end.
        """
        check_names(parameters, GenerateParameters)
        if not isinstance(prompts, (str, list, tuple)):
            raise TypeError(f"generate takes a text or a list of texts, and this is a {type(prompts).__name__}")
        texts = [prompts] if isinstance(prompts, str) else prompts
        bodies = [{"inputs": text, "parameters": {**parameters, "details": True}} for text in texts]
        answers = self._post_all("/generate", bodies, parameters.get("best_of"))
        results = [GenerateResult.from_body(answer) for answer in answers]
        return results[0] if isinstance(prompts, str) else results

    def stream(self, prompt: str, **parameters: Unpack[GenerateParameters]) -> Generator[Token, None, None]:
        """The tokens of a text as they come. Leaving the loop ends the generation.

        A stream that something still refers to ends with its `close()`.
        """
        check_names(parameters, GenerateParameters)
        body = {"inputs": prompt, "parameters": {**parameters, "details": True}}
        return self._stream("/generate_stream", body, Token.from_event)

    @overload
    def chat(self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]) -> ChatResult: ...
    @overload
    def chat(self, messages: Sequence[Sequence[Message]], **parameters: Unpack[ChatParameters]) -> list[ChatResult]: ...
    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **parameters: Unpack[ChatParameters]
    ) -> ChatResult | list[ChatResult]:
        """The assistant's next message in a chat, or in each chat of a batch in its order.

        The parameters are those of /v1/chat/completions: `tools`, `response_format`, `n`... Raises as `generate`.
        """
        check_names(parameters, ChatParameters)
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
            name = type(messages).__name__
            raise TypeError(f"chat takes a list of messages or a list of such lists, and this is a {name}")
        is_single = not messages or isinstance(messages[0], Mapping)
        chats = [messages] if is_single else messages
        answers = self._post_all(CHAT_ROUTE, [{"messages": chat, **parameters} for chat in chats], parameters.get("n"))
        results = [ChatResult.from_body(answer) for answer in answers]
        return results[0] if is_single else results

    def stream_chat(
        self, messages: Sequence[Message], **parameters: Unpack[ChatParameters]
    ) -> Generator[ChatPiece, None, None]:
        """The assistant's next message in parts, as they come. It ends as `stream` does."""
        check_names(parameters, ChatParameters)
        body = {"messages": messages, "stream": True, **parameters}
        return self._stream(CHAT_ROUTE, body, ChatPiece.from_event)

    def _post_all(self, route: str, bodies: Sequence[dict[str, Any]], num_choices: object) -> list[Any]:
        """The answers, in the order of the bodies; `num_choices` sequences come of each, or one if it is no number."""
        self._check_use()
        num_permits = max(1, num_choices) if isinstance(num_choices, int) else 1
        calls = Calls()

        def post(body: dict[str, Any]) -> Any:
            with self._permits.wait(num_permits, lambda: calls.is_broken_off):
                return calls.post(self._server.path, route, body)

        num_at_once = max(1, min(MAX_AT_ONCE, len(bodies)))
        with self._naming_causes(), concurrent.futures.ThreadPoolExecutor(num_at_once, "pytgi") as pool:
            futures = [pool.submit(post, body) for body in bodies]
            try:
                ended, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
                for future in filter(ended.__contains__, futures):
                    future.result()  # raises for the first that failed
                return [future.result() for future in futures]
            except BaseException:  # also the caller's KeyboardInterrupt
                pool.shutdown(wait=False, cancel_futures=True)
                calls.break_off()
                raise

    def _stream(
        self, route: str, body: dict[str, Any], part_of: Callable[[dict[str, Any]], Part]
    ) -> Generator[Part, None, None]:
        self._check_use()

        def parts() -> Generator[Part, None, None]:
            with self._naming_causes(), self._permits.take():
                yield from map(part_of, Calls().stream(self._server.path, route, body))

        return parts()

    def _check_use(self) -> None:
        if os.getpid() != self._server.owner_pid:
            raise RuntimeError("this LLM belongs to the process that this one was forked from: make another one here")
        if not self._stop.alive:
            raise RuntimeError("this LLM is closed")

    @contextlib.contextmanager
    def _naming_causes(self) -> Iterator[None]:
        """Raise ServerDiedError with the cause in place of what a request sees when the server ends."""
        try:
            yield
        except RequestError as error:
            if error.error_type != "generation" or self._is_healthy():
                raise
            raise ServerDiedError(self._server.cause_of_end()) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
                raise
            if not self._stop.alive:
                raise RuntimeError("this LLM was closed while it answered") from error
            raise ServerDiedError(self._server.cause_of_end()) from error

    def _is_healthy(self) -> bool:
        try:
            Calls().get(self._server.path, "/health")
        except (RequestError, OSError, http.client.HTTPException):
            return False
        return True


@contextlib.contextmanager
def _progress(server: Server) -> Iterator[None]:
    """The newest line of the log on one line of the terminal, which is empty again at the end."""
    is_over = threading.Event()

    def show() -> None:
        while not is_over.wait(PROGRESS_S):
            sys.stderr.write(f"\r\033[K{server.log.latest.partition(chr(10))[0][:100]}")
            sys.stderr.flush()
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()

    thread = threading.Thread(target=show, name="pytgi-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
