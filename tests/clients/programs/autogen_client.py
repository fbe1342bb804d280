"""AutoGen's client and its assistant."""

from __future__ import annotations

import asyncio
import json

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import CreateResult, ModelFamily, ModelInfo, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def said(text: str) -> list[UserMessage]:
    return [UserMessage(content=text, source="user")]


async def run() -> None:
    client = OpenAIChatCompletionClient(
        model="tgi",
        base_url=f"{URL}/v1",
        api_key="-",
        temperature=0,
        max_tokens=MAX_TOKENS,
        max_retries=0,
        model_info=ModelInfo(
            vision=False,
            function_calling=True,
            json_output=True,
            structured_output=True,
            multiple_system_messages=True,
            family=ModelFamily.UNKNOWN,
        ),
    )
    chats = [str((await client.create(said(HELLO))).content)]
    async for item in client.create_stream(said(HELLO)):
        if isinstance(item, CreateResult):
            chats.append(str(item.content))
    tool = FunctionTool(get_weather, description="Look up the weather of a city.", strict=True)
    calls = list((await client.create(said(QUESTION), tools=[tool], tool_choice="required")).content)
    async for item in client.create_stream(said(QUESTION), tools=[tool], tool_choice=tool):
        if isinstance(item, CreateResult):
            calls += item.content
    people = [
        Person.model_validate_json(str((await client.create(said(PERSON), json_output=kind)).content))
        for kind in (Person, True)
    ]
    agent = AssistantAgent(
        "weather", model_client=client, tools=[tool], system_message="Use the tool.", reflect_on_tool_use=True
    )
    answer = (await agent.run(task=QUESTION)).messages[-1].to_text()
    report(chats, [[call.name, json.loads(call.arguments)] for call in calls], people, [answer])


if __name__ == "__main__":
    asyncio.run(run())
