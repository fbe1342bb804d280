"""The documents are true: every command in them that can run here is run, every link leads somewhere.

The commands run as they are written, but for three things. They meet a server on a free port. Models of the Hub are
stand-ins in a cache made here, tiny and random. Answers of hundreds of tokens are cut to 32.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from _pytest.mark import ParameterSet

from server.launcher.args import parse_args
from server.launcher.flag import Effect
from server.launcher.flags import every_flag
from tests.e2e.documents import COMMAND_LANGUAGES, Block, read_blocks
from tests.e2e.launched import LaunchedServer, free_port, launched
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
BLOCKS = [block for path in sorted(DOCUMENTS) for block in read_blocks(path.read_text(), str(path.relative_to(ROOT)))]
COMMANDS = [block for block in BLOCKS if block.language in COMMAND_LANGUAGES]
LAUNCHER = "text-generation-launcher "

DOCKER = "docker run --gpus all --shm-size 1g -p 8080:80 -v $PWD/data:/data pytgi \\"
MAKE_IMAGE = 'make image TARGET=cpu ARGS="--build-arg TORCH_INDEX=<PyTorch\'s index of CPU builds>"'
TWO_HOSTS = "text-generation-launcher --model-id Qwen/Qwen2-7B-Instruct --port 8080 \\"
HOST_NETWORK = "docker run --gpus all --shm-size 1g --network host -v $PWD/data:/data -e PORT=8080 pytgi \\"
TORCHRUN = "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29500 \\"
NOT_RUN = {
    ("README.md", "make test"): "runs all tests, this one too",
    ("README.md", "pytgi chat http://localhost:8080"): "test_terminal.py types into it",
    ("docs/terminal.md", "pytgi chat http://localhost:8080"): "as above",
    ("README.md", "pip install dist/pytgi-*.whl"): "tests/slow/test_wheel.py installs it and serves",
    ("README.md", MAKE_IMAGE): "no Docker engine here; make image-test builds the same target",
    (
        "docs/install.md",
        "python3 -m venv .venv",
    ): "installs a gigabyte; tried by hand, the offline one without a network",
    ("docs/install.md", "pip wheel --wheel-dir wheelhouse -c constraints.txt torch==2.13.0 ."): "as above",
    ("docs/install.md", "conda create -n pytgi -c conda-forge python=3.11 libgomp"): "no conda and no channels here",
    ("docs/install.md", MAKE_IMAGE): "no Docker engine here; make image-test builds the same target",
    ("docs/deployment.md", DOCKER): "no Docker engine here",
    ("docs/deployment.md", TWO_HOSTS): "both are run by test_two_hosts.py",
    ("docs/deployment.md", HOST_NETWORK): "no Docker engine here",
    ("docs/deployment.md", TORCHRUN): "needs two hosts; test_shards.py runs torchrun on one",
    (
        "docs/platforms.md",
        "MODEL_ID=Qwen/Qwen2.5-0.5B-Instruct docker compose --profile cpu up --build",
    ): "no Docker engine here; test_recipes.py and test_prometheus.py go as far as they can",
    (
        "docs/platforms.md",
        'kubectl create secret generic pytgi --from-literal=HF_TOKEN="$HF_TOKEN" --from-literal=API_KEY="$API_KEY"',
    ): "no cluster here; test_recipes.py goes as far as it can",
    ("docs/other-apis.md", "from anthropic import Anthropic"): "not in .venv; test_tool_loop.py has a loop with it",
    ("docs/migrating.md", MAKE_IMAGE): "as above",
    ("docs/deployment.md", MAKE_IMAGE): "as above",
    (
        "docs/models.md",
        "pytgi serve Qwen/Qwen2.5-0.5B-Instruct --lora-adapters sql=/data/sql-lora,prose=/data/prose-lora",
    ): "tests/slow/test_lora.py serves adapters",
    (
        "docs/replicas.md",
        "pytgi serve my-model --replicas 2 --port 8080",
    ): "tests/replicas does",
    (
        "docs/replicas.md",
        "RAY_AUTH_MODE=token RAY_ADDRESS=... pytgi serve another-model --replicas 2 --deploy-only "
        "--replica-host 127.0.0.1",
    ): "tests/replicas does",
}
"""Commands without a marker, by document and first line, and why they are not run here."""

HUB_MODELS = {
    "Qwen/Qwen2-7B-Instruct": "my-model",
    "Qwen/Qwen2-7B-Instruct-GPTQ-Int4": "my-gptq-model",
    "Qwen/Qwen2.5-0.5B-Instruct": "my-model",
}
"""Models of the Hub, and the tiny folder that stands in for each."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMEOUT_S = 120
CURLRC = f"silent\nshow-error\nfail-with-body\nmax-time = {TIMEOUT_S}\n"


def name_of(block: Block) -> str:
    return f"{block.document}:{block.line}"


