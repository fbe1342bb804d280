"""LangGraph's agent, and LangChain's models for Hugging Face's servers."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def main() -> None:
    endpoint = HuggingFaceEndpoint(endpoint_url=URL, max_new_tokens=MAX_TOKENS, seed=1, huggingfacehub_api_token="-")
    text = endpoint.invoke("The capital of France is")
    assert text == "".join(endpoint.stream("The capital of France is")) != ""
    hub = ChatHuggingFace(llm=endpoint, model_id="tgi", temperature=0, max_tokens=MAX_TOKENS)
    weather = tool(get_weather)
    called = hub.bind_tools([weather], tool_choice="get_weather").invoke(QUESTION)
    person = hub.with_structured_output(Person, method="json_schema").invoke(PERSON)
    model = ChatOpenAI(
        model="tgi", base_url=f"{URL}/v1", api_key="-", temperature=0, max_retries=0, max_tokens=MAX_TOKENS
    )
    agent = create_react_agent(model, [weather], prompt="Use the tool.")
    state: dict[str, Any] = agent.invoke({"messages": [HumanMessage(QUESTION)]}, {"recursion_limit": 8})
    report(
        chats=[str(hub.invoke(HELLO).content), "".join(str(chunk.content) for chunk in hub.stream(HELLO))],
        calls=[[call["name"], call["args"]] for call in called.tool_calls],
        people=[person],
        answers=[str(state["messages"][-1].content)],
    )


if __name__ == "__main__":
    main()
