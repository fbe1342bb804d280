"""The terminal chat without a terminal: turns, commands, what is kept, and what may reach a screen."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import threading
import unicodedata
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bench.answers import MAX_REFUSAL_CHARACTERS, BrokenAnswerError, refusal_text
from server.bench.connection import Address
from server.terminal.command import answer_once
from server.terminal.commands import COMMANDS, run_command
from server.terminal.conversation import Conversation, read_params, read_tools
from server.terminal.errors import ChatError, RefusedError
from server.terminal.exchange import read_events, stream_events
from server.terminal.keyboard import MAX_HISTORY_BYTES, history_path, open_history
from server.terminal.reply import Reply
from server.terminal.screen import DIM, PLAIN, Screen
from server.terminal.session import Session
from server.terminal.visible import visible
from tests.chat_server import ChatServer, Write, event, says
from tests.hostile_texts import HOSTILE

Event = dict[str, Any]
Script = list[Event | BaseException]
"""The events of an answer; an exception breaks it off."""


def piece(text: str, **further: Any) -> Event:
    return {"choices": [{"delta": {"content": text, **further}}]}


def call(name: str, arguments: str, index: int = 0) -> Event:
    function = {"name": name, "arguments": arguments}
    return {"choices": [{"delta": {"tool_calls": [{"index": index, "id": f"id{index}", "function": function}]}}]}


def end(reason: str) -> Event:
    return {"choices": [{"delta": {}, "finish_reason": reason}]}


class FakeKeyboard:
    """Types `lines` one after the other, then Ctrl-D."""

    def __init__(self, lines: list[str | BaseException]) -> None:
        self._lines = iter(lines)
        self.is_echoing = True

    def message(self) -> str:
        assert self.is_echoing
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def result(self) -> str:
        return self.message()

    @contextlib.contextmanager
    def without_echo(self) -> Iterator[None]:
        self.is_echoing = False
        try:
            yield
        finally:
            self.is_echoing = True


class Talk:
    """A whole chat: what was asked for, what was shown."""

    def __init__(self, lines: list[str | BaseException], *scripts: Script, is_styled: bool = False) -> None:
        self.requests: list[dict[str, Any]] = []
        self.conversation = Conversation("m")
        self._scripts = list(scripts)
        out = io.StringIO()
        Session(self._ask, self.conversation, FakeKeyboard(lines), Screen(out, is_styled=is_styled)).talk()
        self.shown = out.getvalue()

    def _ask(self, request: dict[str, Any]) -> Generator[Event]:
        self.requests.append(json.loads(json.dumps(request)))
        for each in self._scripts.pop(0):
            if isinstance(each, BaseException):
                raise each
            yield each

    @property
    def contents(self) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in self.conversation.messages]


# ---- turns ----


def test_a_conversation_goes_on_with_what_was_said() -> None:
    talk = Talk(["hi", " ", "and?"], [piece("hel"), piece("lo"), end("stop")], [piece("no")])
    assert talk.requests[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    assert len(talk.requests) == 2
    assert talk.shown.startswith("hello\n[2 tokens or more, ")


def test_thoughts_are_dimmed_and_no_part_of_the_conversation() -> None:
    script: Script = [piece("", reasoning_content="two and "), piece("", reasoning="two"), piece("4")]
    talk = Talk(["2+2?"], script, is_styled=True)
    assert talk.shown.startswith(f"{DIM}thinking: {PLAIN}{DIM}two and {PLAIN}{DIM}two{PLAIN}\n4\n{DIM}[")
    assert talk.contents[1] == ("assistant", "4")
    plain = Talk(["2+2?"], script)
    assert plain.shown.startswith("thinking: two and two\n4\n[") and "\x1b" not in plain.shown


def test_the_usage_of_the_server_counts() -> None:
    reply = Reply(sent_at=0.0)
    list(reply.take(piece("a")))
    list(reply.take({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 11}}))
    reply.token_times = [0.25, 2.25]
    assert reply.speed == "11 tokens, 5.0 per second, the first after 0.25 s"


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came() -> None:
    talk = Talk(["count", "go on"], [piece("1, 2"), KeyboardInterrupt()], [piece("3")])
    assert talk.contents == [("user", "count"), ("assistant", "1, 2"), ("user", "go on"), ("assistant", "3")]
    assert "Stopped." in talk.shown


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), ChatError("the server is gone: start it")])
def test_a_message_without_any_answer_is_taken_back(interrupt: BaseException) -> None:
    talk = Talk(["hi", "again"], [piece("", reasoning="hm"), interrupt], [piece("yes")])
    assert talk.contents == [("user", "again"), ("assistant", "yes")]
    assert "arrow up brings it back" in talk.shown
    assert ("error: the server is gone: start it\n" in talk.shown) == isinstance(interrupt, ChatError)


def test_the_commands_that_change_a_refused_request_are_named_in_a_conversation_alone() -> None:
    talk = Talk(["hi"], [RefusedError("status 400: `max_tokens` is no number")])
    assert talk.shown.startswith("error: status 400: `max_tokens` is no number\n/params, /system and /tools show ")
    assert "/params" not in Talk(["hi"], [ChatError("gone")]).shown


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    talk = Talk([KeyboardInterrupt(), "hi"], [piece("yes")])
    assert talk.shown.startswith("Ctrl-D or /quit leaves.\n") and len(talk.contents) == 2


def test_calls_are_shown_and_the_person_answers_them() -> None:
    script: Script = [call("weather", '{"city":'), call("", ' "Bonn"}'), call("clock", "{}", 1), end("tool_calls")]
    talk = Talk(["warm?", "12 C", "noon"], script, [piece("mild")])
    assert 'The model calls weather({"city": "Bonn"})\nThe model calls clock({})\n' in talk.shown
    asked, first, second = talk.requests[1]["messages"][1:]
    assert [each["function"]["arguments"] for each in asked["tool_calls"]] == ['{"city": "Bonn"}', "{}"]
    assert (first, second) == (
        {"role": "tool", "tool_call_id": "id0", "content": "12 C"},
        {"role": "tool", "tool_call_id": "id1", "content": "noon"},
    )
    assert talk.contents[-1] == ("assistant", "mild")


@pytest.mark.parametrize("leaving", [KeyboardInterrupt(), EOFError()])
def test_a_call_that_nobody_answers_takes_the_turn_back(leaving: BaseException) -> None:
    talk = Talk(["a", "b", "12 C", leaving, "c"], [piece("A")], [call("f", "{}"), call("g", "{}", 1)], [piece("C")])
    assert talk.contents == [("user", "a"), ("assistant", "A"), ("user", "c"), ("assistant", "C")]


def test_calls_of_an_answer_that_breaks_off_are_not_asked_for() -> None:
    talk = Talk(["a"], [piece("let me see"), call("f", "{"), ChatError("gone")])
    assert talk.contents == [("user", "a"), ("assistant", "let me see")]
    assert "The model calls" not in talk.shown


def test_an_answer_that_reached_its_limit_says_what_to_do() -> None:
    assert "/params max_tokens=N" in Talk(["a"], [piece("b"), end("length")]).shown


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": "x"},
        {"choices": [7]},
        {"choices": [{"delta": "x"}]},
        {"choices": [{"delta": {"tool_calls": [{"index": "x"}]}}]},
        {"choices": [{"delta": {"tool_calls": [3]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": float("inf")}]}}]},
        {"usage": 3, "choices": []},
        {"usage": {"completion_tokens": "many"}, "choices": []},
        {"error": {"message": "no memory"}},
        {"error": "overloaded", "error_type": "overloaded"},
    ],
)
def test_an_event_that_is_none_of_openais_ends_the_answer_with_a_sentence(odd: Event) -> None:
    talk = Talk(["a"], [piece("so far"), odd, piece("more")])
    assert "so far\n" in talk.shown and "\nerror: " in talk.shown and "Traceback" not in talk.shown
    assert talk.contents[-1] == ("assistant", "so far")


# ---- commands ----


def test_a_slash_of_every_command_is_known_and_told_by_help() -> None:
    told = run_command("/help", Conversation("m"))
    assert list(COMMANDS) == "/system /params /tools /clear /save /help /quit".split()
    assert all(f"{command.usage} " in told for command in COMMANDS.values())
    with pytest.raises(EOFError):
        run_command("/quit ", Conversation("m"))


def test_quit_ends_the_chat() -> None:
    assert Talk(["/quit", "hi"]).requests == []


def test_a_system_prompt_goes_first_and_may_have_lines() -> None:
    conversation = Conversation("m", messages=[{"role": "user", "content": "a"}])
    assert run_command("/system", conversation) == "There is no system prompt."
    run_command("/system Be brief.\nBe kind.", conversation)
    assert conversation.request["messages"][0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert run_command("/system", conversation) == "System prompt: Be brief.\nBe kind."
    run_command("/system none", conversation)
    assert conversation.request["messages"] == [{"role": "user", "content": "a"}]


def test_parameters_go_with_every_request_until_they_are_taken_away() -> None:
    conversation = Conversation("m")
    run_command('/params temperature=0.5  stop=["a b", "c"] reasoning_effort=low', conversation)
    assert conversation.request | {"messages": 0} == {
        "model": "m",
        "messages": 0,
        "temperature": 0.5,
        "stop": ["a b", "c"],
        "reasoning_effort": "low",
    }
    assert run_command("/params temperature=null stop=null", conversation) == 'reasoning_effort="low"'
    run_command("/params none", conversation)
    assert conversation.params == {}


def test_an_unknown_parameter_is_sent_and_a_near_one_named() -> None:
    conversation = Conversation("m")
    assert run_command("/params temprature=1", conversation).startswith(
        "temprature is sent as it is (did you mean temperature?)"
    )
    assert conversation.params == {"temprature": 1}


@pytest.mark.parametrize(
    "text", ["temperature", "temperature 0.7", "=3", "a=1 b", "messages=[]", "stream=false", "-x=1"]
)
def test_what_is_no_parameter_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match="write temperature=0.7|set another"):
        read_params(text)


@settings(max_examples=30)
@given(
    st.dictionaries(st.sampled_from("temperature stop seed".split()), st.text() | st.integers() | st.lists(st.text()))
)
def test_parameters_in_json_are_read_back(params: dict[str, Any]) -> None:
    assert read_params(" ".join(f"{name}={json.dumps(value)}" for name, value in params.items())) == params


def test_tools_come_from_a_file_or_from_the_line(tmp_path: Path) -> None:
    bare = {"name": "weather", "parameters": {"type": "object"}}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([bare, {"type": "function", "function": {"name": "clock"}}]))
    conversation = Conversation("m")
    assert run_command("/tools", conversation) == "The model has no tools."
    assert run_command(f"/tools {path}", conversation) == "The model may call weather, clock."
    assert conversation.request["tools"][0] == {"type": "function", "function": bare}
    assert run_command('/tools {"name": "f"}', conversation) == "The model may call f."
    run_command("/tools none", conversation)
    assert "tools" not in conversation.request


DEEP = "[" * 100_000
"""JSON that nests deeper than Python reads."""


@pytest.mark.parametrize(
    "text", ["x", "[]", "3", "[3]", '{"function": 3}', '[{"name": 3}]', "{}", pytest.param(DEEP, id="deep")]
)
def test_what_is_no_tool_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match="tool"):
        read_tools(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/hlep", "/hlep is no command (did you mean /help?): /help lists them"),
        ("/etc/passwd what is it?", "/etc/passwd is no command: /help lists them, and a space before it"),
        ("/tools /nowhere.json", "/nowhere.json can't be read (No such file or directory): give a file"),
        ("/save", "where to? /save FILE.md"),
        ("/save /nowhere/x.md", "/nowhere/x.md can't be written (No such file or directory): give another place"),
        ("/save ~nobody-has-this-name/x.md", "~nobody-has-this-name/x.md is in nobody's home: give the whole path"),
        ("/tools ~nobody-has-this-name/x.json", "~nobody-has-this-name/x.json is in nobody's home: give the whole"),
        ("/save /tmp/a\0b", "/tmp/a\\x00b can't be written (embedded null byte): give another place"),
        ("/params x", "x is not NAME=VALUE: write temperature=0.7"),
    ],
)
def test_a_command_that_goes_wrong_says_what_to_do(line: str, words: str) -> None:
    talk = Talk([line, "hi"], [piece("yes")])
    assert talk.shown.startswith(f"error: {words}") and len(talk.contents) == 2


def test_a_message_may_begin_with_a_space_and_a_slash() -> None:
    assert Talk([" /etc"], [piece("a")]).contents[0] == ("user", " /etc")


def test_clear_keeps_the_settings() -> None:
    talk = Talk(["/system S", "/params seed=1", "hi", "/clear", "ho"], [piece("a")], [piece("b")])
    assert talk.requests[1] == {
        "model": "m",
        "seed": 1,
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "ho"}],
    }


def test_a_conversation_is_saved_for_reading_and_for_sending_again(tmp_path: Path) -> None:
    for name in ("a.json", "a.md"):
        script: Script = [call("f", '{"x": 1}')]
        talk = Talk(["/system S", "hé", "7", f"/save {tmp_path / name}"], script, [piece("ok\x1b[2J")])
        assert f"Saved to {tmp_path / name}.\n" in talk.shown
    assert json.loads((tmp_path / "a.json").read_text()) == talk.conversation.request
    assert (tmp_path / "a.md").read_text() == (
        "# m\n\n## System prompt\n\nS\n\n## You\n\nhé\n\n## Model\n\n"
        '```json\n{"name": "f", "arguments": "{\\"x\\": 1}"}\n```\n\n## Result\n\n7\n\n## Model\n\nok\\x1b[2J\n'
    )
    with pytest.raises(ChatError, match=r"a\.md exists: give another name"):
        run_command(f"/save {tmp_path / 'a.md'}", talk.conversation)


# ---- history ----


def test_the_history_is_its_owners_alone_and_keeps_its_newer_half(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    path = history_path(environ)
    open_history(environ).store_string("first\nline")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    long = "x" * 10_000
    for _ in range(MAX_HISTORY_BYTES // len(long)):
        open_history(environ).store_string(long)
    open_history(environ).store_string("last\nlines")
    kept = list(open_history(environ).load_history_strings())
    assert path.stat().st_size < MAX_HISTORY_BYTES
    assert kept[0] == "last\nlines" and set(kept[1:]) == {long} and len(kept) > 40


def test_a_folder_that_takes_no_file_takes_nothing_else_from_the_chat(tmp_path: Path) -> None:
    (tmp_path / "pytgi").write_text("")
    history = open_history({"XDG_STATE_HOME": str(tmp_path)})
    history.store_string("a")
    assert list(history.load_history_strings()) == ["a"]
    other = {"XDG_STATE_HOME": str(tmp_path / "other")}
    kept = open_history(other)
    history_path(other).unlink()
    history_path(other).parent.rmdir()
    kept.store_string("lost")  # no error
    history_path(other).mkdir(parents=True)
    assert list(open_history(other).load_history_strings()) == []


def test_a_user_without_a_home_has_a_history_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user whom no file names."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    history = open_history({})
    history.store_string("a")
    assert list(history.load_history_strings()) == ["a"]


def test_a_relative_state_folder_does_not_count() -> None:
    assert history_path({"XDG_STATE_HOME": "here"}) == Path.home() / ".local" / "state" / "pytgi" / "chat_history"


# ---- hostile texts ----


def test_every_kind_of_sequence_is_written_out() -> None:
    assert visible(HOSTILE["title"]) == r"\x1b]0;owned\x07"
    assert visible("a\rb\x9b\u202e\ud800\U000e0041") == r"a\rb\x9b\u202e\ud800\U000e0041"


@pytest.mark.parametrize("harmless", ["a\tb\nc", "né 漢字 😀 👩‍👩‍👧 ❤️", "سلام می‌شود", r"\x1b"])
def test_other_text_stays_as_it_is(harmless: str) -> None:
    assert visible(harmless) == harmless


@given(st.text() | st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_no_text_keeps_anything_that_steers(text: str) -> None:
    shown = visible(text)
    assert {unicodedata.category(each) for each in shown if each not in "\t\n"}.isdisjoint("Cc Cs Zl Zp".split())
    assert {unicodedata.bidirectional(each) for each in shown}.isdisjoint("LRE RLE LRO RLO PDF LRI RLI FSI PDI".split())
    shown.encode()


def steering(shown: str) -> set[str]:
    """What is left beside the screen's own styles, which stand in pairs around what it dims."""
    rest = shown.replace(DIM, "").replace(PLAIN, "")
    return {each for each in rest if visible(each) != each}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("is_styled", [True, False])
