"""Counting tokens with a model's own tokenizer, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

from server.bench.errors import BenchmarkError
from server.bench.trace import Tokenize

FILE = "tokenizer.json"


def open_tokenizer(name: str, revision: str | None) -> Tokenize:
    """Raises BenchmarkError if there is none."""
    from tokenizers import Tokenizer

    try:
        if Path(name).is_dir():
            path = str(Path(name) / FILE)
        else:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(name, FILE, revision=revision)
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain exceptions for files that it can't read
        raise BenchmarkError(f"--tokenizer-name {name}: no tokenizer ({error})") from error
    return lambda text: len(tokenizer.encode(text).ids)
