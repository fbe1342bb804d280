"""What clients may send to stall the others: the attack table. `python -m tests.e2e.attacks PORT [--leave]` runs rows.

A program of its own with a low priority, so that what it needs of a processor is not taken from the server. It reads a
line `NAME SECONDS` from stdin, runs that row and writes a line of JSON: how often each status came. With `--leave` it
does not wait for the answers that are under way at the end: a real engine may need minutes for them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable

from tests.e2e.abuse import KINDS, Abuser
from tests.e2e.mutations import head, mutated, whole

MERSENNE = 2**61 - 1
"""Integers that are equal modulo this number have equal hashes."""
BODY_BYTES = 1_990_000
"""A little less than the server's default `payload_limit`."""
ANSWER_TIMEOUT_S = 60.0
MIN_TIMEOUT_S = 1.0
"""An answer that is not awaited beyond the end has this time at least."""
PLAIN_TOKENS = 500
"""Tokens of a plain sequence: more than come in the time of a row."""
MUTATED_TIMEOUT_S = 2.0
"""A request whose head was mutated may be incomplete: nobody waits for its answer."""
MUTATIONS = random.Random(0)
TEXT = "the quick brown fox jumps, "
GREEDY = '"parameters":{"max_new_tokens":3}'
USER = '{"role":"user","content":"hi"}'

Counts = dict[str, int]


