"""Write docs/configuration.md from the table of flags; with --check only say whether it is up to date (exit code 1)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from server.launcher.flag import Effect, Flag, Variable
from server.launcher.flags import SECTIONS, VARIABLES
from server.launcher.platforms import MODEL_ID, PLATFORMS, Platform

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

Written by `make configuration` from the table in `server/launcher/flags.py`; `make check` fails when it is out of date.

`text-generation-launcher` takes TGI's flags. A flag wins over its environment variable; an empty variable counts as
not set; switches and booleans take `true`, `false`, `1` or `0` in the environment. A flag may be given once
(`--cors-allow-origin`: several times). Exit codes: 0 after a signal, 1 when something can't be served or failed, 2 for
an unknown flag or a bad value.

A variable of a port that holds an address like `tcp://10.96.0.1:9090` is what Kubernetes says of a service of that name
(`PROMETHEUS_PORT`): it is ignored, and the log says so. Texts, logs and names of files are UTF-8 whatever the locale.

What a flag does is one of three things. **Served**: it has its effect. **No effect**: accepted, so that a command line
of TGI keeps working, and the log says once that nothing follows from it. **Refused**: the start ends with a sentence.
"""

VARIABLES_HEAD = """
## Variables without a flag

| variable | default | what it does |
|---|---|---|
"""

PLATFORMS_HEAD = """
## Variables of cloud platforms

Read where a sign of the platform is there ([platforms.md](platforms.md)). Flags win over them, and they win over our
variables; those win over what is only a default there.

| platform | sign | what is read |
|---|---|---|
"""

TAIL = """
## How limits get their values

| given | result |
|---|---|
| `--max-input-tokens` and `--max-total-tokens` | as they are |
| only `--max-total-tokens` | input tokens = total - 1 |
| neither | total = the smaller of the KV cache and the model's window; input tokens = total - 1 |
| only `--max-input-tokens` | total as above; the start fails if it is not more than the input |

`--max-batch-prefill-tokens` is 4096 unless given, or less where the window or the KV cache is smaller. The KV cache
holds `--max-batch-total-tokens`; by default on a CPU one full window or 32768 tokens, whichever is more, as far as they
fit `TGI_WIGGLE_ROOM` of the memory that is free once the weights are there. "Free" on a CPU is the smaller of the
kernel's MemAvailable and what the cgroup (a container's `--memory`) and `ulimit -v` leave, times
`--cuda-memory-fraction`.

On a GPU a step of `--max-batch-prefill-tokens` is run first, at the end of a sequence of full length, with all the
rows of logits that a step may have: one for each request that runs at a time (`--max-batch-size`, 256 unless given) and
one for each token of its draft. The KV cache takes `TGI_WIGGLE_ROOM` of what weights and this step leave. If the step
does not fit, or leaves too little for what the flags ask of the cache, one of half as many tokens is tried; a
`--max-batch-prefill-tokens` that was given is then refused, with a value that fits. `--cuda-memory-fraction` is a share
of all memory of the card, as in TGI: 0.5 leaves half of it to other programs, and torch is held to that.

## Signals

SIGTERM, SIGINT and SIGHUP: nobody new is let in, running requests go on to their end for at most
`--graceful-termination-timeout` seconds, then the streams that are left end with an error event; exit code 0. A second
signal ends everything at once.
"""


def main() -> int:
    text = "".join(_pages())
    if sys.argv[1:] == ["--check"]:
        is_current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        if not is_current:
            print(f"{TARGET.name} is out of date: run `make configuration`", file=sys.stderr)
        return 0 if is_current else 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


def _pages() -> Iterator[str]:
    yield HEAD
    for title, flags in SECTIONS.items():
        yield f"\n## {title}\n\n| flag | variable | value | default | what it does |\n|---|---|---|---|---|\n"
        yield from (_flag_row(flag) for flag in flags)
    yield VARIABLES_HEAD
    yield from (_variable_row(row) for row in VARIABLES)
    yield PLATFORMS_HEAD
    yield from (_platform_row(platform) for platform in PLATFORMS)
    yield TAIL


def _flag_row(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in (f"--{flag.name}", *([f"-{flag.short}"] if flag.short else [])))
    value = "switch" if flag.is_switch else ", ".join(flag.choices) if flag.choices else flag.value.name
    default = "" if flag.default is None else f"`{flag.default}`"
    variable = f"`{flag.variable}`" if flag.has_variable else "none"
    return f"| {names} | {variable} | {value} | {default} | {_effect(flag)} |\n"


def _effect(flag: Flag) -> str:
    if flag.effect is Effect.SERVED:
        refused = f" **Refused**: {', '.join(flag.refused_choices)}: {flag.reason}." if flag.refused_choices else ""
        return f"{flag.help}.{refused}"
    harmless = ", ".join(f"`{_written(value)}`" for value in flag.harmless)
    fine = f" ({harmless} is fine)" if harmless else ""
    label = "**No effect**" if flag.effect is Effect.NONE else "**Refused**"
    return f"{flag.help}. {label}{fine}: {flag.reason}."


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _variable_row(row: Variable) -> str:
    default = "" if row.default is None else f"`{_written(row.default)}`"
    text = f"{row.help}." if row.effect is Effect.SERVED else f"**No effect**: {row.help}."
    return f"| `{row.name}` | {default} | {text} |\n"


def _platform_row(platform: Platform) -> str:
    signs = [f"`{name}`" for name in platform.signs]
    signs += [f"`{platform.argument}` as the only argument"] if platform.argument else []
    name_of_model = platform.variables.get(MODEL_ID)
    alone = [f"`{name_of_model}`"] if name_of_model else []
    alone += [f"a model in `{platform.model_folder}`"] if platform.model_folder else []
    signs.append(f"{' or '.join(alone)}, if nothing else names a model")
    read = [f"`{theirs}` as `{name}`" for name, theirs in platform.variables.items()]
    read += [f"`{name}` is {value}" for name, value in platform.fixed.items()]
    read += [f"`{name}` is {value} by default" for name, value in platform.defaults.items()]
    read += [f"`{MODEL_ID}` is `{platform.model_folder}` by default"] if platform.model_folder else []
    return f"| {platform.name} | {'; '.join(signs)} | {'; '.join(read)} |\n"


if __name__ == "__main__":
    sys.exit(main())