def test_a_hostile_text_reaches_the_terminal_raw_on_no_way(text: str, is_styled: bool, tmp_path: Path) -> None:
    ways: list[Script] = [
        [piece(text)],
        [piece(each) for each in text],
        [piece("", reasoning_content=text)],
        [call(f"f{text}", f'{{"x": "{text}"}}')],
        [{"error": text}],
        [ChatError(f"status 500: {text}")],
    ]
    for script in ways:
        shown = Talk(["hi"], script, is_styled=is_styled).shown
        assert not steering(shown)
        assert is_styled or DIM not in shown
        assert visible(text) in shown
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"name": text}]))
    assert not steering(Talk([f"/tools {path}", f"/system {text}", "/system", "/params", f"/x{text}"]).shown)
    piped = io.StringIO()
    answer_once(lambda _: (each for each in [piece(text)]), Conversation("m"), "hi", piped)
    assert not steering(piped.getvalue()) and "\x1b" not in piped.getvalue()


# ---- the wire ----


@pytest.mark.parametrize("end_of_line", [b"\n", b"\r\n"])
def test_events_are_read_as_they_come(end_of_line: bytes) -> None:
    lines = [b": ping", b"", b"event: x", b'data: {"a":', b"data: 1}", b"", b'data:{"b": 2}', b"", b"data: [DONE]", b""]
    read: list[int] = []

    def source() -> Iterator[bytes]:
        for number, line in enumerate([*lines, b"data: more", b""]):
            read.append(number)
            yield line + end_of_line

    events = read_events(source())
    assert next(events) == {"a": 1} and read[-1] == 5
    assert list(events) == [{"b": 2}] and read[-1] == 9


