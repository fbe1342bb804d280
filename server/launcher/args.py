"""A command line and the environment -> LauncherArgs, by the table in `server.launcher.flags`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.launcher.errors import ArgumentError
from server.launcher.flag import PORT, Effect
from server.launcher.flags import VARIABLES, every_flag
from server.launcher.lora_adapters import parse_adapters
from server.launcher.parser import USAGE, build_parser, flag_type, parse_value
from server.launcher.platforms import MODEL_ID, Platform, Setting, find_platform
from server.launcher.sharding import Sharding, resolve_sharding

_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")
"""The value of NAME_PORT that every container gets for a service called `name`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LauncherArgs:
    """The launcher's own configuration, and the fields of its children's configurations that the user fills."""

    model_id: str
    revision: str | None = None
    huggingface_hub_cache: str | None = None
    lora_adapters: str | None = None
    """What `server.launcher.lora_adapters` reads."""
    hostname: str
    port: int
    shard_timeout_s: int
    graceful_termination_timeout_s: int
    omp_num_threads: int | None = None
    """Threads of all ranks of this host together. None: all cores this process may use."""
    is_runtime_logged: bool = False
    """Versions and hardware come first in the log."""
    is_json_output: bool = False
    log_level: str
    """A filter in the language of `engine.link.logs.parse_log_filter`."""
    sharding: Sharding
    engine: Mapping[str, Any]
    """Fields of EngineConfig."""
    server: Mapping[str, Any]
    """Fields of ServerConfig."""
    echo: str
    """The values that the user gave, and whether by flag or variable. Secrets are starred."""
    warnings: tuple[str, ...]
    """Sentences about values without effect, to be logged once."""


def parse_args(argv: Sequence[str], environ: Mapping[str, str], usage: str = USAGE) -> LauncherArgs:
    """Resolve flags and variables. Exits with 2 on a usage error; raises ArgumentError on a bad combination.

    `usage` is how --help says that the command is called.
    """
    services = _service_variables(environ)
    # Empty is as good as unset.
    environ = {name: value for name, value in environ.items() if value and name not in services}
    platform = find_platform(argv, environ)
    settings = {name: Setting(value, f"the variable {name}") for name, value in environ.items()}
    if platform is not None:
        settings |= platform.settings(environ)
        argv = [] if list(argv) == [platform.argument] else argv
    parser = build_parser(usage)
    values, sources = _read_flags(parser, argv, settings)
    variables = _read_variables(parser, settings)
    if "model_id" not in values:
        parser.error(_missing_model(platform))
    sharding = resolve_sharding(values | variables, environ)
    _check_limits(values)
    _check_combinations(values)
    warnings = (*services.values(), *_refuse_and_warn(values, sources), *_idle_variables(variables))
    _check_draft_lengths(values)
    echo = _echo(values, sources)
    values = _with_stand_ins(values)
    return LauncherArgs(
        **fields_of("launcher", values | variables),
        sharding=sharding,
        engine=fields_of("engine", values | variables),
        server=fields_of("server", values | variables),
        echo=echo,
        warnings=warnings,
    )


