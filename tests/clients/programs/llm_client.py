"""Simon Willison's `llm`, as a library over its file of models that are like OpenAI's."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from task import HELLO, MAX_TOKENS, PERSON, QUESTION, URL, Person, get_weather, report

MODELS = [
    {"model_id": "chats", "supports_schema": True, "supports_tools": True},
    {"model_id": "responses", "supports_schema": True, "supports_tools": True, "responses": True},
    {"model_id": "completions", "completion": True},
]


def write_models(folder: Path) -> None:
    """YAML may be JSON. The library reads it when it first looks for a model."""
    shared = {"model_name": "tgi", "api_base": f"{URL}/v1", "api_key_name": "pytgi"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([model | shared for model in MODELS]))
    (folder / "keys.json").write_text(json.dumps({"pytgi": "-"}))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        os.environ["LLM_USER_PATH"] = folder
        import llm

        chats, calls, people, answers = [], [], [], []
        for name in ("chats", "responses"):
            model = llm.get_model(name)
            length = {"max_tokens": MAX_TOKENS}
            chats += [model.prompt(HELLO, stream=stream, temperature=0, **length).text() for stream in (False, True)]
            person = model.prompt(PERSON, schema=Person, temperature=0, **length).text()
            people.append(Person.model_validate_json(person))
            chain = model.conversation(chain_limit=4).chain(
                QUESTION, tools=[get_weather], options={"temperature": 0, **length}
            )
            answers.append(chain.text())
            calls += [[call.name, call.arguments] for reply in chain.responses() for call in reply.tool_calls()]
        completions = llm.get_model("completions")
        texts = {
            completions.prompt(HELLO, stream=stream, temperature=0, max_tokens=8).text() for stream in (False, True)
        }
        assert len(texts) == 1 and "" not in texts
        report(chats, calls, people, answers)


if __name__ == "__main__":
    main()
