"""text-generation-server: tools around the engine. TGI starts shards with it; ours are started by the launcher."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.link.encoding import use_utf8
from engine.link.environment import engine_environment
from engine.link.errors import StartError
from engine.link.ipc import exit_when_closed
from engine.link.logs import configure_logging, parse_log_filter
from engine.link.model_files import adapter_base
from engine.link.model_folders import BUCKET_SCHEME, gguf_files
from engine.link.progress import Stage, StartProgress, tell_nobody
from engine.link.suggestions import SuggestingParser
from engine.quantize import options as quantize_options

logger = logging.getLogger(__name__)

PROGRAM = "text-generation-server"
AS_TGI: Mapping[str, str] = MappingProxyType({})
INTERRUPTED_EXIT_CODE = 130

DOWNLOAD_DESCRIPTION = """\
Fetch a model from the Hugging Face Hub into its cache: safetensors weights, configuration and tokenizer, never pickled
weights or code. What is there already is not fetched again; a model that is there whole costs no network call. The
last line of standard output is the model's folder; the log goes to standard error.
"""
VARIABLES = """\
Variables:
  HUGGINGFACE_HUB_CACHE  folder of the cache (default: $HF_HOME/hub; HF_HOME is ~/.cache/huggingface)
  HF_TOKEN               token for private and gated models
  HF_HUB_OFFLINE         1 makes no network call: only what is in the cache counts
  HF_ENDPOINT            address of another Hub
  LOG_LEVEL              default of --logger-level
"""
DOWNLOAD_EXAMPLES = """
Examples:
  text-generation-server download-weights Qwen/Qwen2.5-0.5B-Instruct
  text-generation-server download-weights Qwen/Qwen2.5-0.5B-Instruct --revision refs/pr/1 --json-output
  HUGGINGFACE_HUB_CACHE=/data text-generation-server download-weights my-team/my-model --revision v1.2
"""


def main(shown: Mapping[str, str] = AS_TGI) -> None:
    """Console script. A command prints the model's folder as the last line of standard output.

    `shown` has what --help and usage errors say in place of TGI's commands, for users who typed others.
    """
    use_utf8()
    prepare_environment(os.environ)
    args = build_parser(os.environ, shown).parse_args()
    configure_logging(args.logger_level, args.process, is_json=args.json_output)
    # SIGTERM acts as Ctrl-C: the library then removes the file it was writing. Process 1 of a container would not even
    # get the signal without a handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if getattr(args, "lifeline", False):
        exit_when_closed(sys.stdin.fileno(), logger.error)
    if args.trust_remote_code:
        logger.warning("--trust-remote-code has no effect: code of a repository is never run, no model needs it")
    try:
        print(args.run(args))
    except StartError as error:
        logger.error("%s", error)
        sys.exit(1)
    except KeyboardInterrupt:
        logger.info("Stopped by a signal")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception:
        logger.exception("The %s command failed", args.command)
        sys.exit(1)


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Bring the variables that TGI's users set into the form that huggingface_hub reads."""
    for name in [name for name, value in environ.items() if not value]:
        del environ[name]  # the library would take an empty path or address for one
    if "HUGGINGFACE_HUB_CACHE" in environ:  # TGI's name, and the launcher's flag: it beats the library's own name
        environ["HF_HUB_CACHE"] = environ["HUGGINGFACE_HUB_CACHE"]
    if "HF_API_TOKEN" in environ:
        environ.setdefault("HF_TOKEN", environ["HF_API_TOKEN"])
    # TGI's images set this one. The library would only warn that it does nothing any more.
    environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    # The library would ask the Hub for a list of coding agents first, in order to tell which one runs it.
    environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def build_parser(environ: Mapping[str, str], shown: Mapping[str, str] = AS_TGI) -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog=PROGRAM,
        description="Tools around the engine. The server itself is started with text-generation-launcher.",
        epilog="COMMAND --help has examples. `text-generation-server chat URL` talks with a running server.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add_command(name: str, process: str, run: Callable[[argparse.Namespace], Path], **texts: Any) -> Any:
        formatter = argparse.RawDescriptionHelpFormatter
        program = shown.get(f"{PROGRAM} {name}", f"{PROGRAM} {name}")
        for words, others in shown.items():
            texts["epilog"] = texts["epilog"].replace(words, others)
        command = commands.add_parser(name, prog=program, formatter_class=formatter, allow_abbrev=False, **texts)
        command.set_defaults(run=run, process=process)
        return command

    download = add_command(
        "download-weights",
        "download",
        download_weights,
        help="fetch a model from the Hub into the cache",
        description=DOWNLOAD_DESCRIPTION,
        epilog=VARIABLES + DOWNLOAD_EXAMPLES,
    )
    _add_download_arguments(download)
    _add_log_arguments(download, environ)
    quantize = add_command(
        "quantize",
        "quantize",
        quantize_model,
        help="quantise a dense model into a folder",
        description=quantize_options.DESCRIPTION,
        epilog=f"{quantize_options.EPILOG}\n{VARIABLES}",
    )
    quantize_options.add_arguments(quantize)
    _add_log_arguments(quantize, environ)
    return parser


