"""mirascope over OpenAI's chats and Responses."""

from __future__ import annotations

import json

from mirascope import llm
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def main() -> None:
    chats, calls, people, answers = [], [], [], []
    weather = llm.tool(get_weather)
    for provider in ("openai:completions", "openai:responses"):
        llm.register_provider(provider, scope="openai/", api_key="-", base_url=f"{URL}/v1")
        model = llm.Model("openai/gpt-4o", temperature=0, max_tokens=MAX_TOKENS)
        chats += [model.call(HELLO).text(), "".join(model.stream(HELLO).text_stream(sep=""))]
        called = model.call(QUESTION, tools=[weather])
        calls += [[call.name, json.loads(call.args)] for call in called.tool_calls]
        answers.append(called.resume(called.execute_tools()).text())
        people += [
            model.call(PERSON, format=llm.format(Person, mode=mode)).parse() for mode in ("strict", "tool", "json")
        ]
    report(chats, calls, people, answers)


if __name__ == "__main__":
    main()
