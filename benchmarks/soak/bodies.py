"""What the clients ask: requests whose answers are known from the first time, requests of their own, and wrong ones."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.soak.wire import Answer

Call = tuple[str, dict[str, Any]]
"""Path and body."""

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The forecast", "parameters": SCHEMA}}
TOPICS = "rivers bridges trains bread clouds chess ferns glass violins lighthouses".split()
REGEX = "[a-z]{3,20}( [a-z]{2,10}){0,4}"
SMALL = {"max_new_tokens": 4}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def repeated_calls() -> list[Call]:
    """Greedy and seeded requests, through every route and with every kind of constraint."""
    greedy = {"max_new_tokens": 24, "details": True}
    seeded = {"max_new_tokens": 24, "details": True, "do_sample": True, "seed": 7, "temperature": 0.9, "top_p": 0.9}
    native = [
        ("/generate", "A short story about rivers:", greedy),
        ("/generate", "def fibonacci(n):", {**greedy, "top_n_tokens": 3, "decoder_input_details": True}),
        ("/generate", "The list of my favourite things:", seeded),
        ("/generate", "A city:", {**greedy, "grammar": {"type": "json", "value": SCHEMA}}),
        ("/generate", "Some words:", {**greedy, "grammar": {"type": "regex", "value": REGEX}}),
        ("/generate", "Once upon a time", {**greedy, "repetition_penalty": 1.2, "watermark": True}),
        ("/generate_stream", "Bridges are", greedy),
        ("/generate_stream", "Lighthouses are", seeded),
    ]
    openai: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "seed": 3}
    return [
        *((path, {"inputs": inputs, "parameters": parameters}) for path, inputs, parameters in native),
        ("/v1/chat/completions", {**openai, "messages": user("Why is the sky blue?"), "logprobs": True}),
        ("/v1/chat/completions", {**openai, "messages": user("Name three ferns."), "stream": True}),
        ("/v1/chat/completions", {**openai, "messages": user("A poem?"), "temperature": 1.0, "n": 2}),
        ("/v1/completions", {**openai, "prompt": "Trains are", "stop": ["\n\n"]}),
    ]


def essence(answer: Answer) -> Any:
    """What has to be the same each time: ids, texts, logprobs, reasons; no names, moments or cached tokens."""
    parts = [answer.json()] if answer.body.startswith(b"{") else answer.events()
    for part in parts:
        if "object" in part:  # of OpenAI's routes; tokens of the native ones have an id that stays
            for name in ("id", "created", "usage"):
                part.pop(name, None)
    return parts


def prompt(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choice(TOPICS) for _ in range(num_words))


def own_chat(chance: random.Random) -> Call:
    body: dict[str, Any] = {
        "messages": user(f"Tell me about {prompt(chance, 3)}."),
        "max_tokens": chance.randint(1, 40),
    }
    if chance.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if chance.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 3, "logit_bias": {"11": -1.5}, "frequency_penalty": 0.4}
    return "/v1/chat/completions", body


def own_tools(chance: random.Random) -> Call:
    body = {
        "messages": user(f"The weather in {prompt(chance, 1)}?"),
        "tools": [TOOL],
        "tool_choice": chance.choice(["auto", "required", {"type": "function", "function": {"name": "weather"}}]),
        "max_tokens": 60,
        "stream": chance.random() < 0.3,
    }
    return "/v1/chat/completions", body


def own_grammar(chance: random.Random) -> Call:
    """A grammar that was not there before, or one that was."""
    low = chance.choice([2, chance.randint(1, 9)])
    grammar = chance.choice(
        [
            {"type": "regex", "value": f"[a-z]{{{low},{low + chance.randint(1, 20)}}}"},
            {"type": "json", "value": {**SCHEMA, "title": prompt(chance, 2)}},
        ]
    )
    parameters = {"max_new_tokens": 32, "do_sample": True, "grammar": grammar}
    return "/generate", {"inputs": f"About {prompt(chance, 1)}:", "parameters": parameters}


def own_completion(chance: random.Random) -> Call:
    body = {
        "prompt": [f"About {prompt(chance, 2)}"] * chance.randint(1, 2),
        "max_tokens": 12,
        "n": chance.randint(1, 3),
    }
    return "/v1/completions", body


def own_best_of(chance: random.Random) -> Call:
    parameters = {"best_of": 2, "max_new_tokens": 12, "do_sample": True, "details": True}
    return "/generate", {"inputs": f"About {prompt(chance, 2)}", "parameters": parameters}


def long_prompt(chance: random.Random, window: int) -> Call:
    """A word has a token or more; what is too long is cut."""
    inputs = prompt(chance, chance.randint(window // 8, window // 2))
    return "/generate", {
        "inputs": inputs,
        "parameters": {"max_new_tokens": chance.randint(1, 4), "truncate": window - 4},
    }


def text_call(chance: random.Random) -> Call:
    calls: list[Call] = [
        ("/tokenize", {"inputs": prompt(chance, 50)}),
        ("/chat_tokenize", {"messages": user(prompt(chance, 20))}),
        ("/detokenize", {"tokens": [chance.randrange(200) for _ in range(20)]}),
    ]
    return chance.choice(calls)


def long_stream(chance: random.Random, num_tokens: int) -> Call:
    """A stream that its end token does not end."""
    parameters = {"max_new_tokens": num_tokens, "ignore_eos": True, "do_sample": True}
    return "/generate_stream", {"inputs": f"A story about {prompt(chance, 2)}", "parameters": parameters}


REFUSALS: list[tuple[str, Any]] = [
    ("/generate", {"inputs": "x", "parameters": {"temperature": -1.0}}),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 0}}),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": "many"}}),
    ("/generate", {"inputs": "", "parameters": SMALL}),
    ("/generate", {"inputs": "x", "parameters": {**SMALL, "grammar": {"type": "regex", "value": "(["}}}),
    ("/generate", {"inputs": "x", "parameters": {**SMALL, "grammar": {"type": "json", "value": 3}}}),
    ("/generate", {"inputs": "x", "parameters": {**SMALL, "truncate": 0}}),
    ("/generate", b"{"),
    ("/v1/chat/completions", {"messages": user("x"), "n": 0}),
    ("/v1/chat/completions", {"messages": user("x"), "temperature": "hot"}),
    ("/v1/completions", {"prompt": 3}),
    ("/nowhere", {}),
    ("/info", {}),
]
"""Wrong requests; each has to be refused."""
PAGES = "/health /info /metrics /v1/models /ping /readyz".split()
