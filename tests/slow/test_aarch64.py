"""64-bit ARM with dot products, in qemu's emulation: the tests of the CPU kernels, and a server that answers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.e2e.launched import LaunchedServer, free_port, launched
from tests.slow.arm import FEATURES, ROOT, arm_command, emulator, packages, system
from tests.tiny_model import write_tiny_qwen2

TESTS = ("tests/contract/kernels", "tests/unit/quant", "tests/unit/parallel/test_partition.py")
COMPARED = ("tests/contract/kernels/test_sampler.py", "tests/contract/test_oracle_files.py")
"""Not among them: they compare with transformers, which this environment does without."""
FORMS: dict[str, list[str]] = {
    "float32": [],
    "two shards": ["--num-shard", "2"],
    "int8": ["--quantize", "eetq"],
    "int4": ["--quantize", "int4"],
}
LIMITS = "--max-input-tokens 32 --max-total-tokens 64 --max-batch-prefill-tokens 64".split()
PROMPTS = ["hello there general", "what is the answer", "a"]
START_TIMEOUT_S = 3600.0


@pytest.mark.timeout(7200)
def test_the_kernels_pass_their_tests(tmp_path: Path) -> None:
    root = system()
    environ = {
        **os.environ,
        "PYTHONPATH": f"{packages()}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        # The emulator shows the host's /proc/cpuinfo, so nothing is found by itself.
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": FEATURES,
    }
    command = [emulator(), "-cpu", "max", "-L", root, root / "usr/bin/python3.11", "-m", "pytest", "-q"]
    ignored = [f"--ignore={file}" for file in COMPARED]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--timeout=3600", *TESTS, *ignored], cwd=ROOT, env=environ
    )
    assert done.returncode == 0


@contextmanager
def launched_in_arm(model: Path, folder: Path, *flags: str) -> Iterator[LaunchedServer]:
    """A server whose every process is emulated. `folder`, which holds the model, keeps the compiled kernels."""
    port = free_port()
    program = ["/usr/bin/python3.11", "-P", "-m", "pytgi", "serve", str(model), "--port", str(port), *flags]
    log_path = folder / f"arm-{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(arm_command(program, folder), stdout=log, stderr=subprocess.STDOUT)
    server = LaunchedServer(process, port, log_path)
    try:
        server.wait_for_log("Connected", START_TIMEOUT_S)
        yield server
    finally:
        process.kill()  # of a launcher that has not ended yet: its children end with it
        process.wait()


def ids_of(server: LaunchedServer) -> list[list[int]]:
    """What greedy decoding makes of each prompt."""
    answers = [server.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    return [[token["id"] for token in answer["details"]["tokens"]] for answer in answers]


@pytest.mark.timeout(14400)
def test_a_server_gives_the_ids_of_this_machine(tmp_path: Path) -> None:
    """Launcher, HTTP process and engines answer in every form, and end in good order."""
    model = tmp_path / "model"
    model.mkdir()
    write_tiny_qwen2(model, dtype=torch.float32)
    for name, flags in FORMS.items():
        with launched(model, tmp_path, *LIMITS, *flags) as here:
            expected = ids_of(here)
        with launched_in_arm(model, tmp_path, *LIMITS, *flags) as server:
            assert ids_of(server) == expected, name
            server.process.send_signal(signal.SIGTERM)
            assert server.wait_for_end(120) == 0, server.log
