"""Variables that an engine process must be started with, since libraries read them on import, and the cache folder."""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from engine.link.errors import StartError

logger = logging.getLogger(__name__)


CPUINFO = Path("/proc/cpuinfo")
MIN_FREE_BYTES = 32 << 20
"""Space that a cache folder needs: the kernels of one model and device take 2 to 7 MB."""
SHARED_MEMORY = "/dev/shm"
"""Writable also where the file system is not, as in many containers."""


def user_cache_dir(environ: dict[str, str]) -> Path:
    """`pytgi` under the user's cache folder; where that has no place, a new temporary folder and a warning.

    The temporary one is removed when this process ends. Its name cannot be guessed: Numba's cache is pickled, and a
    user who can write it can run code as us. Raises StartError when no folder can be made.
    """
    try:
        base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pytgi"
        base.mkdir(parents=True, exist_ok=True)
        _check_space(base)
        return base
    except (OSError, RuntimeError) as error:  # RuntimeError: HOME is unset, and the user has no entry with one
        logger.warning("No cache folder can be written (%s): compiled kernels are kept for this run only", error)
    reasons = []
    for parent in (None, SHARED_MEMORY):
        try:
            folder = Path(tempfile.mkdtemp(prefix="pytgi-", dir=parent))
        except OSError as error:
            reasons.append(str(error))
            continue
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            _check_space(folder)
            return folder
        except OSError as error:
            reasons.append(str(error))
    raise StartError(
        f"No folder can be written for compiled kernels ({'; '.join(reasons)}): set XDG_CACHE_HOME or TMPDIR to one "
        "that can"
    )


def _check_space(folder: Path) -> None:
    """Raise OSError where files can't be written, or not enough of them."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))  # a quota has space for nothing, whatever the disk has
        file.flush()
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, f"only {free >> 20} MiB are free", str(folder))


def shipped_kernels(prefix: Path) -> Path:
    """Where an image or an administrator keeps kernels that were compiled for everybody who uses this Python.

    `XDG_CACHE_HOME=<prefix>/share pytgi compile` puts them there.
    """
    return prefix / "share" / "pytgi" / "numba" / _kernel_version()


def _numba_folder(cache: Path, shipped: Path) -> Path:
    """This version's folder of compiled kernels in `cache`; a new one begins with those that were shipped.

    They are copied since Numba refuses a folder that it can't write. What can't be copied is compiled.
    """
    folder = cache / "numba" / shipped.name
    if folder.exists() or not shipped.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(shipped, unfinished, dirs_exist_ok=True)
        unfinished.rename(folder)
    except OSError as error:  # another launcher was first, or the disk is full
        shutil.rmtree(unfinished, ignore_errors=True)
        logger.debug("The compiled kernels in %s were not copied: %s", shipped, error)
    return folder


def _processor_variables() -> dict[str, str]:
    """LLVM's features for Numba on 64-bit ARM with dot products, nothing elsewhere.

    LLVM knows the features of processors that it knows by name. Of others it may not list dot products, which the
    integer kernels are made of.
    """
    if platform.machine() != "aarch64" or not re.search(r"^Features\s*:.*\basimddp\b", CPUINFO.read_text(), re.M):
        return {}
    return {"NUMBA_CPU_FEATURES": "+fp-armv8,+neon,+dotprod"}


def _memory_variables() -> dict[str, str]:
    """How glibc keeps an engine's memory: what a step has freed is there for the next one.

    By itself it gives more than 32 MB back at once, which a prompt's activations take: to have them anew for every
    layer, page by page, took 4 % of a prompt of 4,096 tokens. Before 2.35 it ignores such a threshold, and then takes
    128 KB for it.
    """
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return {}
    return {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}


def engine_environment(num_threads: int, environ: dict[str, str]) -> dict[str, str]:
    """Variables that the user has not set and an engine process needs before its libraries are first imported.

    Numba's `omp` layer starts a parallel region in 5 us where `workqueue` takes 60 and dies of concurrent calls; it
    needs libgomp, which `engine.start` checks. libgomp's threads spin a short while between two regions, then sleep:
    with its default of milliseconds, one busy neighbour on 2 cores makes decoding ten times slower (43 ms per token
    became 500), with this about twice. torch asks for huge pages: weights are read up to 10 % faster through them than
    through 4 KB pages. Its log level silences the store's warnings of hosts without a name.
    """
    cache = user_cache_dir(environ)
    defaults = {
        "NUMBA_CACHE_DIR": str(_numba_folder(cache, shipped_kernels(Path(sys.prefix)))),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        **_processor_variables(),
        "NUMBA_THREADING_LAYER": "omp",
        "NUMBA_NUM_THREADS": str(num_threads),
        "OMP_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": "4000",
        "THP_MEM_ALLOC_ENABLE": "1",
        **_memory_variables(),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: value for name, value in defaults.items() if not environ.get(name)}


KERNEL_SOURCES = (
    "quant/kernels/*.py",
    "engine/*/*cpu.py",
    "engine/*/*_ops.py",
    "engine/scheduling/ngram.py",
    "parallel/atomics.py",
    "parallel/shared_memory.py",
)


def _kernel_version() -> str:
    """A hash of all kernel sources: Numba's cache looks only at the file of a kernel, not at functions it inlines."""
    root = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=8)
    for pattern in KERNEL_SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
