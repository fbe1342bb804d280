"""Requests that are nearly right: honest ones with a part replaced, whether bytes, values or the head."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":"b"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "c"},
    {"role": "user", "content": "and?"},
]
PARAMETERS: dict[str, Any] = {
    "max_new_tokens": 3,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "stop": ["x"],
    "seed": 1,
    "details": True,
    "top_n_tokens": 2,
    "logit_bias": {"5": 1.0},
    "grammar": {"type": "regex", "value": "[a-z]+"},
}
CHAT: dict[str, Any] = {
    "messages": MESSAGES,
    "max_tokens": 3,
    "tools": [TOOL],
    "tool_choice": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "stop": "x",
    "stream_options": {"include_usage": True},
}
HONEST: dict[str, Any] = {
    "/generate": {"inputs": "hi", "parameters": PARAMETERS},
    "/generate_stream": {"inputs": "hi", "parameters": PARAMETERS},
    "/": {"inputs": "hi", "parameters": PARAMETERS, "stream": False},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": ["hi", "you"], "max_tokens": 3, "n": 2, "echo": True, "logprobs": 1},
    "/invocations": CHAT,
    "/vertex": {"instances": [{"inputs": "hi", "parameters": {"max_new_tokens": 2}}, {"messages": MESSAGES}]},
    "/tokenize": {"inputs": "hi you"},
    "/chat_tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [5, 6, 7]},
}
NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40, 0.0, -0.0, 1e308, 1e-320]
TEXTS = [
    "",
    "x",
    "\u0000",
    "\ud7ff\ue000",
    "\U0001f600",
    "x" * 5_000,
    "5",
    "null",
    "<|im_end|>",
    "{{ 7 }}",
    "{% for %}",
]
SHAPES: list[Any] = [None, True, False, [], {}, [[]], [{}], [None] * 50, {"": None}, {"a": {"a": {"a": []}}}]
VALUES = [*NUMBERS, *TEXTS, *SHAPES]
BYTES = [b"", b"\x00", b"\xff\xfe", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\\ud800", b"1e999", b"-", b"NaN"]


def head(path: str, size: str, extra: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{size}\r\n{extra}\r\n".encode()


def whole(path: str, body: bytes) -> bytes:
    return head(path, f"content-length: {len(body)}") + body


def mutated(chance: random.Random) -> bytes:
    """A whole request."""
    path = chance.choice(list(HONEST))
    kind = chance.randrange(4)
    body: Any = json.loads(json.dumps(HONEST[path]))
    if kind < 2:
        for _ in range(chance.randint(1, 4)):
            body = _with_a_part_replaced(body, chance)
    data = json.dumps(body, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    if kind == 2:
        for _ in range(chance.randint(1, 6)):
            data = _with_bytes_replaced(data, chance)
    request = whole(path, data)
    if kind == 3:
        request = _with_bytes_replaced(head(path, f"content-length: {len(data)}"), chance) + data
    return request


def _with_a_part_replaced(value: Any, chance: random.Random) -> Any:
    """`value` with one of its parts, or itself, replaced, removed or said again under another key."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not keys or chance.random() < 0.1:
        return copy.deepcopy(chance.choice(VALUES))
    key = chance.choice(keys)
    act = chance.random()
    if act < 0.1:
        del value[key]
    elif act < 0.15 and isinstance(value, dict):
        value[chance.choice(["", "stream", "n", "best_of", "type", "content", str(key) * 2])] = copy.deepcopy(
            value[key]
        )
    elif act < 0.2 and isinstance(value, list):
        value *= chance.randint(2, 40)
    else:
        value[key] = _with_a_part_replaced(value[key], chance)
    return value


def _with_bytes_replaced(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    stop = min(len(data), start + chance.choice([0, 1, 1, 2, 30]))
    piece = chance.choice([*BYTES, bytes([chance.randrange(256)]), data[stop : stop + 40]])
    return data[:start] + piece + data[stop:]
