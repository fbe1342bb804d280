"""Semantic Kernel's chat completion with its own calling of functions."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from openai import AsyncOpenAI
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory, FunctionCallContent
from semantic_kernel.functions import kernel_function
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, report


class Weather:
    @kernel_function(name="get_weather", description="Look up the weather of a city.")
    def get_weather(self, city: Annotated[str, "The city"], unit: Annotated[str, "celsius or fahrenheit"]) -> str:
        return "18 degrees"


def said(text: str) -> ChatHistory:
    history = ChatHistory()
    history.add_user_message(text)
    return history


async def run() -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="-", max_retries=0)
    service = OpenAIChatCompletion(ai_model_id="tgi", async_client=client)
    kernel = Kernel()
    kernel.add_service(service)
    kernel.add_plugin(Weather(), plugin_name="weather")

    def settings(**changes: Any) -> OpenAIChatPromptExecutionSettings:
        return OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=MAX_TOKENS, **changes)

    whole = str(await service.get_chat_message_content(said(HELLO), settings()))
    chunks = service.get_streaming_chat_message_content(said(HELLO), settings())
    streamed = "".join([str(chunk) async for chunk in chunks])
    only_called = settings(function_choice_behavior=FunctionChoiceBehavior.Required(auto_invoke=False))
    called = await service.get_chat_message_content(said(QUESTION), only_called, kernel=kernel)
    calls = [item for item in called.items if isinstance(item, FunctionCallContent)]
    looped = settings(function_choice_behavior=FunctionChoiceBehavior.Auto())
    answer = str(await service.get_chat_message_content(said(QUESTION), looped, kernel=kernel))
    formatted = str(await service.get_chat_message_content(said(PERSON), settings(response_format=Person)))
    report(
        chats=[whole, streamed],
        calls=[[call.function_name, json.loads(str(call.arguments))] for call in calls],
        people=[Person.model_validate_json(formatted)],
        answers=[answer],
    )


if __name__ == "__main__":
    asyncio.run(run())
