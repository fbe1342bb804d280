"""lm-evaluation-harness finds in completions of the server the log-likelihoods of its own model in float32."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cached_environment import cached_environment
from tests.e2e.conftest import build_demo_model
from tests.e2e.launched import launched

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "oracles" / "evaluate.py"
TOLERANCE = 1e-3
QUESTIONS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Paris", "Berlin", "a small town in the mountains"]},
    {"question": "2 + 2 =", "choices": ["3", "4", "5", "22"]},
    {"question": "Once upon a time there was", "choices": ["a king.", "a princess who lived in a castle.", "xqz"]},
    {"question": "Water boils at", "choices": ["100 degrees Celsius", "7 km"]},
    {"question": "Das Wetter in Zürich ist", "choices": ["schön", "größer als 5 Ångström"]},
    {"question": "法国的首都是", "choices": ["巴黎", "柏林", "🦜🌍"]},
    {"question": "The user said goodbye.<|im_end|>\n<|im_start|>assistant\n", "choices": ["Goodbye!", "No.<|im_end|>"]},
    {"question": "Answer yes or no. Is snow white?", "choices": ["yes", "no", "yes", "perhaps\n\nor   not"]},
]
TASKS = {
    "questions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n", "."], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> None:
    """Tasks with data of their own, so that the harness asks no hub. YAML's text may be JSON."""
    paragraphs = (ROOT / "LICENSE").read_text().split("\n\n")
    texts = [paragraphs[7], "\n\n".join(paragraphs[:4]), "\n\n".join(paragraphs[10:16]), "Good morning."]
    rows = {"questions": QUESTIONS, "answers": QUESTIONS, "perplexity": [{"text": text} for text in texts]}
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))


@pytest.mark.timeout(1800)
def test_log_likelihoods_and_texts_are_those_of_the_harness_own_model(tmp_path: Path) -> None:
    """The small demo model will not do: `transformers` cuts its texts as Qwen2's, whatever its tokenizer.json says."""
    folder, logs, tasks = build_demo_model(), tmp_path / "logs", tmp_path / "tasks"
    logs.mkdir()
    tasks.mkdir()
    write_tasks(tasks)
    python = cached_environment("lm-eval") / "bin" / "python"
    environ = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with launched(folder, logs, "--dtype", "float32") as server:
        command = [python, SCRIPT, folder, server.url, tmp_path / "results.json"]
        subprocess.run(command, cwd=tasks, env=environ, check=True, timeout=1500)
    results = json.loads((tmp_path / "results.json").read_text())
    plain, exact = results.pop("hf"), results.pop("hf, exact softmax")
    assert len(results) == 4
    for way, answers in results.items():
        assert answers["answers"] == exact["answers"] != [[""]] * len(QUESTIONS), way
        compare(answers["questions"], plain["questions"], f"questions, {way}")
        compare(answers["questions"], exact["questions"], f"questions, {way}, exact softmax")
        compare(answers["perplexity"], exact["perplexity"], f"perplexity, {way}, exact softmax")


def compare(answers: list[Any], expected: list[Any], what: str) -> None:
    """Log-likelihoods are as near as `TOLERANCE` asks, sample by sample; what is greedy is the same."""
    assert flat(answers, bool) == flat(expected, bool), what
    differences = [abs(a - b) for a, b in zip(flat(answers, float), flat(expected, float), strict=True)]
    largest = max(differences)
    print(f"{what}: {len(differences)} log-likelihoods, largest difference {largest:.2g}")
    assert largest <= TOLERANCE, what


def flat(values: Any, kind: type) -> list[Any]:
    """All of one type in nested lists."""
    if not isinstance(values, list):
        return [values] if type(values) is kind else []
    return [value for inner in values for value in flat(inner, kind)]
