"""outlines, which holds servers of four kinds to types: OpenAI's, vLLM's, SGLang's and TGI's."""

from __future__ import annotations

from typing import Any, Literal

import openai
import outlines
from huggingface_hub import InferenceClient
from outlines.types import Regex
from task import HELLO, MAX_TOKENS, PERSON, URL, Person, report

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
QUESTION = "Is Paris in France or in Spain? Answer in one word."


def main() -> None:
    sdk = openai.OpenAI(base_url=f"{URL}/v1", api_key="-", max_retries=0)
    plain, vllm = outlines.from_openai(sdk, "tgi"), outlines.from_vllm(sdk, "tgi")
    tgi = outlines.from_tgi(InferenceClient(base_url=URL))
    chats, people = [], []
    for model in (plain, vllm):
        chats += [model(HELLO, **GREEDY), "".join(model.stream(HELLO, **GREEDY))]
        people += [Person.model_validate_json(model(PERSON, Person, **GREEDY))]
        people += [Person.model_validate_json("".join(model.stream(PERSON, Person, **GREEDY)))]
    people.append(Person.model_validate_json(tgi(PERSON, Person, max_new_tokens=MAX_TOKENS, return_full_text=False)))
    kinds: list[Any] = [Literal["France", "Spain"], Regex("(France|Spain)")]
    answers = [vllm(QUESTION, kind, **GREEDY) for kind in kinds]
    answers += [tgi(QUESTION, kind, max_new_tokens=8, return_full_text=False) for kind in kinds]
    assert set(answers) <= {"France", "Spain"}, answers
    report(chats=chats, people=people, answers=answers)


if __name__ == "__main__":
    main()
