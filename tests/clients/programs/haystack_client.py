"""Haystack's generator and agent."""

from __future__ import annotations

from typing import Any

from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def generator(**changes: Any) -> OpenAIChatGenerator:
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, **changes.pop("settings", {})}
    return OpenAIChatGenerator(
        api_key=Secret.from_token("-"),
        model="tgi",
        api_base_url=f"{URL}/v1",
        generation_kwargs=settings,
        max_retries=0,
        **changes,
    )


def main() -> None:
    hello, question = [ChatMessage.from_user(HELLO)], [ChatMessage.from_user(QUESTION)]
    whole = generator().run(hello)["replies"][0].text
    pieces: list[str] = []
    streamed = generator(streaming_callback=lambda chunk: pieces.append(chunk.content)).run(hello)["replies"][0].text
    tools = [create_tool_from_function(get_weather)]
    replies = []
    for callback in (None, lambda chunk: None):
        required = generator(settings={"tool_choice": "required"}, tools=tools, streaming_callback=callback)
        replies += required.run(question)["replies"]
    formatted = generator(settings={"response_format": Person}).run([ChatMessage.from_user(PERSON)])["replies"][0]
    agent = Agent(chat_generator=generator(), tools=tools, system_prompt="Use the tool.", max_agent_steps=4)
    report(
        chats=[whole, streamed, "".join(pieces)],
        calls=[[call.tool_name, call.arguments] for reply in replies for call in reply.tool_calls],
        people=[Person.model_validate_json(formatted.text)],
        answers=[agent.run(messages=question)["messages"][-1].text],
    )


if __name__ == "__main__":
    main()
