"""A model folder's words on chats: its templates, and the special tokens that they may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.link.errors import StartError
from engine.link.model_files import NAMED_TEMPLATES, read_file, read_json
from engine.link.special_tokens import default_tokens

DEFAULT = "default"
TOOL_USE = "tool_use"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The templates and special tokens of a model."""

    templates: Mapping[str, str]
    """Sources by name: `default`, and `tool_use` where chats with tools have one of their own."""
    special_tokens: Mapping[str, str]
    """Texts by the names that templates call them by, such as `bos_token`. A token that the model lacks has no name."""


def read_chat_format(
    folder: Path, config: dict[str, Any], *, is_config_first: bool = False, is_strict: bool = False
) -> ChatFormat:
    """The chat format of a folder whose tokenizer_config.json is `config`. Raises StartError.

    Not `is_strict`: as transformers reads it. `is_config_first`: a template in `config` comes before all files.
    """
    templates = _named_templates(config.get("chat_template"))
    if not (is_config_first and DEFAULT in templates):
        templates = (_tgi_templates if is_strict else _folder_templates)(folder, templates)
    tokens = _tgi_tokens(config) if is_strict else _special_tokens(folder, config)
    return ChatFormat(templates=templates, special_tokens=tokens)


def _folder_templates(folder: Path, in_config: dict[str, str]) -> dict[str, str]:
    """The templates in transformers' order: those in files of their own, then tokenizer_config.json.

    A template that transformers would give to a processor only is better than none.
    """
    in_files = _template_files(folder)
    if DEFAULT in in_files:
        return in_files
    return (in_config or _processor_templates(folder)) | in_files


def _tgi_templates(folder: Path, in_config: dict[str, str]) -> dict[str, str]:
    """The template that TGI looks for; chat_template.jinja, which TGI does not know, is better than none."""
    named = _processor_templates(folder) or in_config
    source = named.get(DEFAULT) or _template_files(folder).get(DEFAULT)
    return {} if source is None else {DEFAULT: source}


def _processor_templates(folder: Path) -> dict[str, str]:
    settings = read_json(folder / "chat_template.json") or read_json(folder / "processor_config.json")
    return _named_templates(settings.get("chat_template"))


def _template_files(folder: Path) -> dict[str, str]:
    paths = {DEFAULT: folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted(folder.glob(f"{NAMED_TEMPLATES}/*.jinja"))}
    return {name: source for name, path in paths.items() if (source := _read_source(path)) is not None}


def _read_source(path: Path) -> str | None:
    content = read_file(path)
    if content is None:
        return None
    try:
        return content.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise StartError(f"{path} is not UTF-8 ({error}): fetch the model again") from error


def _named_templates(value: Any) -> dict[str, str]:
    """Templates by name. A value is one template, a list of named ones, or an object of them. Raises StartError."""
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    named = value if isinstance(value, list) else [{"name": DEFAULT, "template": value}]
    if not all(isinstance(item, dict) for item in named):
        raise StartError("chat_template is a list, but not of named templates: correct tokenizer_config.json")
    return {
        item["name"]: item["template"].removeprefix(BYTE_ORDER_MARK)
        for item in named
        if isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
    }


def _tgi_tokens(config: dict[str, Any]) -> dict[str, str]:
    return _texts({name: config.get(name) for name in ("bos_token", "eos_token")})


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The tokens that transformers names to templates: every key that ends in `_token`, and named further ones.

    Those that no file names are its class's.
    """
    if "added_tokens_decoder" not in config:  # older folders keep them in a file of their own
        config = config | read_json(folder / "special_tokens_map.json")
    named = default_tokens(config) | {name: token for name, token in config.items() if name.endswith("_token")}
    further = config.get("extra_special_tokens")
    return _texts(named | (further if isinstance(further, dict) else {}))


def _texts(tokens: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, token in tokens.items() if (text := token_content(token)) is not None}


def token_content(token: Any) -> str | None:
    """A token's text: it is written as a string or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
