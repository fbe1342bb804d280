"""Flags have their effects on a running server, whether given as flags or as variables."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import tokenizers

from tests.contract.harness import oracle_greedy
from tests.e2e.launched import launched
from tests.tiny_model import write_tiny_qwen2

PROMPT = "one two three four five six seven eight nine ten"


def test_flags_and_variables_have_their_effects(tiny_model_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "tokenizer_config.json"
    template.write_text(json.dumps({"chat_template": "{{ raise_exception('the other template') }}"}))
    flags = [
        *"--max-total-tokens 64 --max-input-tokens 20 --max-batch-total-tokens 128 --max-batch-size 1 -g 5".split(),
        *"--max-stop-sequences 1 --disable-grammar-support --cors-allow-origin http://page.example --env".split(),
        "--tokenizer-config-path",
        str(template),
    ]
    environ = {
        "MAX_BEST_OF": "3",
        "MAX_CLIENT_BATCH_SIZE": "7",
        "PAYLOAD_LIMIT": "1000",
        "VALIDATION_WORKERS": "1",
        "MAX_CONCURRENT_REQUESTS": "9",
        "COMPUTE_TYPE": "test+card",
        "API_KEY": "",
    }
    with launched(tiny_model_dir, tmp_path, *flags, environ=environ) as server:
        info = server.info()
        for name, value in {
            "max_total_tokens": 64,
            "max_input_tokens": 20,
            "max_best_of": 3,
            "max_stop_sequences": 1,
            "max_client_batch_size": 7,
            "validation_workers": 1,
            "max_concurrent_requests": 9,
        }.items():
            assert info[name] == value, name

        def refusal(parameters: dict[str, object], inputs: str = "x") -> tuple[int, str]:
            response = httpx.post(f"{server.url}/generate", json={"inputs": inputs, "parameters": parameters})
            return response.status_code, response.json()["error"] if response.status_code == 422 else ""

        assert "supports up to 1 stop sequences" in refusal({"stop": ["a", "b"]})[1]
        grammar = {"type": "regex", "value": "a"}
        assert refusal({"grammar": grammar}) == (422, "Input validation error: grammar is not supported")
        assert refusal({}, "x" * 2000)[0] == 413
        chat = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert "the other template" in chat.json()["error"]["message"]
        page = {"origin": "http://page.example"}
        answer = httpx.post(f"{server.url}/generate", json={"inputs": "x"}, headers=page)
        assert answer.headers["x-compute-type"] == "test+card"
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        for text in (
            "Runtime environment:",
            "--max-total-tokens = 64",
            "the variable MAX_BEST_OF = 3",
            "KV cache of 128 tokens",
        ):
            assert text in server.log


def test_rope_flags_reach_the_engine(tmp_path: Path) -> None:
    """Ids equal those of `transformers` with the same scaling in config.json, beyond the window of the training."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    write_tiny_qwen2(plain, max_position_embeddings=32)
    write_tiny_qwen2(scaled, max_position_embeddings=32, rope_scaling=scaling)
    prompt_ids = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json")).encode(PROMPT).ids
    flags = ("--rope-scaling", "dynamic", "--rope-factor", "2", "--max-total-tokens", "64", "--dtype", "float32")
    with launched(plain, tmp_path, *flags) as server:
        tokens = server.generate(PROMPT, max_new_tokens=64 - len(prompt_ids))["details"]["tokens"]
        assert "prefix caching off" in server.log
    ids, smallest_gap = oracle_greedy(scaled, prompt_ids, 64 - len(prompt_ids))
    assert smallest_gap > 1e-4, "a near-tie decides nothing: take another prompt"
    assert [token["id"] for token in tokens] == ids
    assert len(prompt_ids) + len(ids) > 40, "not beyond the original window"
