"""LlamaIndex, whose client for servers like OpenAI's chats, completes, calls, fills objects and drives agents."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def model(**changes: Any) -> OpenAILike:
    arguments: dict[str, Any] = {
        "model": "tgi",
        "api_base": f"{URL}/v1",
        "api_key": "-",
        "context_window": 4096,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "max_retries": 0,
    }
    return OpenAILike(**arguments | changes)


async def run_agent(tool: FunctionTool) -> str:
    agent = FunctionAgent(tools=[tool], llm=model(), system_prompt="Use the tool.")
    return str(await agent.run(QUESTION))


def main() -> None:
    llm, messages = model(), [ChatMessage(role="user", content=HELLO)]
    whole = llm.chat(messages).message.content or ""
    streamed = "".join(chunk.delta or "" for chunk in llm.stream_chat(messages))
    plain = model(is_chat_model=False)
    completed = plain.complete(HELLO).text
    assert completed == "".join(chunk.delta or "" for chunk in plain.stream_complete(HELLO)) != ""
    tool = FunctionTool.from_defaults(get_weather)
    response = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    calls = llm.get_tool_calls_from_response(response)
    *_, last = llm.stream_chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    calls += llm.get_tool_calls_from_response(last)
    people = [
        model(should_use_structured_outputs=is_schema).as_structured_llm(Person).complete(PERSON).raw
        for is_schema in (True, False)
    ]
    report(
        chats=[whole, streamed],
        calls=[[call.tool_name, call.tool_kwargs] for call in calls],
        people=people,
        answers=[asyncio.run(run_agent(tool))],
    )


if __name__ == "__main__":
    main()