def repeated(item: str, before: str, after: str, *, max_items: int = 10**9, size: int = BODY_BYTES) -> str:
    """A body with as many `item`s between `before` and `after` as fit."""
    count = min(max_items, (size - len(before) - len(after)) // (len(item) + 1))
    return before + ",".join([item] * count) + after


def numbered(make: Callable[[int], str], before: str, after: str, *, max_items: int, size: int = BODY_BYTES) -> str:
    items: list[str] = []
    for index in range(max_items):
        item = make(index)
        size -= len(item.encode()) + 1
        if size < len(before) + len(after):
            break
        items.append(item)
    return before + ",".join(items) + after


def generate(parameters: str, inputs: str = '"hi"') -> str:
    if "max_new_tokens" not in parameters:
        parameters = '"max_new_tokens":3' + (f",{parameters}" if parameters else "")
    return f'{{"inputs":{inputs},"parameters":{{{parameters}}}}}'


def chat(fields: str, messages: str = f"[{USER}]") -> str:
    return f'{{"messages":{messages},"max_tokens":3,{fields}}}'


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


def wide_schema(size: int) -> str:
    return numbered(
        lambda index: f'"k{index}":{{"type":"string"}}',
        '{"type":"object","properties":{',
        "}}",
        max_items=10**6,
        size=size,
    )


def deep_alternatives(size: int) -> str:
    return repeated(nested(200), '{"anyOf":[', "]}", size=size)


LONG_NUMBER_SCHEMA = '{"properties":{"a":{"maximum":' + "7" * 5_000 + "}}}"


def regex(pattern: str) -> str:
    return f'"max_new_tokens":30,"grammar":{{"type":"regex","value":{quoted(pattern)}}}'


def json_schema(schema: dict[str, object]) -> str:
    return f'"max_new_tokens":30,"grammar":{{"type":"json","value":{json.dumps(schema)}}}'


def quoted(text: str) -> str:
    return json.dumps(text)


BODIES: dict[str, tuple[str, Callable[[], str | bytes]]] = {
    # wrong items, a million of them
    "a million wrong messages": ("/v1/chat/completions", lambda: repeated("0", '{"messages":[', "]}")),
    "a million empty messages": ("/v1/chat/completions", lambda: repeated("{}", '{"messages":[', "]}")),
    "messages, the last one wrong": (
        "/v1/chat/completions",
        lambda: repeated(USER, '{"messages":[', ",0]}"),
    ),
    "a million wrong parts": (
        "/v1/chat/completions",
        lambda: repeated("0", '{"messages":[{"role":"user","content":[', "]}]}"),
    ),
    "parts, the last one wrong": (
        "/v1/chat/completions",
        lambda: repeated('{"type":"text","text":""}', '{"messages":[{"role":"user","content":[', ',{"type":"x"}]}]}'),
    ),
    "a million wrong calls": (
        "/v1/chat/completions",
        lambda: repeated("[]", '{"messages":[{"role":"user","tool_calls":[', "]}]}"),
    ),
    "a million wrong prompts": ("/v1/completions", lambda: repeated("null", '{"prompt":[', "]}")),
    "prompts of lists": ("/v1/completions", lambda: repeated("[[]]", '{"prompt":[', "]}")),
    "prompts, mixed": ("/v1/completions", lambda: repeated('"a",1', '{"prompt":[', "]}")),
    "prompts of ids, one wrong": ("/v1/completions", lambda: repeated("1", '{"prompt":[', ',"a"]}')),
    "a million empty prompts": ("/v1/completions", lambda: repeated('""', '{"prompt":[', "]}")),
    "wrong ids to detokenize": ("/detokenize", lambda: repeated("-1", '{"tokens":[', "]}")),
    "words to detokenize": ("/detokenize", lambda: repeated('"a"', '{"tokens":[', "]}")),
    "a million ids to detokenize": ("/detokenize", lambda: repeated("9", '{"tokens":[', "]}")),
    "ids of large tokens": ("/detokenize", lambda: repeated("45000", '{"tokens":[', "]}")),
    "a prompt of ids": ("/v1/completions", lambda: repeated("9", '{"max_tokens":3,"prompt":[', "]}")),
    "wrong instances": ("/vertex", lambda: repeated("0", '{"instances":[', "]}")),
    "empty instances": ("/vertex", lambda: repeated("{}", '{"instances":[', "]}")),
    "prompts as instances": ("/vertex", lambda: repeated('{"inputs":"a"}', '{"instances":[', "]}")),
    "chats as instances": ("/vertex", lambda: repeated(f'{{"messages":[{USER}]}}', '{"instances":[', "]}")),
    "a body of no known shape": ("/invocations", lambda: repeated("0", '{"messages":[', '],"prompt":[0],"inputs":0}')),
    "wrong stop strings": ("/generate", lambda: generate(repeated("0", '"stop":[', "]"))),
    "a million stop strings": ("/generate", lambda: generate(repeated('""', '"stop":[', "]"))),
    "stop strings of a chat": ("/v1/chat/completions", lambda: chat(repeated('""', '"stop":[', "]"))),
    "a long stop string": ("/v1/chat/completions", lambda: chat(f'"stop":{quoted("a" * 1_900_000)}')),
    "wrong tools": ("/v1/chat/completions", lambda: chat(repeated("0", '"tools":[', "]"))),
    "twenty thousand tools": (
        "/v1/chat/completions",
        lambda: chat(
            numbered(
                lambda index: f'{{"type":"function","function":{{"name":"f{index}","parameters":{{}}}}}}',
                '"tool_choice":"required","tools":[',
                "]",
                max_items=20_000,
            )
        ),
    ),
    "a tool that is chosen by a long name": (
        "/v1/chat/completions",
        lambda: chat(f'"tools":[{{"type":"f","function":{{"name":"f"}}}}],"tool_choice":"{"x" * 1_900_000}"'),
    ),
    # maps
    "biases that collide": (
        "/v1/chat/completions",
        lambda: chat(numbered(lambda i: f'"{(i + 1) * MERSENNE}":1', '"logit_bias":{', "}", max_items=71_000)),
    ),
    "native biases that collide": (
        "/generate",
        lambda: generate(numbered(lambda i: f'"{(i + 1) * MERSENNE}":1', '"logit_bias":{', "}", max_items=71_000)),
    ),
    "biases whose low bits collide": (
        "/generate",
        lambda: generate(numbered(lambda i: f'"{i << 17}":1', '"logit_bias":{', "}", max_items=30_000)),
    ),
    "49,000 biases": (
        "/generate",
        lambda: generate(numbered(lambda i: f'"{i}":1', '"max_new_tokens":3,"logit_bias":{', "}", max_items=49_000)),
    ),
    "biases of one token, spelled in many ways": (
        "/generate",
        lambda: generate(numbered(lambda i: f'"{"0" * i}1":1', '"logit_bias":{', "}", max_items=1_900)),
    ),
    "a bias for a token of many digits": (
        "/generate",
        lambda: generate(f'"logit_bias":{{"{"9" * 1_900_000}":1}}'),
    ),
    "a key that comes again and again": ("/generate", lambda: repeated('"inputs":"a"', "{", "}")),
    "a million unknown keys": (
        "/generate",
        lambda: numbered(lambda i: f'"{i}":0', '{"inputs":"hi",' + GREEDY + ",", "}", max_items=10**6),
    ),
    "unknown keys, each twice": (
        "/generate",
        lambda: numbered(lambda i: f'"{i // 2}":0', '{"inputs":"hi",' + GREEDY + ",", "}", max_items=10**6),
    ),
    # numbers
    "an integer of 5,000 digits": ("/generate", lambda: generate(f'"seed":{"7" * 5_000}')),
    "an integer of two million digits": ("/generate", lambda: generate(f'"seed":{"7" * 1_900_000}')),
    "a float of two million digits": ("/generate", lambda: generate(f'"top_p":0.{"7" * 1_900_000}')),
    "an exponent of two million digits": ("/generate", lambda: generate(f'"top_p":1e-{"7" * 1_900_000}')),
    "many long numbers": ("/generate", lambda: repeated("7" * 4_000, '{"inputs":"hi",' + GREEDY + ',"x":[', "]}")),
    "a schema with a long number": (
        "/generate",
        lambda: generate(f'"grammar":{{"type":"json","value":{quoted(LONG_NUMBER_SCHEMA)}}}'),
    ),
    # nesting
    "two million brackets": ("/generate", lambda: "[" * BODY_BYTES),
    "deep lists": ("/generate", lambda: '{"inputs":' + "[" * 900_000 + "]" * 900_000 + "}"),
    "deep objects": ("/generate", lambda: '{"a":' * 300_000),
    "many deep lists": (
        "/generate",
        lambda: repeated("[" * 120 + "]" * 120, '{"inputs":"hi",' + GREEDY + ',"x":[', "]}"),
    ),
    "a million empty lists": ("/generate", lambda: repeated("[]", '{"inputs":"hi",' + GREEDY + ',"x":[', "]}")),
    "a million empty objects": ("/generate", lambda: repeated("{}", '{"inputs":"hi",' + GREEDY + ',"x":[', "]}")),
    "a million null values": ("/generate", lambda: repeated("null", '{"inputs":"hi",' + GREEDY + ',"x":[', "]}")),
    # text
    "a string of escapes": ("/generate", lambda: generate("", '"' + "\\u00e9" * 330_000 + '"')),
    "a string of short escapes": ("/generate", lambda: generate("", '"' + "\\n" * 990_000 + '"')),
    "a string of lone surrogates": ("/generate", lambda: generate("", '"' + "\\ud800" * 330_000 + '"')),
    "many lone surrogates": ("/generate", lambda: repeated('"\\ud800"', '{"inputs":[', "]}")),
    "bytes that are no text": ("/generate", lambda: b'{"inputs":"' + b"\xff" * 1_900_000 + b'"}'),
    "white space": ("/generate", lambda: " " * BODY_BYTES),
    "lines": ("/generate", lambda: "\n" * (BODY_BYTES - 1) + "x"),
    "commas": ("/generate", lambda: "{" + "," * (BODY_BYTES - 1)),
    "quotes": ("/generate", lambda: '{"inputs":[' + '"' * (BODY_BYTES - 20)),
    "backslashes": ("/generate", lambda: '{"inputs":"' + "\\" * (BODY_BYTES - 20)),
    "a million short strings": ("/generate", lambda: repeated('""', '{"inputs":"hi",' + GREEDY + ',"x":[', "]}")),
    "a string that does not end": ("/generate", lambda: '{"inputs":"' + "a" * 1_900_000),
    "an error at the end": ("/generate", lambda: repeated('"a"', '{"inputs":[', "]] }")),
    "wrong type, long text": ("/generate", lambda: generate('"max_new_tokens":"' + "x" * 1_900_000 + '"')),
    "wrong type, large map": (
        "/generate",
        lambda: generate(repeated("0", '"grammar":{"value":1,"type":{"a":[', "]}}")),
    ),
    "a long prompt": ("/generate", lambda: generate('"max_new_tokens":3', quoted("hello wide world " * 110_000))),
    "a long prompt, truncated": (
        "/generate",
        lambda: generate('"max_new_tokens":3,"truncate":8', quoted("hello wide world " * 110_000)),
    ),
    "a long prompt beyond the basic plane": (
        "/generate",
        lambda: generate('"max_new_tokens":3,"truncate":8', '"\U0001f600' + "a b " * 470_000 + '"'),
    ),
    "a long prompt without a space": (
        "/generate",
        lambda: generate('"max_new_tokens":3,"truncate":8', quoted("a" * 1_900_000)),
    ),
    "ten thousand messages": ("/v1/chat/completions", lambda: repeated(USER, '{"messages":[', "]}", max_items=10_000)),
    "as many messages as fit": ("/v1/chat/completions", lambda: repeated(USER, '{"messages":[', "]}")),
    "one message of many parts": (
        "/v1/chat/completions",
        lambda: repeated('{"type":"text","text":"a"}', '{"messages":[{"role":"user","content":[', "]}]}"),
    ),
    "many calls in a message": (
        "/v1/chat/completions",
        lambda: repeated(
            '{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}',
            '{"messages":[{"role":"assistant","tool_calls":[',
            "]}]}",
        ),
    ),
    "stop strings of 400,000 characters that hold the text back": (
        "/v1/completions",
        lambda: (
            '{"prompt":"hi","max_tokens":50,"n":8,"stream":true,"stop":['
            + ",".join('"' + letter + "#" * 400_000 + '"' for letter in ("", "b", "c", "d"))
            + "]}"
        ),
    ),
    "a name of the model of a megabyte, told in each chunk": (
        "/v1/chat/completions",
        lambda: chat('"stream":true,"max_tokens":20,"model":' + quoted("x" * 1_000_000)),
    ),
    "metadata of a megabyte, told three times": (
        "/v1/responses",
        lambda: '{"input":"hi","stream":true,"max_output_tokens":3,"metadata":{"a":"' + "x" * 1_900_000 + '"}}',
    ),
    "twenty thousand places to be left open, with long names": (
        "/generate",
        lambda: generate(
            '"max_new_tokens":1,"grammar":{"type":"json","value":{"type":"object","properties":{"'
            + "\u4e2d" * 20_000
            + '":{"type":"object","properties":{'
            + ",".join(f'"{i}":{{"not":{{"type":"null"}}}}' for i in range(5_000))
            + "}}}}}"
        ),
    ),
    "ten thousand messages in Anthropic's shape": (
        "/v1/messages",
        lambda: repeated(USER, '{"max_tokens":3,"messages":[', "]}", max_items=10_000),
    ),
    "many tools, and as many allowed as fit": (
        "/v1/responses",
        lambda: (
            repeated('{"type":"function","name":"f"}', '{"input":"hi","tools":[', "],", max_items=1_024)
            + repeated('{"name":"g"}', '"tool_choice":{"type":"allowed_tools","tools":[', "]}}", max_items=40_000)
        ),
    ),
    # grammars
    "a deep schema": ("/generate", lambda: generate(f'"grammar":{{"type":"json","value":{nested(50)}}}')),
    "a deep schema as a string": (
        "/generate",
        lambda: generate(f'"grammar":{{"type":"json","value":{quoted(nested(900))}}}'),
    ),
    "many deep schemas in a string": (
        "/generate",
        lambda: generate(f'"grammar":{{"type":"json","value":{quoted(deep_alternatives(1_200_000))}}}'),
    ),
    "a wide schema": ("/generate", lambda: generate(f'"grammar":{{"type":"json","value":{wide_schema(1_900_000)}}}')),
    "a wide schema as a string": (
        "/generate",
        lambda: generate(f'"grammar":{{"type":"json","value":{quoted(wide_schema(1_200_000))}}}'),
    ),
    "a long regex": ("/generate", lambda: generate(f'"grammar":{{"type":"regex","value":{quoted("a?" * 900_000)}}}')),
    "a long literal": ("/generate", lambda: generate(regex(TEXT * 7_500))),
    "a long constant": ("/generate", lambda: generate(json_schema({"const": TEXT * 7_500}))),
    "a large count": ("/generate", lambda: generate(regex("(abc){60000}"))),
    "a large count behind a choice": ("/generate", lambda: generate(regex("[ab](abc){60000}"))),
    "a list that is constant": ("/generate", lambda: generate(json_schema({"const": [1] * 20_000}))),
    "items that are constant": (
        "/generate",
        lambda: generate(json_schema({"type": "array", "items": {"const": 1}, "minItems": 100_000})),
    ),
    "a schema within itself": (
        "/generate",
        lambda: generate(json_schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})),
    ),
    "a tool with a wide schema": (
        "/v1/chat/completions",
        lambda: chat(
            f'"tool_choice":"required","tools":[{{"type":"function","function":{{"name":"f","parameters":'
            f"{wide_schema(1_900_000)}}}}}]"
        ),
    ),
    # much to compute and to answer
    "100 choices with logprobs": (
        "/v1/chat/completions",
        lambda: f'{{"messages":[{USER}],"max_tokens":300,"n":100,"logprobs":true,"top_logprobs":5}}',
    ),
    "100 choices, streamed": (
        "/v1/chat/completions",
        lambda: f'{{"messages":[{USER}],"max_tokens":100,"n":100,"stream":true}}',
    ),
    "100 completions with logprobs": (
        "/v1/completions",
        lambda: '{"prompt":"hi","max_tokens":300,"n":100,"logprobs":5}',
    ),
    "every filter": (
        "/v1/chat/completions",
        lambda: (
            f'{{"messages":[{USER}],"max_tokens":30,"n":31,"temperature":1.1,"top_k":50,"top_p":0.9,"min_p":0.01,'
            '"typical_p":0.9,"repetition_penalty":1.1,"frequency_penalty":0.1,"presence_penalty":0.1}'
        ),
    ),
    "nearly all tokens as candidates": (
        "/v1/completions",
        lambda: (
            '{"prompt":"hi","max_tokens":30,"n":31,"temperature":100,"top_k":40000,"top_p":0.999,"typical_p":0.99,'
            '"repetition_penalty":1.1}'
        ),
    ),
    "49,000 biases and many choices": (
        "/v1/completions",
        lambda: numbered(
            lambda i: f'"{i}":1',
            '{"prompt":"hi","max_tokens":30,"n":31,"repetition_penalty":1.1,"logit_bias":{',
            "}}",
            max_items=49_000,
        ),
    ),
    "the best of many": (
        "/generate",
        lambda: generate('"best_of":100,"do_sample":true,"max_new_tokens":50,"watermark":true,"top_n_tokens":5'),
    ),
    "a text to tokenize": ("/tokenize", lambda: generate("", quoted("a b " * 480_000))),
    "a text of bytes to tokenize": (
        "/tokenize",
        lambda: generate("", quoted("\u00e9 " * 240_000)),
    ),
    "a chat to tokenize": (
        "/chat_tokenize",
        lambda: f'{{"messages":[{{"role":"user","content":{quoted("a b " * 480_000)}}}]}}',
    ),
}
"""Name -> path and body of a request that four clients send again and again."""

