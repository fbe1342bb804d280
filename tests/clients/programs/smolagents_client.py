"""smolagents' models, over OpenAI's client and Hugging Face's, and its agent that calls tools."""

from __future__ import annotations

import json
from typing import Any

from smolagents import ChatMessage, InferenceClientModel, MessageRole, OpenAIModel, ToolCallingAgent, tool
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, report

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}


@tool
def get_weather(city: str, unit: str) -> str:
    """Look up the weather of a city.

    Args:
        city: The name of the city.
        unit: celsius or fahrenheit.
    """
    return "18 degrees"


def said(text: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


def main() -> None:
    model = OpenAIModel(model_id="tgi", api_base=f"{URL}/v1", api_key="-", **GREEDY)
    hub = InferenceClientModel(model_id=f"{URL}/v1/chat/completions", **GREEDY)
    schema = {"name": "person", "schema": Person.model_json_schema(), "strict": True}
    chats, calls = [], []
    for each in (model, hub):
        chats.append(each.generate(said(HELLO)).content)
        chats.append("".join(delta.content or "" for delta in each.generate_stream(said(HELLO))))
        message = each.generate(said(QUESTION), tools_to_call_from=[get_weather])
        calls += [[call.function.name, call.function.arguments] for call in message.tool_calls or []]
    # Its InferenceClientModel takes formats for two hosted providers only.
    formatted = model.generate(said(PERSON), response_format={"type": "json_schema", "json_schema": schema}).content
    agent = ToolCallingAgent(tools=[get_weather], model=model, max_steps=3, verbosity_level=0)
    answer = str(agent.run(QUESTION))
    parsed = [[name, json.loads(arguments) if isinstance(arguments, str) else arguments] for name, arguments in calls]
    report(chats=chats, calls=parsed, people=[Person.model_validate_json(formatted or "")], answers=[answer])


if __name__ == "__main__":
    main()
