"""The public face: the hosts it takes, where it finds the packages that serve, commands, options, parameters."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import pytgi
from pytgi import LLM, rooms
from pytgi.child import RESERVED_OPTIONS, flags_of
from pytgi.commands import COMMANDS, HELP
from pytgi.errors import RequestError
from pytgi.host import UnsupportedHostError, check_host
from pytgi.parameters import ChatParameters, GenerateParameters, check_names
from pytgi.wire import error_of
from server.launcher.flags import every_flag
from server.requests.guided import GUIDED_KEYS
from server.requests.native import GenerateParameters as NativeParameters
from server.requests.openai import ChatRequest
from server.requests.serde import spellings_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOREIGN_PACKAGE = "raise SystemExit('a foreign package was imported')"


@pytest.mark.parametrize(
    ("platform", "version", "words"),
    [
        ("darwin", (3, 13), "Linux only, and this is macOS: use a container"),
        ("win32", (3, 11), "Linux only, and this is Windows: use WSL 2"),
        ("freebsd14", (3, 11), "Linux only, and this is freebsd14"),
        ("linux", (3, 10), "needs Python 3.11 or newer, and this is 3.10"),
        ("linux", (2, 7), "needs Python 3.11 or newer, and this is 2.7"),
    ],
)
def test_other_hosts_are_told_in_a_sentence_what_is_missing(
    platform: str, version: tuple[int, int], words: str
) -> None:
    with pytest.raises(UnsupportedHostError, match=words):
        check_host(platform, version)


@pytest.mark.parametrize("version", [(3, 11), (3, 14), (4, 0)])
def test_linux_with_a_new_python_is_taken(version: tuple[int, int]) -> None:
    check_host("linux", version)


@pytest.mark.parametrize("command", ["-m pytgi serve x", "-m pytgi", "-c from_pytgi_import_LLM"])
def test_no_command_shows_a_traceback_on_another_host(command: str, tmp_path: Path) -> None:
    """A site hook plays the host."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.platform = 'darwin'")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    arguments = [argument.replace("_", " ") for argument in command.split()]
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pytgi runs on Linux only, and this is macOS: use a container")
    assert ("Traceback" in done.stderr) == ("-c" in command)  # a program gets an exception


@pytest.mark.parametrize("name", "__init__ __main__ commands host rooms".split())
def test_an_old_python_can_read_what_refuses_it(name: str) -> None:
    ast.parse((ROOT / "pytgi" / f"{name}.py").read_text(), feature_version=(3, 6))


def test_the_rooms_stand_beside_the_package_in_a_checkout() -> None:
    assert Path(rooms.FOLDER) == ROOT


