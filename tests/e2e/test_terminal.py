"""The terminal chat in a pseudo-terminal, key by key, and in a pipe, against a server whose answers the test writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_server import DONE, ChatServer, Write, event, says
from tests.hostile_texts import HOSTILE

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20
PROMPT = "\x1b[?2004h"
"""What the line editor writes when it begins to read: from here on a pasted text is marked as one."""
ALT_ENTER, UP, CTRL_C, CTRL_D, CTRL_J = "\x1b\r", "\x1b[A", "\x03", "\x04", "\n"
TGI_COMMAND = "from pytgi.commands import text_generation_server; text_generation_server()"


class Terminal:
    """`pytgi chat` with a terminal of its own."""

    def __init__(self, arguments: list[str], environ: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytgi", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal for the terminal's session
        )
        os.close(slave)
        self.unread = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """What came before `text`, which is read with it."""
        end = time.monotonic() + DEADLINE_S
        while text not in self.unread:
            ready, _, _ = select.select([self._master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{text!r} did not come: {self.unread!r}"
            self.unread += os.read(self._master, 65536).decode(errors="replace")
        before, _, self.unread = self.unread.partition(text)
        return before

    @property
    def is_echoing(self) -> bool:
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    @contextlib.contextmanager
    def running(self) -> Iterator[Terminal]:
        try:
            yield self
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._master)


def environment(folder: Path, **further: str) -> dict[str, str]:
    terminal = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **terminal, **further}


def test_a_conversation_at_a_terminal(tmp_path: Path) -> None:
    """Lines, pieces that show as they come, Ctrl-C, pasting, Ctrl-D, and in a second run the history."""
    may_go_on, has_gone = threading.Event(), threading.Event()

    def in_two_pieces(write: Write) -> None:
        write(event({"reasoning_content": "well"}) + event({"content": "first"}))
        assert may_go_on.wait(DEADLINE_S)
        write(event({"content": " second"}) + event({}, "stop") + DONE)

    def endless(write: Write) -> None:
        try:
            while True:
                write(event({"content": "on and "}))
                time.sleep(0.01)
        except OSError:
            has_gone.set()

    server = ChatServer(in_two_pieces, endless, says("fi", "ne"))
    with server.running():
        with Terminal([server.url], environment(tmp_path)).running() as terminal:
            terminal.wait_for(f"scripted at {server.url}: /help lists commands")
            terminal.wait_for(PROMPT)
            terminal.type(f"one{ALT_ENTER}two\\\rthree{CTRL_J}four\r")
            terminal.wait_for("\x1b[2mwell\x1b[0m\r\nfirst")
            assert not terminal.is_echoing
            may_go_on.set()
            terminal.wait_for(" second\r\n")
            terminal.wait_for("per second")
            terminal.wait_for(PROMPT)
            terminal.type("count\r")
            terminal.wait_for("on and on and")
            terminal.type(CTRL_C)
            terminal.wait_for("Stopped.")
            assert has_gone.wait(DEADLINE_S)
            terminal.wait_for(PROMPT)
            terminal.type("\x1b[200~pasted\nlines\x1b[201~\r")
            terminal.wait_for("fine\r\n")
            terminal.wait_for(PROMPT)
            terminal.type(CTRL_D)
            assert terminal.process.wait(DEADLINE_S) == 0 and terminal.is_echoing
        with Terminal([server.url], environment(tmp_path)).running() as terminal:
            terminal.wait_for(PROMPT)
            terminal.type(f"{UP}\r")
            terminal.wait_for("fine\r\n")
            terminal.wait_for(PROMPT)
            terminal.type("/quit\r")
            assert terminal.process.wait(DEADLINE_S) == 0
    said = [(message["role"], message["content"]) for message in server.requests[2]["messages"]]
    (stopped,) = [content for _, content in said if content.startswith("on and ")]
    assert said == [
        ("user", "one\ntwo\nthree\nfour"),
        ("assistant", "first second"),
        ("user", "count"),
        ("assistant", stopped),
        ("user", "pasted\nlines"),
    ]
    assert server.requests[3]["messages"] == [{"role": "user", "content": "pasted\nlines"}]


def test_a_hostile_model_steers_no_terminal_and_a_signal_leaves_it_in_order(tmp_path: Path) -> None:
    """Also by its name, and by the name of a tool."""
    hostile = "".join(HOSTILE.values())
    function = {"name": f"f{hostile}", "arguments": "{}"}

    def calls(write: Write) -> None:
        write(event({"content": f"begin{hostile}end"}))
        write(event({"tool_calls": [{"index": 0, "id": "x", "function": function}]}) + DONE)

    def waits(write: Write) -> None:
        write(event({"content": "waiting"}))
        may_end.wait(DEADLINE_S)

    may_end = threading.Event()
    server = ChatServer(calls, waits, model=f"m{hostile}")
    with server.running(), Terminal([server.url], environment(tmp_path)).running() as terminal:
        assert terminal.wait_for("at http").startswith("\x1b[2mm\\x1b[2J")
        terminal.wait_for(PROMPT)
        terminal.type("hi\r")
        terminal.wait_for("begin")
        assert set(terminal.wait_for("end\r\n")).isdisjoint("\x1b\x07\x08\x9b\u202e")
        terminal.wait_for("The model calls f")
        assert set(terminal.wait_for("({})\r\n")).isdisjoint("\x1b\x07\x08\x9b\u202e")
        terminal.wait_for("result>")
        terminal.type("12 C\r")
        terminal.wait_for("waiting")
        terminal.process.terminate()
        assert terminal.process.wait(DEADLINE_S) == 143 and terminal.is_echoing
        may_end.set()
    assert server.requests[1]["messages"][-1] == {"role": "tool", "tool_call_id": "x", "content": "12 C"}


def run_in_pipe(command: list[str], message: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, *command], input=message, env=environ, capture_output=True, text=True)


def test_a_pipe_is_one_message_and_gets_the_answer_alone() -> None:
    server = ChatServer(says("4", "2"), key="k")
    command = ["-c", TGI_COMMAND, "chat", server.url, "--system", "S", "--params", "temperature=0"]
    with server.running():
        done = run_in_pipe(command, "two\nlines\n", OPENAI_API_KEY="k")
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
        refused = run_in_pipe(command, "x", OPENAI_API_KEY="")
    assert refused.returncode == 1 and refused.stdout == ""
    sentence = "lists no model at /v1/models (status 401: wrong key): give its key with --api-key"
    assert refused.stderr == f"error: {server.url} {sentence}\n"
    assert server.requests[0] == {
        "model": "scripted",
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "two\nlines\n"}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        ("<&-", "error: standard input is empty: pipe a message in, or start it in a terminal\n"),
        ("> /dev/full", "error: the answer can't be written (No space left on device): give it another place\n"),
    ],
)
def test_a_shell_that_gives_no_input_or_no_room_is_told_in_a_sentence(redirection: str, words: str) -> None:
    server = ChatServer(says("42"))
    with server.running():
        command = f"{sys.executable} -m pytgi chat {server.url} {redirection}"
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, shell=True, input="hi", env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)


def test_a_dead_server_is_told_in_a_sentence() -> None:
    done = run_in_pipe(["-m", "pytgi", "chat", "127.0.0.1:9"], "hi")
    words = "error: 127.0.0.1:9 can't be reached: Connection refused (asked for /v1/models): is a server there?\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
