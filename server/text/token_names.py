"""Names of single tokens: their text or, for a part of a character, their bytes. No two tokens have one name."""

from __future__ import annotations

from dataclasses import dataclass

REPLACEMENT = "\ufffd"
"""The text of a byte sequence that is no character, or none yet."""


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte.

    Bytes that print stand for themselves; the others, in their order, for the characters from 256 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _alphabet()


@dataclass(frozen=True, slots=True)
class TokenName:
    """A token by itself."""

    text: str
    """Its text, or its bytes with escapes (`\\xf0\\x9f`)."""
    raw: bytes | None
    """Its bytes; None: it stands for none."""
    is_part: bool
    """It is no whole characters."""

    @classmethod
    def of(cls, token_id: int, text: str, piece: str | None) -> TokenName:
        """The name of a token that decodes to `text` and whose entry in the vocabulary is `piece`, if it has one."""
        if piece is None:
            return cls(f"token_id:{token_id}", None, is_part=False)
        raw = text.encode()
        if REPLACEMENT in text and all(character in _BYTE_OF for character in piece):
            raw = bytes(_BYTE_OF[character] for character in piece)
        if raw.decode(errors="replace") != raw.decode(errors="ignore"):
            return cls("".join(map(_escaped, raw)), raw, is_part=True)
        return cls(text, raw, is_part=False)


def _escaped(byte: int) -> str:
    is_plain = 0x20 <= byte < 0x7F and byte != ord("\\")
    return chr(byte) if is_plain else f"\\x{byte:02x}"
