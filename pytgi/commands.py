"""The commands: `pytgi` and the three of TGI.

Each looks at the host first and finds our packages (`pytgi.rooms`); only then does it import what does the work.
"""

import sys

from pytgi import rooms
from pytgi.host import UnsupportedHostError, check_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

USAGE_EXIT_CODE = 2

SERVE_USAGE = """\
pytgi serve MODEL [flags]
       pytgi serve MODEL --replicas N|MIN:MAX [--replica-host IP] [--deploy-only] [flags]"""
OUR_WORDS = {
    "text-generation-server download-weights": "pytgi download",
    "text-generation-server quantize": "pytgi quantize",
    "text-generation-launcher --model-id": "pytgi serve",
}
"""What --help says in place of TGI's commands."""
REPLICA_FLAGS = ("--replicas", "--replica-host", "--deploy-only")

HELP = """\
Usage: pytgi COMMAND ...

Commands:
  serve MODEL [flags]     serve a model, a folder or an id on the Hub; the flags are those of text-generation-launcher
                          (--replicas N: so many servers behind one port, with the extra `ray`)
  download MODEL          fetch a model ahead of the start (text-generation-server download-weights)
  quantize MODEL OUTPUT   write a quantised checkpoint (text-generation-server quantize)
  chat URL                talk with a running server in the terminal (text-generation-server chat)
  bench --url URL         load on a server and its latencies, or on an engine alone (text-generation-benchmark)
  compile                 compile the CPU kernels, so that the first start need not

`pytgi COMMAND --help` says more; `pytgi --version` prints the version. In Python: `from pytgi import LLM`.
"""


def main() -> None:
    """The command `pytgi`, also as `python -m pytgi`."""
    _prepare()
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name in ("-V", "--version"):
        import pytgi

        print("pytgi", pytgi.__version__)
    elif name in COMMANDS:
        COMMANDS[name](arguments)
    else:
        print(_complaint(name), file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)


def text_generation_launcher() -> None:
    """TGI's command that serves."""
    _prepare()
    from server.launcher.main import main as launch

    launch()


def text_generation_server() -> None:
    """TGI's command with the tools around the engine, and ours that talks with a server."""
    _prepare()
    if sys.argv[1:2] == ["chat"]:
        from server.terminal.command import main as chat

        sys.exit(chat(sys.argv[2:]))
    from engine.cli import main as run_tool

    run_tool()


def text_generation_benchmark() -> None:
    """TGI's command that measures."""
    _prepare()
    from server.bench.command import main as measure

    sys.exit(measure(sys.argv[1:]))


def _prepare() -> None:
    try:
        check_host()
    except UnsupportedHostError as error:
        sys.exit(str(error))
    rooms.put_first()


def _complaint(name: str) -> str:
    import difflib

    if not name:
        return HELP.rstrip()
    near = difflib.get_close_matches(name, COMMANDS, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"error: {name!r} is no command of pytgi, which has {', '.join(COMMANDS)}.{guess}"


def _serve(arguments: "list[str]") -> None:
    """`pytgi serve MODEL [flags]`."""
    is_model = arguments and not arguments[0].startswith("-")
    flags = [*(["--model-id"] if is_model else []), *arguments]
    if any(flag.partition("=")[0] in REPLICA_FLAGS for flag in flags) and not {"-h", "--help"} & set(flags):
        from server.replicas.command import serve_replicas

        sys.exit(serve_replicas(flags, SERVE_USAGE))
    from server.launcher.main import main as launch

    sys.argv[1:] = flags
    launch(usage=SERVE_USAGE)


def _download(arguments: "list[str]") -> None:
    _run_tool("download-weights", arguments)


def _quantize(arguments: "list[str]") -> None:
    _run_tool("quantize", arguments)


def _run_tool(command: str, arguments: "list[str]") -> None:
    from engine.cli import main as run_tool

    sys.argv[1:] = [command, *arguments]
    run_tool(OUR_WORDS)


def _bench(arguments: "list[str]") -> None:
    from server.bench.command import main as measure

    sys.exit(measure(arguments, "pytgi bench"))


def _chat(arguments: "list[str]") -> None:
    from server.terminal.command import main as chat

    sys.exit(chat(arguments, "pytgi chat"))


def _compile(arguments: "list[str]") -> None:
    if arguments:
        is_help = arguments in (["-h"], ["--help"])
        text = "pytgi compile takes no arguments: it compiles the CPU kernels into the user's cache"
        print(text, file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else USAGE_EXIT_CODE)
    from engine.compile import main as compile_kernels

    compile_kernels()


COMMANDS: "dict[str, Callable[[list[str]], None]]" = {
    "serve": _serve,
    "download": _download,
    "quantize": _quantize,
    "chat": _chat,
    "bench": _bench,
    "compile": _compile,
}
"""Name -> what runs it with the arguments that follow."""
