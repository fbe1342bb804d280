"""What every client is asked here, and the line in which a program tells what it got.

Programs have one argument, the server's URL. They run in environments of their own, with this folder on their path.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any, Literal

import pydantic

URL = sys.argv[1] if len(sys.argv) > 1 else ""
HELLO = "Say hello."
QUESTION = "What is the weather in Paris in celsius? Look it up."
PERSON = "Anna is 31 years old. Answer with a JSON object that has the keys name and age."
MAX_TOKENS = 64


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=120)


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """Look up the weather of a city."""
    return "18 degrees"


def report(
    chats: Iterable[str] = (), calls: Iterable[Any] = (), people: Iterable[Any] = (), answers: Iterable[str] = ()
) -> None:
    """Print the last line: greetings whole and streamed, pairs of function and arguments, objects, other texts."""
    objects = [person.model_dump() if isinstance(person, pydantic.BaseModel) else person for person in people]
    print(json.dumps({"chats": list(chats), "calls": list(calls), "people": objects, "answers": list(answers)}))
