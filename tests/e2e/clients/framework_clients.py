"""Agents and structured answers by the libraries that people build on; they live in an environment of their own.

`python framework_clients.py URL NAME ...`; the last line is JSON, a result for each name.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import pydantic

QUESTION = "What is the weather in Paris in celsius? Look it up."
PERSON = "Anna is 31 years old. Answer with a JSON object that has the keys name and age."


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """Look up the weather of a city."""
    return "18 degrees"


def langchain(url: str) -> dict[str, Any]:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tgi", base_url=f"{url}/v1", api_key="-", temperature=0, max_retries=0, max_tokens=64)
    weather = tool(get_weather)
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = model.bind_tools([weather], tool_choice="get_weather").invoke(messages)
    messages += [called, *(weather.invoke(call) for call in called.tool_calls)]
    answer = model.bind_tools([weather]).invoke(messages)
    methods: tuple[Literal["function_calling", "json_mode", "json_schema"], ...] = (
        "function_calling",
        "json_mode",
        "json_schema",
    )
    people = [model.with_structured_output(Person, method=method).invoke(PERSON) for method in methods]
    return {
        "calls": [[call["name"], call["args"]] for call in called.tool_calls],
        "answer": answer.content,
        "people": [person.model_dump() for person in people if isinstance(person, Person)],
        "streamed": "".join(str(chunk.content) for chunk in model.stream(messages)),
    }


def agents(url: str) -> dict[str, Any]:
    """OpenAI's Agents SDK, over Responses and over chats."""
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    results: dict[str, Any] = {}
    for name, kind in (("responses", OpenAIResponsesModel), ("chats", OpenAIChatCompletionsModel)):

        async def run(kind: Any = kind) -> Any:
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
            agent = Agent(
                name="weather",
                instructions="Use the tool.",
                model=kind(model="tgi", openai_client=client),
                tools=[function_tool(get_weather)],
                model_settings=ModelSettings(
                    temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False
                ),
            )
            return await Runner.run(agent, QUESTION, max_turns=5)

        outcome = asyncio.run(run())
        results[name] = [item.type for item in outcome.new_items]
        results[f"{name} answer"] = str(outcome.final_output)
    return results


def pydantic_ai(url: str) -> dict[str, Any]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tgi", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="-"))
    agent = Agent(model, output_type=Person, model_settings={"temperature": 0, "max_tokens": 64})
    return {"person": agent.run_sync(PERSON).output.model_dump()}


def instructor(url: str) -> dict[str, Any]:
    import instructor
    import openai

    people = []
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as sdk:
            client = instructor.from_openai(sdk, mode=mode)
            person = client.chat.completions.create(
                model="tgi",
                messages=[{"role": "user", "content": PERSON}],
                response_model=Person,
                temperature=0,
                max_tokens=64,
                max_retries=0,
            )
            people.append(person.model_dump())
    return {"people": people}


def litellm(url: str) -> dict[str, Any]:
    """Three of its providers."""
    import litellm

    messages = [{"role": "user", "content": "Say hello."}]
    routes = {"openai/tgi": f"{url}/v1", "hosted_vllm/tgi": f"{url}/v1", "anthropic/tgi": url}
    return {
        name: litellm.completion(
            model=name, api_base=base, api_key="-", messages=messages, temperature=0, max_tokens=8, num_retries=0
        )
        .choices[0]
        .message.content
        for name, base in routes.items()
    }


LIBRARIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "langchain": langchain,
    "agents": agents,
    "pydantic_ai": pydantic_ai,
    "instructor": instructor,
    "litellm": litellm,
}


def main() -> None:
    url, *names = sys.argv[1:]
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network at its import
    print(json.dumps({name: LIBRARIES[name](url) for name in names}))


if __name__ == "__main__":
    main()
