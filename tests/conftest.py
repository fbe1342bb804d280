"""What all tests share: the environment the kernels need, and a tiny model."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

from engine.kernel_cache import share_kernels
from engine.link.environment import engine_environment

# Read by torch and Numba when they are first imported, so it is set before anything else is. Passive: the machine is
# shared, and two pools of threads would spin against each other.
NUM_THREADS = min(2, len(os.sched_getaffinity(0)))
os.environ.update(engine_environment(NUM_THREADS, dict(os.environ)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell lets what it runs beside itself ignore Ctrl-C, which some tests send to servers and to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples on every run; HYPOTHESIS_PROFILE=explore, in `make test-slow`, looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 in float32, tied, that can be loaded and served."""
    from tests.tiny_model import write_tiny_qwen2  # loads torch, which the server's tests do without

    folder = tmp_path_factory.mktemp("tiny-qwen2")
    write_tiny_qwen2(folder)
    return folder


@pytest.fixture(autouse=True)
def leaves_ctrl_c_alone() -> Iterator[None]:
    """A handler that a test leaves behind would keep Ctrl-C from the run, and from later tests that press it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before, "this test leaves its own handler of SIGINT behind"


def pytest_collection_finish() -> None:
    """Take what is loaded by now for permanent: to look through it for garbage takes 0.3 s each time.

    Kernels that tests call are shared with the commands that run beside this one, as a start shares them.
    """
    if "numba" in sys.modules:
        share_kernels()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter take everything apart at its end: what is frozen Triton's bindings report as leaked."""
    gc.unfreeze()