@pytest.fixture(scope="module")
def server(small_demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(small_demo_model, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a checkout made of links, with a model `my-model`, a Hub cache and curl's settings.

    It lacks our packages: imported from there, they would have their kernels compiled anew.
    """
    folder = tmp_path_factory.mktemp("checkout")
    link_all((path for path in ROOT.iterdir() if not (path / "__init__.py").is_file()), folder)
    (folder / ".venv").unlink(missing_ok=True)
    link_all(Path(sys.prefix).iterdir(), folder / ".venv")
    for name in ("installed", "compiled"):  # newer than all that make compares them with: nothing is installed here
        (folder / ".venv" / name).unlink(missing_ok=True)
        (folder / ".venv" / name).touch()
    write_tiny_qwen2(folder / "my-model", max_position_embeddings=32768, hidden_size=128, intermediate_size=256)
    (folder / "my.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    write_tiny_gptq(folder / "my-gptq-model", max_position_embeddings=32768)
    for model_id, stand_in in HUB_MODELS.items():
        repository = folder / "hub" / f"models--{model_id.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / COMMIT).symlink_to(folder / stand_in)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    (folder / ".curlrc").write_text(CURLRC)
    return folder


def link_all(paths: Iterable[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in paths:
        (target / path.name).symlink_to(path)


@pytest.fixture
def environ(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CURL_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HOSTNAME": "127.0.0.1",  # what the commands launch is for nobody else
        "MODEL": str(folder / "my-model"),  # what `make serve` serves
        "PORT": str(free_port()),
    }


def launches_of(block: Block) -> list[list[str]]:
    """The arguments of each launcher that the block starts."""
    lines = [line.partition(LAUNCHER) for line in lines_of(block)]
    return [shlex.split(arguments) for _, launcher, arguments in lines if launcher]


def lines_of(block: Block) -> list[str]:
    return block.text.replace("\\\n", " ").splitlines()


def runnable_blocks() -> Iterator[ParameterSet]:
    """Blocks that run; those that only launch, with flags of earlier blocks whatever their values, are long."""
    met: set[str] = set()
    for block in COMMANDS:
        if block.run is not None:
            launches = launches_of(block)
            flags = {part for arguments in launches for part in arguments if part.startswith("--")}
            is_long = bool(flags) and flags <= met and len(launches) == len(lines_of(block))
            met |= flags
            yield pytest.param(block, id=name_of(block), marks=pytest.mark.long if is_long else ())


@pytest.mark.parametrize("block", [*runnable_blocks()])
def test_runnable_block(block: Block, folder: Path, environ: dict[str, str], server: LaunchedServer) -> None:
    assert block.run is not None
    text = block.text.replace("localhost:8080", f"127.0.0.1:{server.port}")
    text = text.replace("--port 8080", f"--port {environ['PORT']}")
    text = re.sub(r'(tokens"?[:=] ?)\d{3,}', r"\g<1>32", text)
    shell = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    log_path = folder / f"{block.document.replace('/', '-')}-{block.line}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([*shell, text], cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        if block.run.stopped_at is not None:
            stop_at(block.run.stopped_at, process, log_path)
        exit_code = process.wait(TIMEOUT_S)
    finally:
        kill_all(process)
    printed = log_path.read_text()
    assert exit_code == block.run.exit_code, printed
    assert printed.strip()
    assert exit_code != 0 or '"error"' not in printed, printed  # an event of a stream can say so under status 200
    for line in block.printed:
        assert line in printed


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the process of a block and its children, so that nothing is left of one that went wrong."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def stop_at(text: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    """Send SIGTERM to the launcher once `text` is in the log."""
    deadline = time.monotonic() + TIMEOUT_S
    while text not in (printed := log_path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, printed
        time.sleep(0.05)
    here = psutil.Process(process.pid)
    launchers = [
        candidate
        for candidate in (here, *here.children(recursive=True))
        if any(part.endswith(("/text-generation-launcher", "/pytgi")) for part in candidate.cmdline())
    ]
    launchers[-1].send_signal(signal.SIGTERM)


@pytest.mark.parametrize("block", [block for block in COMMANDS if block.run and launches_of(block)], ids=name_of)
def test_the_launcher_reads_the_flags_of_a_block(block: Block) -> None:
    for arguments in launches_of(block):
        assert parse_args(arguments, {}).port == 8080


def test_every_command_is_run_or_has_a_reason() -> None:
    unmarked = {(block.document, block.first_line) for block in COMMANDS if block.run is None}
    assert unmarked == NOT_RUN.keys()


def test_the_flags_named_in_migrating_do_what_it_says() -> None:
    rows = (ROOT / "docs" / "migrating.md").read_text().splitlines()
    for start, effect in (("| refused, exit code 1 |", Effect.REFUSED), ("| no effect,", Effect.NONE)):
        (row,) = [row for row in rows if row.startswith(start)]
        some = {flag.name for flag in every_flag() if flag.refused_choices and effect is Effect.REFUSED}
        assert set(re.findall(r"`--([a-z-]+)", row)) == some | {
            flag.name for flag in every_flag() if flag.effect is effect
        }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file_name, _, anchor = target.partition("#")
        linked = path.parent / file_name if file_name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def anchors_of(path: Path) -> set[str]:
    """Headings as links name them: lower case, dashes for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


EXAMPLE = """\
<!-- runnable -->
```sh
echo hello
```

<!-- runnable, exit code 2 -->
```sh
false
```

<!-- printed -->
```text
one
two
```

```python
print()
```
"""


def test_markers_are_read() -> None:
    hello, fails, _, unmarked = read_blocks(EXAMPLE, "a.md")
    assert (hello.text, hello.line, hello.printed) == ("echo hello\n", 2, [])
    assert fails.run is not None and (fails.run.exit_code, fails.printed) == (2, ["one", "two"])
    assert unmarked.run is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\nls\n```\n", "no known language"),
        ("```bash\nls\n```\n", "no known language"),
        ("<!-- runnable: yes -->\n```sh\nls\n```\n", "can't be understood"),
        ("<!-- runnable -->\n\n```sh\nls\n```\n", "before no block"),
        ("<!-- printed -->\n```text\nhello\n```\n", "no runnable block"),
        ("- item\n\n  ```sh\n  ls\n  ```\n", "indented"),
    ],
)
def test_a_marker_that_would_mark_nothing_is_a_mistake(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_blocks(text, "a.md")