Attack = Callable[["Arena"], Awaitable[Counts]]


class Arena:
    """The server under attack and the time that the attack has."""

    def __init__(self, port: int, seconds: float, *, is_awaiting: bool = True) -> None:
        """`is_awaiting`: answers under way at the end of the time are waited for."""
        self.port = port
        self._is_awaiting = is_awaiting
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + seconds

    @property
    def is_over(self) -> bool:
        return self._loop.time() >= self._end

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - self._loop.time())

    async def rest(self) -> None:
        await asyncio.sleep(self.left_s)

    async def open(self, receive_buffer: int | None = None) -> Abuser:
        abuser = Abuser(self.port, random.Random(0))
        await abuser.open(receive_buffer=receive_buffer)
        return abuser

    async def outcome(self, answer: Awaitable[str]) -> str:
        """The status of `answer`; "silence" without one; "unfinished" if it was not waited for to its end."""
        timeout_s = ANSWER_TIMEOUT_S if self._is_awaiting else max(MIN_TIMEOUT_S, self._end - self._loop.time())
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return "silence" if self._is_awaiting else "unfinished"

    async def many(self, count: int) -> list[Abuser]:
        """As many connections as the server takes."""
        opened = [await self.open() for _ in range(count)]
        await asyncio.sleep(0)
        return opened


