"""lm-evaluation-harness on local tasks, by its own model and by completions of a server; tests/slow/test_evaluation.py.

    python tests/oracles/evaluate.py FOLDER URL OUTPUT.json    (environment: tests/e2e/environments/lm-eval.txt)

The tasks are those of the present folder. OUTPUT has, for each way and task, what every sample was answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

MAX_LENGTH = 192
"""In tokens, so that long texts are several windows."""
SERVED_MAX_LENGTH = MAX_LENGTH + 2
"""The same windows: of a server's length the harness keeps one token for the answer and one for the context."""
WAYS: dict[str, dict[str, Any]] = {
    "ids": {"batch_size": 4, "tokenized_requests": True},
    "ids, two at a time": {"batch_size": 3, "tokenized_requests": True, "num_concurrent": 2},
    "texts": {"batch_size": 4, "tokenized_requests": False},
    "one text": {"batch_size": 1, "tokenized_requests": False},
}


def main() -> None:
    folder, url, output = sys.argv[1:]
    tasks = TaskManager(include_path=".", include_defaults=False)
    names = [path.stem for path in Path().glob("*.yaml")]
    # torch's float32 sums of 151,936 exponentials are always a bit too small: the log-likelihood of a text of 678
    # tokens gains 0.016 by that. The model itself computes in float32 both times.
    own = {"pretrained": folder, "dtype": "float32", "device": "cpu", "max_length": MAX_LENGTH}
    results = {
        "hf": evaluate("hf", own, tasks, names),
        "hf, exact softmax": evaluate("hf", own | {"softmax_dtype": "float64"}, tasks, names),
    }
    served = {"base_url": f"{url}/v1/completions", "model": "tgi", "tokenizer": folder, "max_length": SERVED_MAX_LENGTH}
    for way, arguments in WAYS.items():
        results[way] = evaluate("local-completions", served | arguments, tasks, names)
    Path(output).write_text(json.dumps(results))


def evaluate(model: str, arguments: dict[str, Any], tasks: TaskManager, names: list[str]) -> dict[str, list[Any]]:
    """What was answered for each sample of each task: pairs of log-likelihood and whether it is greedy, or a text."""
    outcome = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(names), task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in outcome["samples"].items()
    }


if __name__ == "__main__":
    main()