def test_an_answer_may_end_without_done_once_it_said_why() -> None:
    first, last = event({"content": "a"}), event({}, "stop")
    assert len(list(read_events((first + last).splitlines(keepends=True)))) == 2
    with pytest.raises(BrokenAnswerError, match="ended in the middle"):
        list(read_events(first.splitlines(keepends=True)))


@pytest.mark.parametrize("text", ["", "<html>", "data: nonsense", "data: 3", pytest.param(f"data: {DEEP}", id="deep")])
def test_what_has_no_events_is_said_to(text: str) -> None:
    with pytest.raises(BrokenAnswerError):
        list(read_events([text.encode() + b"\n", b"\n"]))


def test_a_refusal_may_be_anything() -> None:
    assert refusal_text(DEEP.encode()) == DEEP[:MAX_REFUSAL_CHARACTERS]
    assert refusal_text(b'{"error": {"message": "no"}}') == "no"


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a..b", f"http://{'a' * 64}.x", "http://x:99999"])
def test_what_is_no_address_is_refused_before_anybody_is_asked(url: str) -> None:
    with pytest.raises(ValueError):
        Address.parse(url)


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    with contextlib.ExitStack() as stack:
        yield lambda *answers, **further: stack.enter_context(ChatServer(*answers, **further).running())