@pytest.mark.parametrize(
    ("before", "after"),
    [("", []), (":", []), ("/a::/b", ["/a", "/b"]), (f"/a:{rooms.FOLDER}", ["/a"])],
    ids=["none", "empty entries", "an empty entry between", "ours already"],
)
def test_ours_come_first_on_a_childs_path(before: str, after: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty entry would be the folder that the child starts in."""
    monkeypatch.setenv("PYTHONPATH", before)
    assert rooms.child_environ()["PYTHONPATH"].split(":") == [rooms.FOLDER, *after]


def test_the_packages_are_ours_in_every_process_of_a_command(tmp_path: Path) -> None:
    for place in ("cwd", "path"):
        for name in ("server", "engine", "parallel", "quant"):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "__init__.py").write_text(FOREIGN_PACKAGE)
    child = "[sys.executable, '-P', '-c', 'import server, engine, parallel, quant; print(server.__file__)']"
    program = f"import subprocess, sys; from pytgi.rooms import put_first; put_first(); subprocess.run({child})"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(ROOT)])}
    command = [sys.executable, "-c", f"{program}; import server; print(server.__file__)"]
    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "server" / "__init__.py")] * 2


def test_every_command_is_in_the_help_and_in_a_readers_reach() -> None:
    for name in COMMANDS:
        assert f"\n  {name} " in HELP
    done = subprocess.run([sys.executable, "-m", "pytgi", "serv"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("Did you mean serve?\n")


def test_the_version_stands_in_one_place() -> None:
    assert pytgi.__version__ == PROJECT["version"]
    places = [path for path in (ROOT / "pytgi").rglob("*.py") if PROJECT["version"] in path.read_text()]
    assert not places


def test_everything_public_can_be_had() -> None:
    assert all(getattr(pytgi, name) for name in pytgi.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        pytgi.__getattr__("LLMs")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"quantize": "int4", "num_shard": 2}, ["--quantize=int4", "--num-shard=2"]),
        ({"disable_grammar_support": True, "strict_tgi": False, "revision": None}, ["--disable-grammar-support"]),
        ({"cuda_graphs": [1, 2, 4]}, ["--cuda-graphs=1,2,4"]),
        ({"rope_factor": -1.5}, ["--rope-factor=-1.5"]),
    ],
)
def test_options_are_the_launchers_flags(options: dict[str, Any], flags: list[str]) -> None:
    assert flags_of(options) == flags


@pytest.mark.parametrize("name", RESERVED_OPTIONS)
def test_what_an_llm_sets_itself_is_no_option(name: str) -> None:
    assert name in {flag.attribute for flag in every_flag()}
    with pytest.raises(TypeError, match=f"{name} is no option of an LLM: "):
        flags_of({name: "x"})


def test_the_parameters_are_those_of_the_wire() -> None:
    """Every spelling of each, so that nothing the server reads is refused as unknown."""
    native = {name for _, names in spellings_of(NativeParameters) for name in names}
    assert set(GenerateParameters.__annotations__) == native
    chat = {name for _, names in spellings_of(ChatRequest) for name in names} | GUIDED_KEYS
    assert set(ChatParameters.__annotations__) == chat - {"messages", "stream", "length_key", "format_key"}


def test_a_parameter_that_nobody_reads_is_refused_with_the_next_best_name() -> None:
    with pytest.raises(TypeError, match="max_new_token is no parameter of such a request, did you mean max_new_tokens"):
        check_names({"max_new_token": 3}, GenerateParameters)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"error": "a", "error_type": "validation"}, ("a", "validation", None)),
        ({"error": {"message": "b", "type": "t", "code": "c", "param": "n"}}, ("b", "c", "n")),
        ({"error": {"message": "b", "type": "t", "code": None}}, ("b", "t", None)),
    ],
)
def test_both_error_objects_become_exceptions(body: dict[str, Any], told: tuple[str, str, str | None]) -> None:
    error = error_of(422, body)
    assert isinstance(error, RequestError)
    assert (str(error), error.error_type, error.param, error.status) == (*told, 422)


def test_every_dependency_has_an_upper_bound_that_the_tested_versions_keep() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    extras = [text for name in ("cuda", "interpreted") for text in PROJECT["optional-dependencies"][name]]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        assert any(bound.operator == "<" for bound in requirement.specifier), requirement
        pin = pins.get(requirement.name.lower())
        assert pin is None or pin in requirement.specifier, requirement


@pytest.mark.parametrize("flags", [["--replicas", "3"], ["--replicas=3", "--max-best-of", "2"]])
def test_replicas_are_served_by_their_own_command(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("server.replicas.command.serve_replicas", lambda arguments, _: seen.append(arguments) or 0)
    with pytest.raises(SystemExit) as end:
        COMMANDS["serve"](["my-model", *flags])
    assert (end.value.code, seen) == (0, [["--model-id", "my-model", *flags]])


@pytest.mark.parametrize(
    ("flags", "exit_code", "last_line"),
    [
        (["--replicas", "0"], 2, "argument --replicas: 0 is neither a number of replicas nor MIN:MAX"),
        (["--replicas", "3:2"], 2, "argument --replicas: 3:2: the first number is the smaller one"),
        (["--replicas", "2"], 1, "--replicas needs Ray Serve: pip install 'pytgi[ray]'"),
    ],
)
def test_replicas_that_cant_be_are_refused_in_a_sentence(flags: list[str], exit_code: int, last_line: str) -> None:
    """Ray is not in this environment."""
    command = [sys.executable, "-m", "pytgi", "serve", "my-model", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert (done.stdout + done.stderr).splitlines()[-1].endswith(last_line)


@pytest.mark.parametrize("prompts", [{"role": "user"}, b"x", 3, None, {"a", "b"}, iter("ab")])
def test_what_is_no_prompt_and_no_list_of_prompts_is_a_type_error(prompts: Any) -> None:
    llm = object.__new__(LLM)  # no server is needed to refuse it
    for call, words in ((llm.generate, "a list of texts"), (llm.chat, "a list of messages")):
        with pytest.raises(TypeError, match=f"{words}.* and this is a {type(prompts).__name__}"):
            call(prompts)
    with pytest.raises(TypeError, match="this is a str"):
        llm.chat("What is a prime?")


@pytest.mark.parametrize(
    "arguments",
    ["serve --help", "serve m --replicas 2 --help", "download --help", "quantize --help", "chat --help"],
)
def test_help_shows_the_command_that_was_typed(arguments: str) -> None:
    done = run_pytgi(arguments)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: pytgi {arguments.split()[0]} ")
    assert f"\n  pytgi {arguments.split()[0]} " in done.stdout.partition("Examples:")[2]
    assert "text-generation-" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("download", "pytgi download: error: the following arguments are required: MODEL_ID"),
        ("quantize --nothing", "pytgi quantize: error:"),
        ("serve m --replicas", "pytgi serve: error: argument --replicas: expected one argument"),
        ("serve --port 1 m", "unrecognized arguments: m\n\nUsage: pytgi serve MODEL [flags]"),
        ("serve m --replicas 2 --bogus", "unrecognized arguments: --bogus\n\nUsage: pytgi serve MODEL [flags]"),
        ("serve m --deploy-only", "pytgi serve: error: the following arguments are required: --replicas"),
        ("chat --sytem x", "pytgi chat: error: unrecognized arguments: --sytem (did you mean --system?)"),
        ("chat ftp://x", "pytgi chat: error: ftp://x is no http:// or https:// address"),
        (
            "chat x --api-key é",
            "pytgi chat: error: the address and the API key may have printable ASCII characters only",
        ),
        ("compile x", "pytgi compile takes no arguments"),
    ],
)
def test_usage_errors_name_the_command_that_was_typed(arguments: str, words: str) -> None:
    done = run_pytgi(arguments)
    assert done.returncode == 2 and words in done.stderr and "text-generation-" not in done.stderr


def run_pytgi(arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytgi", *arguments.split()]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
