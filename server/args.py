"""The command line: one table of flags with their environment twins -> LauncherArgs. The only reader of os.environ.

Every flag of TGI's launcher is in the table (reference `tgi-cli.md` 2): it has an effect, or it is refused in a
sentence. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

USAGE_EXIT_CODE = 2


class ArgumentError(Exception):
    """A combination or a value that can't be served; printed as TGI prints it, exit code 1."""

    def __str__(self) -> str:
        return f'ArgumentValidation("{self.args[0]}")'


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LauncherArgs:
    """What the user asked for; None where the engine decides."""

    model_id: str
    revision: str | None
    dtype: str
    hostname: str
    port: int
    max_concurrent_requests: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_batch_prefill_tokens: int | None
    max_batch_total_tokens: int | None
    huggingface_hub_cache: str | None
    is_prefix_caching: bool
    log_level: str
    num_threads: int | None
    """From OMP_NUM_THREADS; None: all cores this process may use."""
    compute_type: str | None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _outer_threads(text: str) -> int:
    """OpenMP's list of threads per nesting level: the first is ours."""
    return _positive(text.split(",")[0])


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError(text)
    return value


# What argparse prints as "invalid <name> value: ...".
_positive.__name__, _outer_threads.__name__, _port.__name__ = "positive integer", "thread count", "port"


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    """`--name-like-this` and its environment twin `NAME_LIKE_THIS`; the flag wins."""

    name: str

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return self.attribute.upper()


@dataclasses.dataclass(frozen=True, slots=True)
class Flag(_Named):
    """One flag that has an effect."""

    help: str
    parse: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RefusedFlag(_Named):
    """A flag of TGI that is not built yet. `harmless` values ask for what happens anyway and are let through."""

    is_switch: bool = False
    harmless: tuple[str, ...] = ()
    has_variable: bool = True


