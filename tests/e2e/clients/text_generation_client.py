"""What TGI's own client makes of our answers; it lives in an environment of its own. The last line is JSON."""

from __future__ import annotations

import json
import sys

from text_generation import Client
from text_generation.errors import ValidationError

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    client = Client(sys.argv[1], timeout=120)
    answer = client.generate(
        PROMPT, max_new_tokens=8, decoder_input_details=True, top_n_tokens=2, stop_sequences=["!!!"]
    )
    details = answer.details
    assert len(details.tokens) == details.generated_tokens == 8
    assert len(details.top_tokens) == 8
    assert details.prefill[0].logprob is None
    assert details.prefill[1].logprob is not None
    *tokens, last = client.generate_stream(PROMPT, max_new_tokens=8)
    assert last.details is not None
    assert last.details.finish_reason == "length"
    chat = client.chat(MESSAGES, temperature=1e-4, seed=1, max_tokens=16)
    sampled = client.generate(PROMPT, do_sample=True, temperature=0.9, top_p=0.9, max_new_tokens=8, best_of=2)
    assert sampled.details.best_of_sequences is not None
    refusal = ""
    try:
        client.generate(PROMPT, stop_sequences=["a", "b", "c", "d", "e"])
    except ValidationError as error:
        refusal = str(error)
    results = {
        "text": answer.generated_text,
        "streamed": last.generated_text,
        "tokens": "".join(token.token.text for token in [*tokens, last]),
        "chat": chat.choices[0].message.content,
        "refusal": refusal,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
