"""The table of the launcher's flags and variables: name, value, default, and honestly what each of them does here.

Every flag of TGI's launcher is a row (reference `tgi-cli.md` 2 and 10). The parser, `--help`, docs/configuration.md and
the tests are made from this table. Standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

from engine.link.logs import parse_log_filter


class Effect(enum.Enum):
    """What giving a flag does."""

    SERVED = "has its effect"
    NONE = "accepted, without effect"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """How a text becomes a value; `parse` raises ValueError. `name` is what messages and documents call it."""

    name: str
    parse: Callable[[str], Any]

    @property
    def metavar(self) -> str:
        return self.name.upper().replace(" ", "_")


LARGEST = 2**63 - 1
"""As large as TGI's own parser takes, and as every library takes."""


MAX_DRAFT_TOKENS = 32


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= LARGEST:
            raise ValueError(text)
        return value

    return parse


def _draft_length(text: str) -> int:
    """More would make steps longer than any draft is right."""
    value = int(text)
    if not 0 <= value <= MAX_DRAFT_TOKENS:
        raise ValueError(text)
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def _factor(text: str) -> float:
    value = _number(text)
    if value < 1:
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _header_text(text: str) -> str:
    """Printable ASCII that a header can carry."""
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError(text)
    return text


def _secret(text: str) -> str:
    if not text:
        raise ValueError(text)
    return _header_text(text)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_at_least(0)(part) for part in text.split(","))


def _log_filter(text: str) -> str:
    parse_log_filter(text)
    return text


def _first_integer(text: str) -> int:
    """OpenMP's list of threads per nesting level: the first is ours."""
    return _at_least(1)(text.split(",")[0])