def fields_of(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the rows of both tables fill in one configuration.

    `values` holds what the user gave, by the rows' attributes; for other rows their default counts. A field that gets
    no value is left out, so that its own default holds.
    """
    fields: dict[str, Any] = {}
    for row in (*every_flag(), *VARIABLES):
        value = values.get(row.attribute, row.default)
        if value is not None:
            fields |= dict.fromkeys(row.fields_of(part), tuple(value) if isinstance(value, list) else value)
    return fields


def _read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], settings: Mapping[str, Setting]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that came by flag or by a flag's variable, and their names in messages; both by attribute."""
    values = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    sources = {flag.attribute: f"--{flag.name}" for flag in every_flag() if flag.attribute in values}
    for flag in every_flag():
        if flag.attribute not in values and flag.has_variable and flag.variable in settings:
            value = _read_setting(parser, settings[flag.variable], flag_type(flag))
            values[flag.attribute] = [value] if flag.is_repeatable else value
            sources[flag.attribute] = settings[flag.variable].source
    return values, sources


def _service_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables that Kubernetes has set for a service of that name, and a sentence about each."""
    names = [flag.variable for flag in every_flag() if flag.has_variable and flag.value is PORT]
    return {
        name: f"the variable {name} is ignored: {environ[name]} is what Kubernetes says of a service, and no port; "
        "enableServiceLinks: false in the pod's specification keeps such variables away"
        for name in names
        if _SERVICE_ADDRESS.fullmatch(environ.get(name, ""))
    }


def _read_variables(parser: argparse.ArgumentParser, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """The variables without a flag that are ours to read and are set."""
    return {
        row.attribute: _read_setting(parser, settings[row.name], functools.partial(parse_value, row.value))
        for row in VARIABLES
        if row.value is not None and row.name in settings
    }


def _read_setting(parser: argparse.ArgumentParser, setting: Setting, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(setting.value)
    except argparse.ArgumentTypeError as error:
        parser.error(f"{setting.source.removeprefix('the ')}: {error}")


def _missing_model(platform: Platform | None) -> str:
    text = "--model-id is missing: give a folder or a Hub id, e.g. --model-id Qwen/Qwen2.5-0.5B-Instruct"
    if platform is None or MODEL_ID not in platform.variables:
        return text
    return f"{text}, on {platform.name} as {platform.variables[MODEL_ID]}"


def _echo(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    shown = {flag.attribute: "***" if flag.is_secret else repr(values.get(flag.attribute)) for flag in every_flag()}
    return ", ".join(f"{source} = {shown[attribute]}" for attribute, source in sources.items())


def _refuse_and_warn(values: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """Sentences about flags that do nothing. Raises ArgumentError for a flag that is refused."""
    warnings = []
    for flag in every_flag():
        value = values.get(flag.attribute)
        if value is None or value in flag.harmless or (flag.is_switch and not value):
            continue
        source = sources[flag.attribute]
        stand_in = flag.stand_ins.get(value) if isinstance(value, str) else None
        if value in flag.refused_choices or (stand_in is not None and values.get("strict_tgi")):
            raise ArgumentError(f"{source} {value} is not supported: {flag.reason}")
        if stand_in is not None:
            warnings.append(f"{source} {value} is not there and is served as {stand_in}")
        if flag.effect is Effect.REFUSED:
            raise ArgumentError(f"{source} is not supported: {flag.reason}")
        if flag.effect is Effect.NONE:
            warnings.append(f"{source} has no effect: {flag.reason}")
    return warnings


def _with_stand_ins(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those that are served in their place."""
    stand_ins = {flag.attribute: flag.stand_ins for flag in every_flag() if flag.stand_ins}
    return {name: stand_ins[name].get(value, value) if name in stand_ins else value for name, value in values.items()}


def _idle_variables(variables: Mapping[str, Any]) -> list[str]:
    return [
        f"the variable {row.name} has no effect: {row.help}"
        for row in VARIABLES
        if row.effect is Effect.NONE and row.attribute in variables and variables[row.attribute] not in row.harmless
    ]


def _check_limits(values: Mapping[str, Any]) -> None:
    """Refuse limits that contradict each other, as far as that needs no model. Raises ArgumentError in TGI's words."""
    new, old, total = (values.get(name) for name in ("max_input_tokens", "max_input_length", "max_total_tokens"))
    if new is not None and old is not None:
        raise ArgumentError(
            f"Both `max_input_tokens` ({new}) and `max_input_length` ({old}) are set. Please define only "
            "`max_input_tokens` as `max_input_length is deprecated for naming consistency."
        )
    max_input = new or old
    if max_input is not None and total is not None and max_input >= total:
        raise ArgumentError(f"`max_input_tokens`({max_input}) must be < `max_total_tokens`({total})")
    capacity, prefill = values.get("max_batch_total_tokens"), values.get("max_batch_prefill_tokens")
    if total is not None and capacity is not None and total > capacity:
        raise ArgumentError(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {capacity}")
    if prefill is not None and capacity is not None and prefill > capacity:
        raise ArgumentError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {capacity}"
        )
    for name in ("validation_workers", "max_batch_size"):
        if values.get(name) == 0:
            raise ArgumentError(f"`{name}` must be > 0")


def _check_combinations(values: Mapping[str, Any]) -> None:
    if values.get("strict_tgi") and values.get("dtype", "auto") != "auto" and values.get("quantize") is not None:
        raise ArgumentError(
            "Only 1 can be set between dtype and quantize, as they both decide how goes the final model."
        )
    parse_adapters(values.get("lora_adapters"), values.get("served_model_name") or (values["model_id"],))
    if values.get("ngrok"):
        for name in ("ngrok_authtoken", "ngrok_edge"):
            if values.get(name) is None:
                raise ArgumentError(f"`{name.replace('_', '-')}` must be set when using ngrok tunneling")


def _check_draft_lengths(values: Mapping[str, Any]) -> None:
    name, other_name = values.get("speculate"), values.get("speculative_decoding")
    if name is not None and other_name is not None and name != other_name:
        raise ArgumentError(f"--speculate {name} and --speculative-decoding {other_name}: give one of them")
