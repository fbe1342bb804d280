"""A loop with tools by Anthropic's own client, which lives in an environment of its own. The last line is JSON.

`python anthropic_client.py URL`, and on the standard input the tools, their answers and the first message.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic

MAX_TURNS = 5
GREEDY = {"temperature": 0}
"""Its newest version has no such arguments any more; the wire has the field."""


def main() -> None:
    task = json.load(sys.stdin)
    client = anthropic.Anthropic(base_url=sys.argv[1], api_key="-", timeout=120, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    choices: list[Any] = [{"type": "any"}, {"type": "tool", "name": task["second"]}]
    counted = client.messages.count_tokens(model="tgi", messages=messages, tools=task["tools"]).input_tokens
    first_input = 0
    called, streamed = [], ""
    for turn in range(MAX_TURNS):
        choice = choices[turn] if turn < len(choices) else {"type": "auto"}
        choice["disable_parallel_tool_use"] = True
        with client.messages.stream(
            model="tgi", messages=messages, tools=task["tools"], tool_choice=choice, max_tokens=64, extra_body=GREEDY
        ) as stream:
            streamed = "".join(stream.text_stream)
            message = stream.get_final_message()
        usage = message.usage  # what the prefix cache had is counted apart
        first_input = first_input or usage.input_tokens + (usage.cache_read_input_tokens or 0)
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            break
        calls = [block for block in message.content if block.type == "tool_use"]
        called += [[call.name, call.input] for call in calls]
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": task["answers"][call.name]} for call in calls
        ]
        messages.append({"role": "user", "content": results})
    refusal = ""
    try:
        client.messages.create(model="tgi", messages=messages[:1], max_tokens=8, extra_body={"top_p": 7})
    except anthropic.APIStatusError as error:
        refusal = str(error)
    results = {
        "stop_reason": message.stop_reason,
        "text": "".join(block.text for block in message.content if block.type == "text"),
        "streamed": streamed,
        "called": called,
        "counted": counted,
        "input": first_input,
        "refusal": refusal,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
