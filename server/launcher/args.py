"""A command line and the environment -> LauncherArgs, by the table in `server.launcher.flags`.

Two kinds of refusal, as TGI's launcher has them: a usage error (unknown flag, bad value) exits with 2, a combination
that can't be served raises ArgumentError and ends with 1. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from server.launcher.flags import BOOLEAN, FLAGS, SECTIONS, VARIABLES, Effect, Flag, Value

USAGE_EXIT_CODE = 2
DEFAULT_MASTER_PORT = 29500
"""TGI's and torchrun's."""


class ArgumentError(Exception):
    """A combination or a value that can't be served; printed as TGI prints it, exit code 1."""

    def __str__(self) -> str:
        return f'ArgumentValidation("{self.args[0]}")'


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How many shards there are, which of them this launcher starts, and where they meet."""

    size: int = 1
    num_hosts: int = 1
    ranks: tuple[int, ...] = (0,)
    """Started here. The launcher of rank 0 also serves HTTP."""
    first_local_rank: int = 0
    local_size: int = 1
    """Ranks on this host, whoever starts them."""
    address: str = "127.0.0.1"
    port: int = 0
    """0: a free one."""
    is_torchrun: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LauncherArgs:
    """What the user asked for; None where the engine decides."""

    model_id: str
    revision: str | None
    dtype: str
    quantize: str | None
    quantize_head: str | None
    rope_scaling: str | None
    rope_factor: float | None
    speculate: int
    sharding: Sharding
    shard_timeout: int
    huggingface_hub_cache: str | None
    max_concurrent_requests: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_client_batch_size: int
    payload_limit: int
    validation_workers: int
    tokenizer_config_path: str | None
    disable_grammar_support: bool
    enable_prefill_logprobs: bool
    max_batch_prefill_tokens: int | None
    max_batch_total_tokens: int | None
    max_batch_size: int | None
    cuda_memory_fraction: float
    hostname: str
    port: int
    api_key: str | None
    cors_allow_origin: tuple[str, ...]
    """Empty: any origin."""
    graceful_termination_timeout: int
    strict_tgi: bool
    json_output: bool
    otlp_endpoint: str | None
    otlp_service_name: str
    watermark_gamma: float
    watermark_delta: float
    env: bool
    prefix_caching: bool
    tgi_wiggle_room: float
    omp_num_threads: int | None
    """None: all cores this process may use."""
    compute_type: str | None
    log_level: str
    """A filter, as `engine.link.logs.parse_log_filter` reads it."""
    echo: str
    """What was given, and whether by flag or variable; secrets are starred."""
    warnings: tuple[str, ...]
    """To be logged once: what was given and has no effect."""


EPILOG = """\
Every flag but --env has an environment twin: --max-total-tokens is MAX_TOTAL_TOKENS. The flag wins.
Further variables and what each flag does here: docs/configuration.md.

Examples:
  text-generation-launcher --model-id Qwen/Qwen2.5-0.5B-Instruct --port 8080
  text-generation-launcher --model-id ./my-model --max-total-tokens 4096 --max-input-tokens 2048
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_EXIT_CODE, f"error: {message}\n\nFor more information, try '--help'.\n")


class _Once(argparse.Action):
    """A flag given twice is a mistake that should be seen, as TGI's parser has it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given more than once")
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the table. Values stay None when not given, so that the environment can be asked."""
    parser = _Parser(
        prog="text-generation-launcher",
        usage="%(prog)s --model-id MODEL [flags]",
        description="Serve a Qwen2-family model over TGI's and OpenAI's routes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"pytgi {importlib.metadata.version('pytgi')}"
    parser.add_argument("--version", "-V", action="version", version=version)
    for title, flags in SECTIONS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{flag.name}", *([f"-{flag.short}"] if flag.short else [])]
    help_text = _help(flag).replace("%", "%%")
    if flag.is_switch:
        group.add_argument(*names, dest=flag.attribute, action=_Once, nargs=0, const=True, help=help_text)
    else:
        group.add_argument(
            *names,
            dest=flag.attribute,
            action="append" if flag.is_repeatable else _Once,
            type=_typed(flag),
            metavar="{" + ",".join(flag.choices) + "}" if flag.choices else flag.value.metavar,
            help=help_text,
        )


def _help(flag: Flag) -> str:
    default = "" if flag.default is None else f" (default: {flag.default})"
    effect = {
        Effect.SERVED: f" ({', '.join(flag.refused_choices)}: refused)" if flag.refused_choices else "",
        Effect.NONE: f" (no effect: {flag.reason})",
        Effect.REFUSED: f" (refused: {flag.reason})",
    }[flag.effect]
    variable = f" [env: {flag.variable}]" if flag.has_variable else ""
    return f"{flag.help}{default}{effect}{variable}"


def _typed(flag: Flag) -> Callable[[str], Any]:
    """The flag's value of a text; raises what argparse prints as it is."""

    def parse(text: str) -> Any:
        if flag.choices is not None and text not in flag.choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(flag.choices)})")
        return _parse(BOOLEAN if flag.is_switch else flag.value, text, is_secret=flag.is_secret)

    return parse