async def status_of(abuser: Abuser) -> str:
    """The status of an answer that is read to its end, plain or streamed."""
    reader = abuser._reader
    try:
        answer_head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = answer_head.split()[1].decode()
        if b"transfer-encoding: chunked" in answer_head:
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            left = int(answer_head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            while left and (data := await reader.read(min(left, 1 << 16))):
                left -= len(data)
    except (asyncio.IncompleteReadError, ConnectionError, ValueError, IndexError):
        return "none"
    return status


async def send_again_and_again(arena: Arena, data: bytes, num_clients: int = 4) -> Counts:
    counts: Counts = collections.Counter()

    async def client() -> None:
        while not arena.is_over:
            abuser = await arena.open()
            try:
                await abuser.send(data)
                counts[await arena.outcome(status_of(abuser))] += 1
            finally:
                abuser._writer.transport.abort()
            await asyncio.sleep(0.01)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return counts


def body_attack(path: str, make: Callable[[], str | bytes]) -> Attack:
    async def attack(arena: Arena) -> Counts:
        body = make()
        return await send_again_and_again(arena, whole(path, body if isinstance(body, bytes) else body.encode()))

    return attack


def abuse_attack(kind: Callable[[Abuser], Awaitable[str]]) -> Attack:
    """A kind of `tests.e2e.abuse`, 16 at a time."""

    async def attack(arena: Arena) -> Counts:
        counts: Counts = collections.Counter()

        async def client(seed: int) -> None:
            chance = random.Random(seed)
            while not arena.is_over:
                abuser = Abuser(arena.port, chance)
                await abuser.open()
                try:
                    counts[await arena.outcome(kind(abuser))] += 1
                except (ConnectionError, AssertionError) as error:
                    counts[type(error).__name__] += 1
                abuser.close()

        await asyncio.gather(*(client(seed) for seed in range(16)))
        return counts

    return attack


async def _hold(arena: Arena, abusers: list[Abuser]) -> Counts:
    await arena.rest()
    num_closed = sum(abuser._reader.at_eof() or abuser._writer.is_closing() for abuser in abusers)
    for abuser in abusers:
        abuser._writer.transport.abort()
    return {"open": len(abusers) - num_closed, "closed": num_closed}


async def idle_connections(arena: Arena) -> Counts:
    return await _hold(arena, await arena.many(500))


async def idle_after_a_request(arena: Arena) -> Counts:
    abusers = await arena.many(300)
    for abuser in abusers:
        await abuser.send(b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n")
        await status_of(abuser)
    return await _hold(arena, abusers)


async def dripping_heads(arena: Arena) -> Counts:
    return await _drip(arena, await arena.many(500), b"GET /info HTTP/1.1\r\nhost: ", b"x")


async def dripping_bodies(arena: Arena) -> Counts:
    abusers = await arena.many(500)
    return await _drip(arena, abusers, head("/generate", "content-length: 1900000") + b'{"inputs":"', b"x")


async def dripping_chunks(arena: Arena) -> Counts:
    abusers = await arena.many(500)
    return await _drip(arena, abusers, head("/generate", "transfer-encoding: chunked"), b"1\r\n \r\n")


async def _drip(arena: Arena, abusers: list[Abuser], start: bytes, drop: bytes) -> Counts:
    for abuser in abusers:
        await abuser.send(start)
    while not arena.is_over:
        for abuser in abusers:
            await abuser.send(drop)
        await asyncio.sleep(0.2)
    return await _hold(arena, abusers)


async def bodies_that_stop_before_their_end(arena: Arena) -> Counts:
    """Two megabytes in each of 200 connections, but for the last byte."""
    body = generate("", quoted("x" * 1_900_000)).encode()
    abusers = await arena.many(200)
    start = whole("/generate", body)[:-1]

    async def send(abuser: Abuser) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(abuser.send(start), 3)

    await asyncio.gather(*(send(abuser) for abuser in abusers))
    return await _hold(arena, abusers)


async def bodies_at_the_same_time(arena: Arena) -> Counts:
    body = generate('"max_new_tokens":3,"truncate":8', quoted("\U0001f600" + "hello wide world " * 110_000))
    return await send_again_and_again(arena, whole("/generate", body.encode()), 100)


async def bodies_that_are_announced(arena: Arena) -> Counts:
    """They wait for `100 Continue` and send nothing."""
    abusers = await arena.many(300)
    for abuser in abusers:
        await abuser.send(head("/generate", "content-length: 1900000", "expect: 100-continue\r\n"))
    return await _hold(arena, abusers)


async def one_byte_chunks(arena: Arena) -> Counts:
    data = head("/generate", "transfer-encoding: chunked") + b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n"
    return await send_again_and_again(arena, data)


def slow_reader_attack(path: str, body: str | None, num_clients: int, num_requests: int = 1) -> Attack:
    """Clients that ask and hardly read: a byte in 50 ms through the smallest buffer there is."""

    async def attack(arena: Arena) -> Counts:
        get = f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        data = (get if body is None else whole(path, body.encode())) * num_requests
        counts: Counts = collections.Counter()

        async def client() -> None:
            abuser = await arena.open(receive_buffer=1)
            sending = asyncio.create_task(abuser.send(data))
            while not arena.is_over and not abuser._reader.at_eof():
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await asyncio.wait_for(abuser._reader.read(1), 1)
                await asyncio.sleep(0.05)
            counts["closed" if abuser._reader.at_eof() else "open"] += 1
            sending.cancel()
            abuser._writer.transport.abort()

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return counts

    return attack


async def mutated_requests(arena: Arena) -> Counts:
    """Requests that are nearly right; every run of this row has others."""
    counts: Counts = collections.Counter()

    async def client() -> None:
        while not arena.is_over:
            abuser = await arena.open()
            try:
                await abuser.send(mutated(MUTATIONS))
                counts[await asyncio.wait_for(status_of(abuser), MUTATED_TIMEOUT_S)] += 1
            except TimeoutError:
                counts["left"] += 1
            finally:
                abuser._writer.transport.abort()

    await asyncio.gather(*(client() for _ in range(16)))
    return counts


async def overload(arena: Arena) -> Counts:
    """200 clients at a time. The counts have the milliseconds of a usual answer and of the slowest refusals, too."""
    data = whole("/generate", b'{"inputs":"hi","parameters":{"max_new_tokens":50}}')
    seconds: dict[str, list[float]] = collections.defaultdict(list)

    async def client() -> None:
        while not arena.is_over:
            abuser = await arena.open()
            started = time.perf_counter()
            await abuser.send(data)
            seconds[await arena.outcome(status_of(abuser))].append(time.perf_counter() - started)
            abuser._writer.transport.abort()
            await asyncio.sleep(0.2)

    await asyncio.gather(*(client() for _ in range(200)))
    counts = {status: len(values) for status, values in seconds.items()}
    answers, refusals = sorted(seconds["200"]), sorted(seconds["429"])
    counts["answer_ms"] = int(1000 * answers[len(answers) // 2]) if answers else 0
    counts["refusal_ms"] = int(1000 * refusals[len(refusals) * 99 // 100]) if refusals else 0
    return counts


async def pipelined_requests(arena: Arena) -> Counts:
    data = b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n" * 5_000
    return await send_again_and_again(arena, data)


async def pipelined_refusals(arena: Arena) -> Counts:
    return await send_again_and_again(arena, whole("/generate", b"{") * 5_000)


async def large_heads(arena: Arena) -> Counts:
    data = b"GET /info HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n"
    return await send_again_and_again(arena, data)


async def long_paths(arena: Arena) -> Counts:
    return await send_again_and_again(arena, b"GET /v1/models/" + b"%2e" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")


async def connections_without_end(arena: Arena) -> Counts:
    """New connections, each of which is reset at once."""
    num_opened = 0
    while not arena.is_over:
        abuser = await arena.open()
        abuser._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        abuser._writer.transport.abort()
        num_opened += 1
    return {"opened": num_opened}


async def streams_that_are_dropped(arena: Arena) -> Counts:
    """Streams that are left after their first bytes, as many as can be."""
    data = whole("/generate_stream", b'{"inputs":"hi","parameters":{"max_new_tokens":1000}}')
    num_left = 0

    async def client() -> None:
        nonlocal num_left
        while not arena.is_over:
            abuser = await arena.open()
            await abuser.send(data)
            await abuser._reader.read(1)
            abuser.close()
            num_left += 1

    await asyncio.gather(*(client() for _ in range(32)))
    return {"left": num_left}


def grammar_attack(parameters: Callable[[int], str], num_clients: int = 8) -> Attack:
    """Clients that send grammars of a kind, each of them new, and leave when time is up."""

    async def attack(arena: Arena) -> Counts:
        counts: Counts = collections.Counter()
        numbers = itertools.count(MUTATIONS.randrange(10**6) * 1000)

        async def client() -> None:
            while not arena.is_over:
                abuser = await arena.open()
                await abuser.send(whole("/generate", generate(parameters(next(numbers))).encode()))
                try:
                    counts[await asyncio.wait_for(status_of(abuser), arena.left_s + 0.2)] += 1
                except TimeoutError:
                    counts["left"] += 1
                finally:
                    abuser._writer.transport.abort()

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return counts

    return attack


HARD_GRAMMARS: dict[str, Callable[[int], str]] = {
    "new: intersected patterns": lambda number: json_schema(
        {
            "title": str(number),
            "allOf": [{"type": "string", "pattern": f"(.*a{{{count}}}.*b.*){{3}}"} for count in range(30)],
        }
    ),
    "new: multiples of many numbers": lambda number: json_schema(
        {
            "title": str(number),
            "anyOf": [{"type": "integer", "multipleOf": factor} for factor in (101, 103, 107, 109, 113, 127, 131)],
        }
    ),
    "new: a chain of what may be left out": lambda number: regex(".?" * 20_000 + str(number)),
    "new: many letters of any script": lambda number: regex(rf"(\p{{L}}{{1,30}}\p{{N}}{{1,30}}){{1,3000}}{number}"),
    "new: any text before a letter and 2,000 more": lambda number: regex(f"(.|\n)*[a-z](.|\n){{2000}}{number}"),
    "new: 20 pairs of letters": lambda number: regex(
        "|".join(f".*{chr(97 + index)}.*{chr(98 + index)}" for index in range(20)) + str(number)
    ),
    "new: 100 patterns": lambda number: json_schema(
        {"anyOf": [{"type": "string", "pattern": f"^.*{number + index}.*$"} for index in range(100)]}
    ),
    "new: 200 lists that begin alike": lambda number: json_schema(
        {
            "title": str(number),
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {
                    "anyOf": [
                        {"type": "integer"},
                        *({"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": n} for n in range(200)),
                    ]
                }
            },
        }
    ),
    "new: long literals": lambda number: regex(TEXT * 7_500 + str(number)),
}
"""Name -> parameters of a request whose grammar has the number in it."""


TOKENIZED = f'{{"messages":[{{"role":"user","content":{quoted("a b " * 480_000)}}}]}}'

ATTACKS: dict[str, Attack] = {
    **{name: body_attack(*row) for name, row in BODIES.items()},
    **{
        function.__name__.replace("_", " "): function
        for function in (
            idle_connections,
            idle_after_a_request,
            dripping_heads,
            dripping_bodies,
            dripping_chunks,
            bodies_that_stop_before_their_end,
            bodies_at_the_same_time,
            bodies_that_are_announced,
            one_byte_chunks,
            mutated_requests,
            overload,
            pipelined_requests,
            pipelined_refusals,
            large_heads,
            long_paths,
            connections_without_end,
            streams_that_are_dropped,
        )
    },
    **{name: grammar_attack(parameters) for name, parameters in HARD_GRAMMARS.items()},
    "slow readers of a chat's tokens": slow_reader_attack("/chat_tokenize", TOKENIZED, 60),
    "slow readers of a text's tokens": slow_reader_attack("/tokenize", generate("", quoted("a b " * 480_000)), 60),
    "slow readers of a description": slow_reader_attack("/openapi.json", None, 200, 20),
    "slow readers of metrics": slow_reader_attack("/metrics", None, 200, 20),
    "slow readers of streams": slow_reader_attack("/generate_stream", generate('"max_new_tokens":1900'), 60),
    "slow readers of large answers": slow_reader_attack(
        "/generate", generate('"max_new_tokens":1500,"details":true,"top_n_tokens":5'), 60
    ),
    "slow readers of refusals": slow_reader_attack("/generate", generate(f'"stop":"{"x" * 1_900_000}"'), 60),
    **{f"abuse: {kind.__name__.replace('_', ' ')}": abuse_attack(kind) for kind in KINDS},
}
"""Name -> attack."""


def plain_sequences(num_sequences: int, num_prompt_tokens: int) -> str:
    """The name of a row that is no attack: so many plain greedy sequences at a time, by one client each."""
    return f"{num_sequences} plain sequences after {num_prompt_tokens} tokens"


def attack_of(name: str) -> Attack:
    """The row of this name, which may also be one of `plain_sequences`."""
    return ATTACKS.get(name) or _plain_attack(*map(int, re.findall(r"\d+", name)))


def _plain_attack(num_sequences: int, num_prompt_tokens: int) -> Attack:
    async def attack(arena: Arena) -> Counts:
        ids = [300 + index % 40_000 for index in range(num_prompt_tokens)]
        body = f'{{"prompt":{ids},"max_tokens":{PLAIN_TOKENS},"ignore_eos":true}}'
        abusers = await arena.many(num_sequences)
        await asyncio.gather(*(abuser.send(whole("/v1/completions", body.encode())) for abuser in abusers))
        return await _hold(arena, abusers)

    return attack


def main() -> None:
    os.nice(10)
    port, is_awaiting = int(sys.argv[1]), "--leave" not in sys.argv
    for line in sys.stdin:
        name, seconds = line.rsplit(" ", 1)

        async def run(name: str = name, seconds: str = seconds) -> Counts:
            return await attack_of(name)(Arena(port, float(seconds), is_awaiting=is_awaiting))

        print(json.dumps(asyncio.run(run())), flush=True)


if __name__ == "__main__":
    main()
