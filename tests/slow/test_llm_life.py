"""The Python API's server ends with its owner, however that ends, and with nobody else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

ROOT = Path(__file__).parents[2]
START = """
    import os, sys, threading, time
    from pytgi import LLM
    llm = LLM(sys.argv[1], dtype="float32", show_progress=False)
    assert llm.generate("Hello", max_new_tokens=2).num_tokens == 2
"""
TELL = "    print('ready', flush=True); time.sleep(600)\n"


@contextlib.contextmanager
def running(program: str, model: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A program and what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(program), str(model)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout
        finally:
            process.kill()


def printed_by(program: str, model: Path) -> str:
    with running(program, model) as (process, _):
        return process.communicate(timeout=120)[0]


def server_of(program: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_a_program_that_is_killed(number: int, tiny_model_dir: Path) -> None:
    with running(START + TELL, tiny_model_dir) as (program, output):
        assert output.readline() == "ready\n"
        server = server_of(program)
        assert len(server) >= 3
        program.send_signal(number)
        program.wait(30)
    assert psutil.wait_procs(server, timeout=20)[1] == []


def test_the_server_ends_with_a_program_that_is_killed_while_it_starts(tiny_model_dir: Path) -> None:
    logging = "import logging; logging.basicConfig(level='INFO', stream=sys.stdout)\n    "
    with running(START.replace("from pytgi", f"{logging}from pytgi") + TELL, tiny_model_dir) as (program, output):
        while "Starting" not in output.readline():
            assert program.poll() is None
        server = server_of(program)
        program.kill()
        program.wait(30)
    assert psutil.wait_procs(server, timeout=30)[1] == []


def test_a_forked_process_does_not_keep_the_server(tiny_model_dir: Path) -> None:
    fork = "    child = os.fork() or time.sleep(600)\n    print(child, flush=True); time.sleep(600)\n"
    with running(START + fork, tiny_model_dir) as (program, output):
        survivor = psutil.Process(int(output.readline()))
        server = [process for process in server_of(program) if process != survivor]
        program.kill()
        program.wait(30)
        assert len(server) >= 3 and psutil.wait_procs(server, timeout=20)[1] == []
        assert survivor.is_running()
        survivor.kill()


LEFT = """
    import gc, psutil
    del llm
    gc.collect()
    print(len(psutil.Process().children()), flush=True)
"""
IN_A_THREAD = """
    made = []
    thread = threading.Thread(target=lambda: made.append(LLM(sys.argv[1], dtype="float32")))
    thread.start(); thread.join(); time.sleep(1)
    print(made[0].generate("Hello", max_new_tokens=3).num_tokens, flush=True)
"""
SHARED = """
    from concurrent.futures import ThreadPoolExecutor
    with LLM(sys.argv[1], dtype="float32", max_concurrent_requests=4) as small, ThreadPoolExecutor(5) as pool:
        batches = pool.map(lambda _: small.generate(["Hello"] * 5, max_new_tokens=50, ignore_eos=True), range(5))
        print(sum(map(len, batches)), flush=True)
"""
ENDED_MEANWHILE = """
    def answer():
        try:
            llm.generate(["Hello"] * 600, max_new_tokens=400, ignore_eos=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    thread = threading.Thread(target=answer)
    thread.start(); time.sleep(0.5)
    {end}
    thread.join()
"""
WITHOUT_STREAMS = """
    import os, sys
    for number in (0, 1, 2):
        os.close(number)
    from pytgi import LLM
    with LLM(sys.argv[1], dtype="float32") as llm, open(sys.argv[1] + "/said", "w") as output:
        output.write(str(llm.generate("Hello", max_new_tokens=3).num_tokens))
"""
AT_EXIT = "    print(llm._server._folder, flush=True)\n"


def test_an_object_that_is_collected_takes_its_server_along(tiny_model_dir: Path) -> None:
    assert printed_by(START + LEFT, tiny_model_dir) == "0\n"


def test_a_server_outlives_the_thread_that_started_it(tiny_model_dir: Path) -> None:
    assert printed_by(START + IN_A_THREAD, tiny_model_dir) == "3\n"


def test_nothing_is_left_at_the_end_of_a_program(tiny_model_dir: Path) -> None:
    folder = printed_by(START + AT_EXIT, tiny_model_dir).strip()
    assert folder.startswith("/") and not Path(folder).exists()


def test_threads_that_share_an_llm_wait_for_each_other(tiny_model_dir: Path) -> None:
    assert printed_by(START + SHARED, tiny_model_dir) == "25\n"


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("llm.close()", "RuntimeError this LLM was closed while it answered"),
        ("os.kill(llm._server._process.pid, 9)", "ServerDiedError the server was ended by signal 9, Killed"),
    ],
)
def test_requests_are_told_how_the_server_ended_under_them(end: str, words: str, tiny_model_dir: Path) -> None:
    assert printed_by(START + ENDED_MEANWHILE.format(end=end), tiny_model_dir).startswith(words)


def test_a_program_without_standard_streams_has_answers(tiny_model_dir: Path) -> None:
    printed_by(WITHOUT_STREAMS, tiny_model_dir)
    assert (tiny_model_dir / "said").read_text() == "3"


def test_nothing_is_left_by_a_program_that_is_killed(tiny_model_dir: Path) -> None:
    tell = "    print(llm._server._folder, flush=True); time.sleep(600)\n"
    with running(START + tell, tiny_model_dir) as (program, output):
        folder = Path(output.readline().strip())
        assert folder.is_dir()
        server = server_of(program)
        program.kill()
        assert psutil.wait_procs(server, timeout=20)[1] == []
    assert not folder.exists()