def _parse(value: Value, text: str, *, is_secret: bool = False) -> Any:
    try:
        return value.parse(text)
    except ValueError:
        shown = "***" if is_secret else repr(text)
        raise argparse.ArgumentTypeError(f"invalid {value.name} value: {shown}") from None


def parse_args(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> LauncherArgs:
    """Resolve flags and variables. Exits with 2 on a usage error; raises ArgumentError on a bad combination."""
    environ = {name: value for name, value in environ.items() if value}  # empty is as good as unset
    parser = build_parser()
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    sources = {flag.attribute: f"--{flag.name}" for flag in FLAGS if flag.attribute in given}
    for flag in FLAGS:
        if flag.attribute not in given and flag.has_variable and flag.variable in environ:
            value = _variable(parser, environ, flag.variable, _typed(flag))
            given[flag.attribute] = [value] if flag.is_repeatable else value
            sources[flag.attribute] = f"the variable {flag.variable}"
    variables = _read_variables(parser, environ)
    if "model_id" not in given:
        parser.error("--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/Qwen2.5-0.5B-Instruct")
    sharding = _resolve_sharding(given, variables, environ)
    _check_limits(given)
    _check_combinations(given)
    warnings = [*_refuse_and_warn(given, sources), *_idle_variables(variables)]
    served = {
        flag.attribute: given.get(flag.attribute, _default(flag)) for flag in FLAGS if flag.effect is Effect.SERVED
    }
    served |= {row.attribute: variables.get(row.attribute, row.default) for row in VARIABLES if row.is_ours}
    served["cors_allow_origin"] = tuple(served["cors_allow_origin"] or ())
    old_name = served.pop("max_input_length")
    served["max_input_tokens"] = served["max_input_tokens"] or old_name
    served["speculate"] = _draft_length(served["speculate"], served.pop("speculative_decoding"))
    for name in SETTLED:
        del served[name]
    return LauncherArgs(**served, sharding=sharding, echo=_echo(given, sources), warnings=tuple(warnings))


def _echo(given: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    shown = {flag.attribute: "***" if flag.is_secret else repr(given.get(flag.attribute)) for flag in FLAGS}
    return ", ".join(f"{source} = {shown[attribute]}" for attribute, source in sources.items())


def _default(flag: Flag) -> Any:
    return False if flag.is_switch else flag.default


def _variable(
    parser: argparse.ArgumentParser, environ: Mapping[str, str], name: str, parse: Callable[[str], Any]
) -> Any:
    try:
        return parse(environ[name])
    except argparse.ArgumentTypeError as error:
        parser.error(f"variable {name}: {error}")


def _read_variables(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> dict[str, Any]:
    """The variables without a flag that are ours to read and are set."""
    values = {}
    for row in VARIABLES:
        if row.value is not None and row.name in environ:
            values[row.attribute] = _variable(parser, environ, row.name, functools.partial(_parse, row.value))
    return values


def _refuse_and_warn(given: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """Sentences about what was given and does nothing. Raises ArgumentError for what is refused."""
    warnings = []
    for flag in FLAGS:
        value = given.get(flag.attribute)
        if value is None or value in flag.harmless or (flag.is_switch and not value):
            continue
        source = sources[flag.attribute]
        if value in flag.refused_choices:
            raise ArgumentError(f"{source} {value} is not supported: {flag.reason}")
        if flag.effect is Effect.REFUSED:
            raise ArgumentError(f"{source} is not supported: {flag.reason}")
        if flag.effect is Effect.NONE:
            warnings.append(f"{source} has no effect: {flag.reason}")
    return warnings


def _idle_variables(variables: Mapping[str, Any]) -> list[str]:
    return [
        f"the variable {row.name} has no effect: {row.help}"
        for row in VARIABLES
        if row.effect is Effect.NONE and row.attribute in variables and variables[row.attribute] not in row.harmless
    ]


SETTLED = (
    *("sharded", "num_shard", "nnodes", "node_rank", "master_addr", "master_port"),
    *("rank", "world_size", "local_rank", "local_world_size"),
)
"""What `Sharding` is made of."""


def _resolve_sharding(given: Mapping[str, Any], variables: Mapping[str, Any], environ: Mapping[str, str]) -> Sharding:
    """TGI's rules for --sharded and --num-shard (reference `tgi-cli.md` 4.1), several hosts, torchrun's variables."""
    address, port = given.get("master_addr", "127.0.0.1"), given.get("master_port")
    if "rank" in variables and "world_size" in variables:
        return _of_torchrun(given, variables, address, port)
    size = _num_shards(given, environ)
    num_hosts, host = given.get("nnodes", 1), given.get("node_rank", 0)
    if host >= num_hosts:
        raise ArgumentError(f"--node-rank {host} must be < --nnodes {num_hosts}: hosts are counted from 0")
    if size % num_hosts:
        raise ArgumentError(f"--num-shard {size} can't be spread evenly over --nnodes {num_hosts}")
    if num_hosts > 1 and "master_addr" not in given:
        raise ArgumentError("--nnodes needs --master-addr: an address of the first host that the others can reach")
    local_size = size // num_hosts
    return Sharding(
        size=size,
        num_hosts=num_hosts,
        ranks=tuple(range(host * local_size, (host + 1) * local_size)),
        local_size=local_size,
        address=address,
        port=port or (DEFAULT_MASTER_PORT if num_hosts > 1 else 0),
    )


def _of_torchrun(given: Mapping[str, Any], variables: Mapping[str, Any], address: str, port: int | None) -> Sharding:
    rank, size = variables["rank"], variables["world_size"]
    if given.get("num_shard", size) != size:
        raise ArgumentError(f"--num-shard {given['num_shard']}, but torchrun starts {size}: leave --num-shard out")
    for name in ("nnodes", "node_rank"):
        if name in given:
            raise ArgumentError(f"torchrun says which hosts there are: leave --{name.replace('_', '-')} out")
    if rank >= size or port is None:
        raise ArgumentError("RANK must be < WORLD_SIZE and MASTER_PORT set, as torchrun does: unset RANK, or mend that")
    local_size = variables.get("local_world_size", size)
    return Sharding(
        size=size,
        num_hosts=-(-size // local_size),
        ranks=(rank,),
        first_local_rank=variables.get("local_rank", 0),
        local_size=local_size,
        address=address,
        port=port,
        is_torchrun=True,
    )


def _draft_length(name: int | None, other_name: int | None) -> int:
    if name is not None and other_name is not None and name != other_name:
        raise ArgumentError(f"--speculate {name} and --speculative-decoding {other_name}: give one of them")
    return name or other_name or 0


def _num_shards(given: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    num_shard, is_sharded = given.get("num_shard"), given.get("sharded")
    if num_shard is not None:
        if num_shard < 1:
            raise ArgumentError("`num_shard` cannot be < 1")
        if is_sharded and num_shard == 1:
            raise ArgumentError("`sharded` is true but `num_shard` <= 1")
        return int(num_shard)
    if is_sharded is False:
        return 1
    num_devices = _num_visible_devices(environ)
    if is_sharded and num_devices <= 1:
        raise ArgumentError(f"`sharded` is true but only found {num_devices} CUDA devices")
    return max(1, num_devices)


def _num_visible_devices(environ: Mapping[str, str]) -> int:
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        if (devices := environ.get(name)) is not None:
            return len(devices.split(",")) if devices not in ("all", "void") else _num_nvidia_devices()
    return 0


def _num_nvidia_devices() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _check_limits(given: Mapping[str, Any]) -> None:
    """TGI's sentences of reference `tgi-cli.md` 3.4, as far as they need no model."""
    new, old, total = (given.get(name) for name in ("max_input_tokens", "max_input_length", "max_total_tokens"))
    if new is not None and old is not None:
        raise ArgumentError(
            f"Both `max_input_tokens` ({new}) and `max_input_length` ({old}) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency."
        )
    longest = new or old
    if longest is not None and total is not None and longest >= total:
        raise ArgumentError(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({total})")
    capacity, prefill = given.get("max_batch_total_tokens"), given.get("max_batch_prefill_tokens")
    if total is not None and capacity is not None and total > capacity:
        raise ArgumentError(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {capacity}")
    if prefill is not None and capacity is not None and prefill > capacity:
        raise ArgumentError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {capacity}"
        )
    for name in ("validation_workers", "max_batch_size"):
        if given.get(name) == 0:
            raise ArgumentError(f"`{name}` must be > 0")


def _check_combinations(given: Mapping[str, Any]) -> None:
    if given.get("strict_tgi") and given.get("dtype", "auto") != "auto" and given.get("quantize") is not None:
        raise ArgumentError(
            "Only 1 can be set between dtype and quantize, as they both decide how goes the final model."
        )
    for adapter in (given.get("lora_adapters") or "").split(","):
        if adapter.count("@") > 1:
            raise ArgumentError(f"Invalid LoRA adapter format: {adapter}")
    if given.get("ngrok"):
        for name in ("ngrok_authtoken", "ngrok_edge"):
            if given.get(name) is None:
                raise ArgumentError(f"`{name.replace('_', '-')}` must be set when using ngrok tunneling")
