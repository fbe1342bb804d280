"""Text to token ids and back, and what tokenizer_config.json adds. `tokenizers` only: transformers would load torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from engine.link.errors import GenerationError, StartError
from engine.link.model_files import read_file, read_json
from server.text.affixes import Affixes, read_affixes, use_affixes
from server.text.chat_format import ChatFormat, read_chat_format, token_content
from server.text.long_texts import LongTextProcess
from server.text.spans import spans_json
from server.text.token_names import TokenName

T = TypeVar("T")

SPECIAL_TOKEN_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
    "extra_special_tokens",
)


MAX_SHORT_CHARS = 1 << 17
"""Longer texts are encoded in a process of their own (`server.text.long_texts`)."""


class TextTokenizer:
    """One model's tokenizer; encoding runs on a few threads of its own, so that long prompts don't hold up streams."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_ids: frozenset[int],
        chat_format: ChatFormat,
        num_workers: int,
        path: Path,
        affixes: Affixes | None = None,
    ) -> None:
        """`path`: the file that `tokenizer` was read from. `affixes`: tokens around a text in place of the file's."""
        if affixes is not None:
            use_affixes(tokenizer, affixes)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenizer")
        self._long_texts = LongTextProcess(path, affixes)
        self._long_executor = ThreadPoolExecutor(1, thread_name_prefix="long-texts")
        self.chat_format = chat_format

    @classmethod
    def from_folder(
        cls, model_path: str, num_workers: int, config_path: str | None = None, *, is_strict: bool = False
    ) -> TextTokenizer:
        """Read tokenizer.json and what lies beside it. Raises StartError.

        The file at `config_path` is read in place of tokenizer_config.json; its chat template wins. `is_strict`:
        chat templates are looked for where TGI does.
        """
        folder = Path(model_path)
        tokenizer = _load_tokenizer(folder / "tokenizer.json")
        _refuse_larger(tokenizer, folder)
        path = Path(config_path) if config_path else folder / "tokenizer_config.json"
        if config_path and not path.exists():
            raise StartError(f"{config_path} is missing: give --tokenizer-config-path a file")
        config = read_json(path)
        chat_format = read_chat_format(folder, config, is_config_first=bool(config_path), is_strict=is_strict)
        affixes = read_affixes(config, chat_format.special_tokens)
        special_ids = _special_ids(tokenizer, config, path)
        return cls(tokenizer, special_ids, chat_format, num_workers, folder / "tokenizer.json", affixes)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > MAX_SHORT_CHARS:
            return await self._run_long(lambda process: process.ids(text, add_special_tokens=add_special_tokens))
        return await self._run(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: `encode` itself holds the GIL, and a long prompt would stop every stream for its second.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    async def split(self, text: str, *, add_special_tokens: bool) -> bytes:
        """The tokens of `text` with their places in it, a list of SimpleToken as JSON."""
        if len(text) > MAX_SHORT_CHARS:
            return await self._run_long(lambda process: process.spans(text, add_special_tokens=add_special_tokens))
        return await self._run(self._split, text, add_special_tokens)

    def _split(self, text: str, add_special_tokens: bool) -> bytes:
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return spans_json(text, encoding)

    async def decode_all(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, as `decode` has it; there may be many."""
        return await self._run(self._decode_all, token_ids)

    def _decode_all(self, token_ids: Sequence[int]) -> str:
        # A batch of one, for the sake of the GIL.
        (text,) = self._tokenizer.decode_batch([token_ids], skip_special_tokens=False)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included. Raises GenerationError where the library panics."""
        try:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        except BaseException as error:
            _raise_if_panic(error)
            raise

    def name(self, token_id: int) -> TokenName:
        """The token by itself, as OpenAI's logprobs show it."""
        return TokenName.of(token_id, self.decode([token_id]), self._tokenizer.id_to_token(token_id))

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        """The result of the library's work, on a thread. Raises GenerationError where it panics."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)
        except BaseException as error:
            _raise_if_panic(error)
            raise

    async def _run_long(self, work: Callable[[LongTextProcess], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._long_executor, work, self._long_texts)

    def token_id(self, token: str) -> int | None:
        """The id of the token whose text is `token`, if there is one."""
        return self._tokenizer.token_to_id(token)

    def token_ids(self, *tokens: str) -> frozenset[int]:
        """The ids of those among `tokens` that are one token each."""
        return frozenset(token_id for token in tokens if (token_id := self.token_id(token)) is not None)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._long_executor.shutdown(wait=False, cancel_futures=True)
        self._long_texts.kill()
        self._long_executor.shutdown()
        self._long_texts.close()


def _raise_if_panic(error: BaseException) -> None:
    """Raise GenerationError for a panic of the library: it is no Exception, and would end more than its request."""
    if type(error).__name__ == "PanicException":  # pyo3 makes the class when a panic first comes
        raise GenerationError("the tokenizer failed with this text") from None


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    content = read_file(path)
    if content is None:
        raise StartError(f"{path} is missing: the model folder needs a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise StartError(f"{path} cannot be read as a tokenizer: {error}") from None


def _refuse_larger(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Raises StartError when the model has no rows for some of the tokens; more rows than tokens are usual."""
    vocab_size = read_json(folder / "config.json").get("vocab_size")
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    if isinstance(vocab_size, int) and num_tokens > vocab_size:
        raise StartError(
            f"{folder} has {num_tokens} tokens in tokenizer.json but a vocab_size of {vocab_size} in config.json: "
            "they do not belong together, fetch the model again"
        )


def _special_ids(tokenizer: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> frozenset[int]:
    """Ids of tokens that the config names as special, and of added tokens that either file flags as special."""
    ids = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    try:
        named = {tokenizer.token_to_id(token) for token in _named_special_tokens(config)}
        decoder = (config.get("added_tokens_decoder") or {}).items()
        ids |= {int(token_id) for token_id, token in decoder if token.get("special")}
    except (AttributeError, ValueError) as error:
        raise StartError(f"The special tokens in {path} cannot be used ({error}): fetch the model again") from error
    return frozenset(ids | {token_id for token_id in named if token_id is not None})


def _named_special_tokens(config: dict[str, Any]) -> Iterator[str]:
    for key in SPECIAL_TOKEN_KEYS:
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            content = token_content(token)
            if content is not None:
                yield content
