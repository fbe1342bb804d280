"""CrewAI's model, and a crew of one agent with a tool.

The demo model writes its call in a code fence here, which is no call.
"""

from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool
from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report


def model(**changes: Any) -> LLM:
    return LLM(model="openai/tgi", base_url=f"{URL}/v1", api_key="-", temperature=0, max_tokens=MAX_TOKENS, **changes)


def main() -> None:
    agent = Agent(
        role="clerk",
        goal="Look things up.",
        backstory="",
        llm=model(),
        tools=[tool("get_weather")(get_weather)],
        max_iter=3,
    )
    asked = Task(description=QUESTION, expected_output="The temperature.", agent=agent)
    answer = str(Crew(agents=[agent], tasks=[asked]).kickoff())
    writer = Agent(role="clerk", goal="Write JSON.", backstory="", llm=model(), max_iter=2)
    written = Task(description=PERSON, expected_output="A person.", agent=writer, output_pydantic=Person)
    person = Crew(agents=[writer], tasks=[written]).kickoff().pydantic
    chats = [str(model(stream=is_streamed).call(HELLO)) for is_streamed in (False, True)]
    people = [person, model(response_format=Person).call(PERSON)]
    report(chats, people=people, answers=[answer])


if __name__ == "__main__":
    main()
