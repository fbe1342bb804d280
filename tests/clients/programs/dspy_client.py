"""DSPy: signatures by its two adapters, an agent with a tool, a stream."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network at its import

import dspy  # noqa: E402
from task import HELLO, PERSON, QUESTION, URL, Person, get_weather, report  # noqa: E402


async def streamed(program: dspy.Module, **inputs: Any) -> tuple[str, Any]:
    listeners = [dspy.streaming.StreamListener(signature_field_name="answer")]
    pieces, final = [], None
    async for item in dspy.streamify(program, stream_listeners=listeners)(**inputs):
        if isinstance(item, dspy.Prediction):
            final = item.answer
        elif isinstance(item, dspy.streaming.StreamResponse):
            pieces.append(item.chunk)
    return "".join(pieces).strip(), final


def main() -> None:
    lm = dspy.LM(
        "openai/tgi", api_base=f"{URL}/v1", api_key="-", temperature=0, max_tokens=200, cache=False, num_retries=0
    )
    dspy.configure(lm=lm, adapter=dspy.ChatAdapter())
    greeting = dspy.Predict("question -> answer")
    whole = greeting(question=HELLO).answer
    piecewise = asyncio.run(streamed(greeting, question=HELLO))
    person = dspy.Predict(dspy.Signature("text -> person: Person", custom_types={"Person": Person}))
    people = []
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter()):
        with dspy.context(adapter=adapter):
            people.append(person(text=PERSON).person)
    agent = dspy.ReAct("question -> answer", tools=[get_weather], max_iters=2)
    with dspy.context(adapter=dspy.JSONAdapter()):
        called = agent(question=QUESTION).trajectory["tool_name_0"]
    assert called == "get_weather"  # the demo model takes the schema for the arguments
    report(chats=[whole, *piecewise], people=people)


if __name__ == "__main__":
    main()
