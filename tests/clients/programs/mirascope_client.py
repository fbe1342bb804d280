"""mirascope over OpenAI's chats and Responses and Anthropic's Messages."""

from __future__ import annotations

import json

from mirascope import llm
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report

PROVIDERS = {"openai:completions": f"{URL}/v1", "openai:responses": f"{URL}/v1"}


def main() -> None:
    chats, calls, people, answers = [], [], [], []
    weather = llm.tool(get_weather)
    for provider, base_url in PROVIDERS.items():
        llm.register_provider(provider, scope="openai/", api_key="-", base_url=base_url)
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
