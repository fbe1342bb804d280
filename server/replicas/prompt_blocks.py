"""A body -> hashes of the blocks of its prompt, whatever the route. The text is not rendered or tokenized for that."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import msgspec

PROMPT_KEYS = "tools system instructions messages input inputs prompt instances".split()
"""The keys that make a prompt, in the order in which templates render them."""
BLOCK_BYTES = 256
MAX_BLOCKS = 1024
HASH_BYTES = 8


def prompt_blocks(body: bytes) -> list[bytes]:
    """A hash for each full block of the prompt over itself and all blocks before it; none for a body of another kind.

    Two prompts that begin alike have the same first hashes. What follows the first `MAX_BLOCKS` blocks doesn't count.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    text = b"\n".join(msgspec.json.encode(fields[key]) for key in PROMPT_KEYS if key in fields)
    return list(_hashes(text[: MAX_BLOCKS * BLOCK_BYTES]))


def _hashes(text: bytes) -> Iterator[bytes]:
    parent = b""
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        parent = blake2b(parent + text[start : start + BLOCK_BYTES], digest_size=HASH_BYTES).digest()
        yield parent