FLAGS: tuple[Flag, ...] = (
    Flag("model-id", "Folder of a Hugging Face model, or its id on the Hub"),
    Flag("revision", "Branch, tag or commit on the Hub (default: main)"),
    Flag(
        "dtype",
        "What to compute in; auto is the checkpoint's own. float32 gives the ids of transformers in float32",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    Flag("hostname", "IP address to listen on", default="0.0.0.0"),
    Flag("port", "Port to listen on", _port, default=3000),
    Flag("max-concurrent-requests", "Requests waiting and running together; more get 429", _positive, default=128),
    Flag("max-input-tokens", "Longest prompt in tokens (default: max-total-tokens - 1)", _positive),
    Flag("max-input-length", "Old name of --max-input-tokens", _positive),
    Flag("max-total-tokens", "Longest prompt and output together (default: what model and memory allow)", _positive),
    Flag(
        "max-batch-prefill-tokens", "Most tokens computed, and requests running, in one step (default: 4096)", _positive
    ),
    Flag("max-batch-total-tokens", "Tokens that the KV cache holds (default: from the free memory)", _positive),
    Flag("huggingface-hub-cache", "Folder where models of the Hub are kept"),
)

REFUSED_FLAGS: tuple[RefusedFlag, ...] = (
    RefusedFlag("validation-workers", harmless=("2",)),
    RefusedFlag("sharded", harmless=("false", "0")),
    RefusedFlag("num-shard", harmless=("1",)),
    RefusedFlag("quantize"),
    RefusedFlag("speculate", harmless=("0",)),
    RefusedFlag("kv-cache-dtype"),
    RefusedFlag("trust-remote-code", is_switch=True),
    RefusedFlag("max-best-of", harmless=("2",)),
    RefusedFlag("max-stop-sequences", harmless=("4",)),
    RefusedFlag("max-top-n-tokens", harmless=("5",)),
    RefusedFlag("waiting-served-ratio"),
    RefusedFlag("max-waiting-tokens"),
    RefusedFlag("max-batch-size"),
    RefusedFlag("cuda-graphs", harmless=("0",)),
    RefusedFlag("shard-uds-path"),
    RefusedFlag("master-addr"),
    RefusedFlag("master-port"),
    RefusedFlag("weights-cache-override"),
    RefusedFlag("disable-custom-kernels", is_switch=True),
    RefusedFlag("cuda-memory-fraction", harmless=("1", "1.0")),
    RefusedFlag("rope-scaling"),
    RefusedFlag("rope-factor"),
    RefusedFlag("json-output", is_switch=True),
    RefusedFlag("otlp-endpoint"),
    RefusedFlag("otlp-service-name"),
    RefusedFlag("cors-allow-origin"),
    RefusedFlag("api-key"),
    RefusedFlag("watermark-gamma"),
    RefusedFlag("watermark-delta"),
    RefusedFlag("ngrok", is_switch=True),
    RefusedFlag("ngrok-authtoken"),
    RefusedFlag("ngrok-edge"),
    RefusedFlag("tokenizer-config-path"),
    RefusedFlag("disable-grammar-support", is_switch=True),
    RefusedFlag("env", is_switch=True, has_variable=False),
    RefusedFlag("max-client-batch-size", harmless=("4",)),
    RefusedFlag("lora-adapters"),
    RefusedFlag("usage-stats", harmless=("off",)),
    RefusedFlag("payload-limit", harmless=("2000000",)),
    RefusedFlag("enable-prefill-logprobs", is_switch=True),
    RefusedFlag("graceful-termination-timeout", harmless=("90",)),
    RefusedFlag("prometheus-port"),
)

EPILOG = """\
Every flag has an environment twin: --max-total-tokens is MAX_TOTAL_TOKENS. The flag wins.
Further variables: PREFIX_CACHING=0 turns the prefix cache off; LOG_LEVEL; OMP_NUM_THREADS; HF_TOKEN; HF_HUB_OFFLINE=1.

Examples:
  text-generation-launcher --model-id Qwen/Qwen2.5-0.5B-Instruct --port 8080
  text-generation-launcher --model-id ./my-model --max-total-tokens 4096 --max-input-tokens 2048
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_EXIT_CODE, f"error: {message}\n\nFor more information, try '--help'.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the table. Values stay None when not given, so that the environment can be asked."""
    parser = _Parser(
        prog="text-generation-launcher",
        description="Serve a Qwen2-family model over TGI's and OpenAI's routes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pytgi {importlib.metadata.version('pytgi')}")
    for flag in FLAGS:
        default = "" if flag.default is None else f" (default: {flag.default})"
        parser.add_argument(
            f"--{flag.name}",
            type=flag.parse,
            choices=flag.choices,
            metavar=flag.variable if flag.choices is None else None,
            help=f"{flag.help}{default} [env: {flag.variable}]",
        )
    group = parser.add_argument_group("flags of TGI that are not built yet (refused)")
    for refused in REFUSED_FLAGS:
        action: dict[str, Any] = {"action": "store_const", "const": "true"} if refused.is_switch else {"metavar": "X"}
        group.add_argument(f"--{refused.name}", dest=refused.attribute, help=argparse.SUPPRESS, **action)
    group.description = ", ".join(f"--{refused.name}" for refused in REFUSED_FLAGS)
    return parser


def parse_args(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> LauncherArgs:
    """Resolve flags and variables. Exits with 2 on a usage error; raises ArgumentError on a bad combination."""
    environ = {name: value for name, value in environ.items() if value}  # empty is as good as unset
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    _refuse_unbuilt(given, environ)
    values = {flag.attribute: _value(parser, flag, given[flag.attribute], environ) for flag in FLAGS}
    if values["model_id"] is None:
        parser.error("--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/Qwen2.5-0.5B-Instruct")
    _check_limits(values)
    values["max_input_tokens"] = values["max_input_tokens"] or values.pop("max_input_length")
    values.pop("max_input_length", None)
    return LauncherArgs(
        **values,
        is_prefix_caching=_switch(parser, environ, "PREFIX_CACHING", default=True),
        log_level=_log_level(parser, environ),
        num_threads=_variable(parser, environ, "OMP_NUM_THREADS", _outer_threads),
        compute_type=environ.get("COMPUTE_TYPE"),
    )


def _refuse_unbuilt(given: dict[str, Any], environ: Mapping[str, str]) -> None:
    for flag in REFUSED_FLAGS:
        value = given[flag.attribute]
        source = f"--{flag.name}"
        if value is None and flag.has_variable:
            value, source = environ.get(flag.variable), f"the variable {flag.variable}"
        is_off = flag.is_switch and (value or "").lower() in ("false", "0")
        if value not in (None, *flag.harmless) and not is_off:
            raise ArgumentError(f"{source} is not supported yet: start without it")


def _value(parser: argparse.ArgumentParser, flag: Flag, given: Any, environ: Mapping[str, str]) -> Any:
    if given is not None:
        return given
    value = _variable(parser, environ, flag.variable, flag.parse)
    if value is not None and flag.choices is not None and value not in flag.choices:
        parser.error(f"variable {flag.variable}: invalid choice: {value!r} (choose from {', '.join(flag.choices)})")
    return flag.default if value is None else value


def _variable(
    parser: argparse.ArgumentParser, environ: Mapping[str, str], name: str, parse: Callable[[str], Any]
) -> Any:
    text = environ.get(name)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        parser.error(f"variable {name}: invalid {parse.__name__} value: {text!r}")


def _switch(parser: argparse.ArgumentParser, environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    values = {"1": True, "true": True, "0": False, "false": False}
    text = environ.get(name)
    if text is None:
        return default
    if text.lower() not in values:
        parser.error(f"variable {name}: give 1 or 0, not {text!r}")
    return values[text.lower()]


def _log_level(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> str:
    level = environ.get("LOG_LEVEL", "info").lower()
    level = {"warn": "warning", "trace": "debug"}.get(level, level)
    if level not in ("debug", "info", "warning", "error"):
        parser.error(f"variable LOG_LEVEL: give debug, info, warn or error, not {level!r}")
    return level


def _check_limits(values: Mapping[str, Any]) -> None:
    new, old, total = values["max_input_tokens"], values["max_input_length"], values["max_total_tokens"]
    if new is not None and old is not None:
        raise ArgumentError(
            f"Both `max_input_tokens` ({new}) and `max_input_length` ({old}) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency."
        )
    longest = new or old
    if longest is not None and total is not None and longest >= total:
        raise ArgumentError(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total})")
    capacity = values["max_batch_total_tokens"]
    if total is not None and capacity is not None and total > capacity:
        raise ArgumentError(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {capacity}")
    prefill = values["max_batch_prefill_tokens"]
    if prefill is not None and capacity is not None and prefill > capacity:
        raise ArgumentError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {capacity}"
        )


def is_ip_address(hostname: str) -> bool:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True