TEXT = Value(name="text", parse=str)
PATH = Value(name="path", parse=str)
COUNT = Value(name="count", parse=_at_least(0))
DRAFT = Value(name="draft length", parse=_draft_length)
POSITIVE = Value(name="positive integer", parse=_at_least(1))
PORT = Value(name="port", parse=_port)
NUMBER = Value(name="number", parse=_number)
FRACTION = Value(name="fraction", parse=_fraction)
FACTOR = Value(name="factor", parse=_factor)
BOOLEAN = Value(name="boolean", parse=_boolean)
HEADER_TEXT = Value(name="header text", parse=_header_text)
SECRET = Value(name="key", parse=_secret)
INTEGERS = Value(name="list of integers", parse=_integers)
THREADS = Value(name="thread count", parse=_first_integer)
LOG_FILTER = Value(name="log filter", parse=_log_filter)
SECONDS = Value(name="seconds", parse=_at_least(0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """`--name-like-this` and its environment twin `NAME_LIKE_THIS`; the flag wins."""

    name: str
    help: str
    value: Value = TEXT
    choices: tuple[str, ...] | None = None
    default: Any = None
    short: str | None = None
    is_switch: bool = False
    is_repeatable: bool = False
    is_secret: bool = False
    has_variable: bool = True
    effect: Effect = Effect.SERVED
    reason: str = ""
    """Why there is no effect, or what to do instead of a refused flag."""
    harmless: tuple[Any, ...] = ()
    """Values that ask for what happens anyway: let through in silence although the flag is refused or does nothing."""
    refused_choices: tuple[str, ...] = ()
    """Choices of TGI that a served flag refuses."""

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return self.attribute.upper()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """An environment variable without a flag. `parse`d by us if it has a value kind, else read by a library."""

    name: str
    help: str
    value: Value | None = None
    default: Any = None
    effect: Effect = Effect.SERVED
    harmless: tuple[Any, ...] = ()

    @property
    def attribute(self) -> str:
        return self.name.lower()

    @property
    def is_ours(self) -> bool:
        """Read by us and of effect."""
        return self.value is not None and self.effect is Effect.SERVED


QUANTIZE = ("awq", "compressed-tensors", "eetq", "gptq", "int4", "int8")
QUANTIZE_OF_TGI = ("bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "exl2", "fp8", "marlin")
"""What we have instead is in the flag's reason."""

MODEL = (
    Flag(name="model-id", help="Folder of a Hugging Face model, or its id on the Hub"),
    Flag(name="revision", help="Branch, tag or commit on the Hub (default: main)"),
    Flag(
        name="dtype",
        help="What to compute in; auto is the checkpoint's own. float32 gives the ids of transformers in float32",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
    ),
    Flag(
        name="quantize",
        help="awq, gptq and compressed-tensors load such a checkpoint (also without the flag); eetq and int8 (8 bits) "
        "and int4 quantise a dense one while it loads",
        choices=(*QUANTIZE, *QUANTIZE_OF_TGI),
        refused_choices=QUANTIZE_OF_TGI,
        reason=f"serve a checkpoint in another format; {', '.join(QUANTIZE)} are supported",
    ),
    Flag(
        name="quantize-head",
        help="How a dense output head runs (ours; default: int8 where the rest is quantised, unless dtype is float32)",
        choices=("none", "int8", "int4"),
    ),
    Flag(
        name="rope-scaling",
        help="How rotary positions are stretched, in place of what config.json says; --rope-factor alone means linear",
        choices=("default", "linear", "dynamic", "llama3", "yarn"),
    ),
    Flag(name="rope-factor", help="By how much rotary positions are stretched (default: 1)", value=FACTOR),
    Flag(
        name="sharded",
        help="Whether the model is cut over several shards; true alone takes all visible devices",
        value=BOOLEAN,
    ),
    Flag(
        name="num-shard",
        help="How many shards the model is cut into, a process each, on all hosts together (default: the visible "
        "devices, on a CPU 1)",
        value=COUNT,
    ),
    Flag(name="nnodes", help="Over how many hosts the shards are spread evenly (ours)", value=POSITIVE, default=1),
    Flag(
        name="node-rank",
        help="Which of the hosts this one is, from 0; the first serves HTTP (ours)",
        value=COUNT,
        default=0,
    ),
    Flag(
        name="shard-timeout",
        help="Seconds after which a silent shard counts as hung and the server ends (ours)",
        value=POSITIVE,
        default=15,
    ),
    Flag(
        name="speculate",
        help="Longest draft of n-gram speculation: up to so many tokens are guessed and checked in one step when that "
        "pays; the output stays the same (default: 0, none)",
        value=DRAFT,
    ),
    Flag(name="speculative-decoding", help="Other name of --speculate, in Qwen's documents", value=DRAFT),
    Flag(
        name="kv-cache-dtype",
        help="Type of cached keys and values",
        choices=("fp8_e4m3fn", "fp8_e5m2"),
        effect=Effect.REFUSED,
        reason="keys and values are kept in 16 bits (float32 with --dtype float32), start without it",
    ),
    Flag(
        name="lora-adapters",
        help="Adapters to load beside the model",
        effect=Effect.REFUSED,
        reason="merge the adapter into the model and serve the result",
    ),
    Flag(name="huggingface-hub-cache", help="Folder where models of the Hub are kept", value=PATH),
    Flag(
        name="weights-cache-override",
        help="Folder with the weight files",
        value=PATH,
        effect=Effect.NONE,
        reason="give that folder, with config.json and tokenizer.json in it, as --model-id",
    ),
    Flag(
        name="trust-remote-code",
        help="Run code from the model's repository",
        is_switch=True,
        effect=Effect.NONE,
        reason="no code of a repository is ever run, and Qwen2 needs none",
    ),
    Flag(
        name="disable-custom-kernels",
        help="Leave custom kernels out",
        is_switch=True,
        effect=Effect.NONE,
        reason="TGI has such kernels for BLOOM and NeoX only",
    ),
)

REQUESTS = (
    Flag(
        name="max-concurrent-requests",
        help="Requests waiting and running together; more get 429",
        value=POSITIVE,
        default=128,
    ),
    Flag(name="max-input-tokens", help="Longest prompt in tokens (default: max-total-tokens - 1)", value=POSITIVE),
    Flag(name="max-input-length", help="Old name of --max-input-tokens", value=POSITIVE),
    Flag(
        name="max-total-tokens",
        help="Longest prompt and output together, in tokens (default: what model and memory allow)",
        value=POSITIVE,
    ),
    Flag(name="max-best-of", help="Largest best_of of a request", value=POSITIVE, default=2),
    Flag(name="max-stop-sequences", help="Most stop strings of a request", value=COUNT, default=4),
    Flag(
        name="max-top-n-tokens",
        help="Largest top_n_tokens, top_logprobs and, of a completion, logprobs",
        value=COUNT,
        default=5,
    ),
    Flag(
        name="max-client-batch-size",
        help="Most prompts in one call of /v1/completions; more are refused",
        value=POSITIVE,
        default=4,
    ),
    Flag(name="payload-limit", help="Largest request body in bytes; more gets 413", value=POSITIVE, default=2_000_000),
    Flag(name="validation-workers", help="Threads that tokenize prompts", value=COUNT, default=2),
    Flag(
        name="tokenizer-config-path",
        help="File read in place of the model's tokenizer_config.json, e.g. for another chat template",
        value=PATH,
    ),
    Flag(
        name="disable-grammar-support",
        help="Refuse grammars and response formats with TGI's text",
        is_switch=True,
    ),
    Flag(
        name="enable-prefill-logprobs",
        help="Let requests ask for logprobs of their prompt (needed with --strict-tgi only)",
        is_switch=True,
    ),
)

BATCHING = (
    Flag(
        name="max-batch-prefill-tokens",
        help="Most tokens computed, and requests running, in one step (default: 4096)",
        value=POSITIVE,
    ),
    Flag(
        name="max-batch-total-tokens",
        help="Tokens that the KV cache holds (default: from the free memory)",
        value=POSITIVE,
    ),
    Flag(name="max-batch-size", help="Most requests that run at a time (default: no limit of its own)", value=COUNT),
    Flag(
        name="cuda-memory-fraction",
        help="Share of the device's free memory that may be used, on a CPU as well",
        value=FRACTION,
        default=1.0,
    ),
    Flag(
        name="cuda-graphs",
        help="Batch sizes captured as CUDA graphs",
        value=INTEGERS,
        effect=Effect.NONE,
        harmless=((0,),),
        reason="no graphs are captured, every step is launched as it comes",
    ),
    Flag(
        name="waiting-served-ratio",
        help="When waiting prompts interrupt decoding",
        value=NUMBER,
        effect=Effect.NONE,
        reason="prompts join the running batch at every step",
    ),
    Flag(
        name="max-waiting-tokens",
        help="Decoding steps before waiting prompts are let in",
        value=COUNT,
        effect=Effect.NONE,
        reason="prompts join the running batch at every step",
    ),
)

SERVING = (
    Flag(name="hostname", help="IP address to listen on", default="0.0.0.0"),
    Flag(name="port", short="p", help="Port to listen on; 0 takes a free one", value=PORT, default=3000),
    Flag(
        name="api-key",
        help="Key that requests must carry as `Authorization: Bearer KEY`; better given as variable, "
        "a command line is seen by every user of the host",
        value=SECRET,
        is_secret=True,
    ),
    Flag(
        name="cors-allow-origin",
        help="Origin of web pages that may call the server (default: any); can be given several times",
        is_repeatable=True,
    ),
    Flag(
        name="graceful-termination-timeout",
        short="g",
        help="Seconds that running requests have to end after a signal",
        value=SECONDS,
        default=90,
    ),
    Flag(
        name="strict-tgi",
        help="Behave as TGI also where that breaks clients (ours; TGI doesn't have it)",
        is_switch=True,
    ),
    Flag(
        name="shard-uds-path",
        help="Where TGI's shards put their sockets",
        value=PATH,
        effect=Effect.NONE,
        reason="the processes talk over inherited socket pairs, nothing lies in the file system",
    ),
    Flag(
        name="master-addr",
        help="Address of the first host where the shards meet; they listen there and nowhere else (default: 127.0.0.1)",
    ),
    Flag(
        name="master-port",
        help="Port where the shards meet (default: 29500 with several hosts, else a free one)",
        value=PORT,
    ),
    Flag(
        name="prometheus-port",
        help="Port of the metrics",
        value=PORT,
        effect=Effect.NONE,
        reason="metrics are at /metrics on the same port as all other routes, as with TGI",
    ),
    Flag(
        name="ngrok",
        help="Open a tunnel",
        is_switch=True,
        effect=Effect.REFUSED,
        reason="put a reverse proxy in front of the server",
    ),
    Flag(
        name="ngrok-authtoken",
        help="Token of the tunnel",
        is_secret=True,
        effect=Effect.NONE,
        reason="no tunnel is opened",
    ),
    Flag(
        name="ngrok-edge",
        help="Edge of the tunnel",
        effect=Effect.NONE,
        reason="no tunnel is opened",
    ),
)

LOGS = (
    Flag(name="json-output", help="Write the log as JSON lines", is_switch=True),
    Flag(
        name="env",
        short="e",
        help="Log versions and hardware first, for bug reports; the server starts all the same",
        is_switch=True,
        has_variable=False,
    ),
    Flag(
        name="otlp-endpoint",
        help="OpenTelemetry collector that gets traces over gRPC, http://HOST:4317 (default: no traces)",
    ),
    Flag(
        name="otlp-service-name",
        help="Name of this server in traces",
        default="text-generation-inference.router",
    ),
    Flag(
        name="usage-stats",
        help="What TGI reports to its makers",
        choices=("on", "off", "no-stack"),
        effect=Effect.NONE,
        harmless=("off",),
        reason="nothing is ever reported to anybody",
    ),
    Flag(
        name="watermark-gamma",
        help="Share of the vocabulary on the watermark's green list",
        value=FRACTION,
        default=0.5,
    ),
    Flag(
        name="watermark-delta",
        help="How much the logits of the watermark's green list are raised",
        value=NUMBER,
        default=2.0,
    ),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "Model and weights": MODEL,
    "Limits on requests": REQUESTS,
    "Batching and memory": BATCHING,
    "Serving and security": SERVING,
    "Logs, telemetry, watermark": LOGS,
}

FLAGS: tuple[Flag, ...] = tuple(flag for section in SECTIONS.values() for flag in section)

VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="PREFIX_CACHING", value=BOOLEAN, default=True, help="0 computes every prompt anew instead of reusing KV"
    ),
    Variable(
        name="TGI_WIGGLE_ROOM",
        value=FRACTION,
        default=0.8,
        help="Share of the memory free after loading that the KV cache may take",
    ),
    Variable(name="OMP_NUM_THREADS", value=THREADS, help="Threads that compute (default: all cores we may use)"),
    Variable(name="RANK", value=COUNT, help="Set by torchrun: the one shard that this launcher starts"),
    Variable(name="WORLD_SIZE", value=POSITIVE, help="Set by torchrun: how many shards there are"),
    Variable(name="LOCAL_RANK", value=COUNT, default=0, help="Set by torchrun: which device of the host"),
    Variable(name="LOCAL_WORLD_SIZE", value=POSITIVE, help="Set by torchrun: how many shards share the host"),
    Variable(
        name="COMPUTE_TYPE", value=HEADER_TEXT, help="Text of the x-compute-type header (default: cpu or the card)"
    ),
    Variable(
        name="LOG_LEVEL",
        value=LOG_FILTER,
        default="info",
        help="debug, info (default), warn, error, or a filter by module like warn,text_generation_router=debug",
    ),
    Variable(
        name="LOG_COLORIZE", help="1 colours the log, 0 doesn't (TGI has it inverted; default: only on a terminal)"
    ),
    Variable(name="HF_TOKEN", help="Token for private and gated models of the Hub"),
    Variable(name="HUGGING_FACE_HUB_TOKEN", help="The same, read when HF_TOKEN is not set"),
    Variable(name="HF_API_TOKEN", help="The same, read when HF_TOKEN is not set"),
    Variable(name="HF_HOME", help="Parent of the model cache (the cache is its subfolder hub)"),
    Variable(name="HF_HUB_OFFLINE", help="1 makes no network call: only what is in the cache is served"),
    Variable(name="HF_ENDPOINT", help="Address of another Hub"),
    Variable(name="ATTENTION", value=TEXT, effect=Effect.NONE, help="the attention kernel follows from the device"),
    Variable(
        name="USE_FLASH_ATTENTION",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="the attention kernel follows from the device",
    ),
    Variable(
        name="PREFILL_CHUNKING",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="long prompts are always computed in chunks",
    ),
    Variable(
        name="MESSAGES_API_ENABLED",
        value=TEXT,
        effect=Effect.NONE,
        harmless=("true", "True", "1"),
        help="the routes under /v1 are always there",
    ),
)