def test_a_request_streams_and_has_the_key(serve: Callable[..., ChatServer]) -> None:
    server = serve(says("a", "b"), key="k")
    events = list(stream_events(Address.parse(f"{server.url}/v1", "k"), {"messages": []}, 5.0))
    assert [each["choices"][0]["delta"].get("content") for each in events[:-1]] == ["a", "b", None]
    assert server.requests == [{"messages": [], "stream": True, "stream_options": {"include_usage": True}}]
    with pytest.raises(
        ChatError, match="status 401: wrong key: start again with its key in --api-key or OPENAI_API_KEY"
    ):
        list(stream_events(Address.parse(server.url), {"messages": []}, 5.0))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_has_the_words_of_the_server_alone(serve: Callable[..., ChatServer], status: int) -> None:
    server = serve(says("a"), key="k", refusal=status)
    with pytest.raises(RefusedError, match=f"status {status}: wrong key$"):
        list(stream_events(Address.parse(server.url), {}, 5.0))


def test_an_answer_that_breaks_off_hangs_or_never_begins_is_told_in_a_sentence(
    serve: Callable[..., ChatServer],
) -> None:
    def breaks_off(write: Write) -> None:
        write(event({"content": "a"}))
        raise ConnectionResetError

    def hangs(write: Write) -> None:
        write(event({"content": "a"}))
        waiting.wait(5)

    waiting = threading.Event()
    server = serve(breaks_off, hangs, lambda write: write(b"data: 3\n\n"))
    sentences = []
    for _ in range(3):
        with pytest.raises(ChatError) as error:
            list(stream_events(Address.parse(server.url), {}, 0.2))
        sentences.append(str(error.value))
    waiting.set()
    broken, hanging, odd = sentences
    assert "broke off the answer" in broken and broken.endswith("try again")
    assert hanging.startswith("no byte came for 0.2 s: ") and "no JSON object: 3" in odd
    with pytest.raises(ChatError, match="can't be reached .Connection refused.: start the server again"):
        list(stream_events(Address.parse("http://127.0.0.1:9"), {}, 0.2))


def test_a_pipe_gets_the_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    script = [piece("", reasoning="hm"), piece("4"), end("length")]
    answer_once(lambda _: (each for each in script), Conversation("m"), "2+2?\n", out)
    assert out.getvalue() == "4\n" and "--params max_tokens=N" in capsys.readouterr().err
    with pytest.raises(ChatError, match="standard input is empty"):
        answer_once(lambda _: (each for each in script), Conversation("m"), " \n", out)