def _add_download_arguments(download: argparse.ArgumentParser) -> None:
    download.add_argument(
        "model_id", metavar="MODEL_ID", help="id on the Hub, gs://BUCKET/FOLDER, or a local folder to be checked"
    )
    download.add_argument("--revision", help="branch, tag, commit or refs/pr/N (default: main)")
    download.add_argument("--extension", default=".safetensors", help="only .safetensors (default) is supported")
    switches = {
        "auto-convert": (True, "accepted, without effect: pickled weights are never loaded, so never converted"),
        "trust-remote-code": (False, "accepted, without effect: code of a repository is never run"),
        "merge-lora": (False, "accepted, without effect: an adapter given as the model is merged while it is loaded"),
    }
    for name, (default, help_text) in switches.items():
        action = argparse.BooleanOptionalAction
        download.add_argument(f"--{name}", action=action, default=default, help=help_text)
    # Only the launcher gives these: of an adapter beside a model nothing else is wanted, and the end of standard input
    # is the launcher's end. By hand it may be closed from the start.
    download.add_argument("--adapter", action="store_true", help=argparse.SUPPRESS)
    download.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)


def _add_log_arguments(command: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    command.add_argument(
        "--logger-level",
        metavar="LEVEL",
        type=_log_filter,
        default=environ.get("LOG_LEVEL", "info"),
        help="debug, info, warn or error (default: LOG_LEVEL, or info)",
    )
    command.add_argument(
        "--json-output",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="log in JSON, one object per line",
    )


def _log_filter(text: str) -> str:
    try:
        parse_log_filter(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level: debug, info, warn or error") from None
    return text


def download_weights(args: argparse.Namespace) -> Path:
    """The model's folder. Raises StartError."""
    if args.extension != ".safetensors":
        raise StartError(
            f"--extension {args.extension} is not supported: only .safetensors weights are loaded, leave the option out"
        )
    if args.merge_lora:
        logger.warning("--merge-lora has no effect: an adapter given as the model is merged while it is loaded")
    # The module reads the environment when it is imported.
    from engine.checkpoint.hub import download_adapter, download_model

    model_id, revision = args.model_id, args.revision or None
    progress = StartProgress(_tell_launcher if args.lifeline else tell_nobody)
    if model_id.startswith(BUCKET_SCHEME):
        model_id = _copy_from_bucket(model_id, revision, progress, is_adapter=args.adapter)
        revision = None
    if args.adapter:
        return Path(model_id) if os.path.isdir(model_id) else download_adapter(model_id, revision, progress)
    if files := gguf_files(model_id):
        return _read_gguf(files, revision)
    folder = download_model(model_id, revision, progress)
    if (base := adapter_base(folder)) is not None:
        logger.info("%s is an adapter of %s", args.model_id, base.model_id)
        download_model(base.model_id, base.revision, progress)
    return folder


def _tell_launcher(stage: Stage, done: float | None, text: str) -> None:
    """Print a line of JSON, which no folder's line looks like."""
    print(json.dumps({"stage": stage, "done": done, "text": text}), flush=True)


def _read_gguf(files: Sequence[Path], revision: str | None) -> Path:
    """The folder of a model in GGUF files. Raises StartError."""
    from huggingface_hub import constants

    from engine.checkpoint.gguf_folder import gguf_folder

    if revision is not None:
        raise StartError("--revision is for models of the Hub: leave it out for a GGUF file")
    return gguf_folder(files, Path(constants.HF_HUB_CACHE))


def _copy_from_bucket(uri: str, revision: str | None, progress: StartProgress, *, is_adapter: bool) -> str:
    """The local copy of a model, or an adapter, in a bucket. Raises StartError."""
    from huggingface_hub import constants, is_offline_mode

    from engine.checkpoint.bucket import Storage, copy_model

    if revision is not None:
        raise StartError("--revision is for models of the Hub: leave it out for a bucket")
    if is_offline_mode():
        raise StartError(f"{uri} needs a network, and HF_HUB_OFFLINE is set: give a local folder")
    return str(copy_model(uri, Path(constants.HF_HUB_CACHE), Storage.of(os.environ), progress, is_adapter=is_adapter))


def quantize_model(args: argparse.Namespace) -> Path:
    """The folder that was written. Raises StartError."""
    options = quantize_options.read_options(args)
    # The launcher does the same for an engine: with its kernel cache nothing is compiled again.
    os.environ.update(engine_environment(len(os.sched_getaffinity(0)), dict(os.environ)))
    # Imported late: it reads the environment when it is imported, and loads torch, which --help can do without.
    from engine.quantize.quantize import quantize

    return quantize(options)


if __name__ == "__main__":
    main()
