"""guidance over OpenAI's chats."""

from __future__ import annotations

import json

from guidance import assistant, gen, user
from guidance import json as as_json
from guidance.models import OpenAI
from task import HELLO, MAX_TOKENS, PERSON, URL, Person, report


def main() -> None:
    start = OpenAI("tgi", api_key="-", base_url=f"{URL}/v1", max_retries=0, echo=False)
    with user():
        greeting = start + HELLO
        question = start + PERSON
    with assistant():
        greeting += gen("text", max_tokens=MAX_TOKENS, temperature=0)
        question += as_json("person", schema=Person)
    report(chats=[greeting["text"]], people=[json.loads(question["person"])])


if __name__ == "__main__":
    main()
