"""The peers: which environment and program each one has, what it calls our forms, and the settings it runs with."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.offline import num_cores
from benchmarks.sides import BENCHMARKS, Side
from engine.link.environment import engine_environment, user_cache_dir
from tests.e2e.cached_environment import cached_environment

OUR_FORMS = {"16-bit": "bfloat16", "int8": "eetq", "int4": "int4"}
"""Form of the comparison -> ours, as in perplexity.py."""
OUR_ISA: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
NUM_SEQUENCES, KV_TOKENS = 32, 8192
"""What a side must have place for."""


def no_variables(environment: Path) -> dict[str, str]:
    return {}


def short_spin(environment: Path) -> dict[str, str]:
    """What keeps libgomp's threads from spinning for milliseconds where they wait, as we keep ours.

    On a host with neighbours the spinning costs llama.cpp most of its speed, on a quiet one it may help.
    """
    return {"GOMP_SPINCOUNT": engine_environment(num_cores(), {})["GOMP_SPINCOUNT"]}


@dataclasses.dataclass(frozen=True)
class Peer:
    """An engine that we compare with."""

    environment: str
    """Its pins, in tests/e2e/environments."""
    script: str
    forms: Mapping[str, str]
    """Form of the comparison -> the peer's. A form that is not here is one that it has not got, see `lacks`."""
    flags: str
    """What it runs with, for the table; it has as many threads as there are cores."""
    lacks: str = ""
    builds: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"native": ""})
    """Instruction sets that it can be held to -> CMAKE_ARGS of its build."""
    settings: Mapping[str, Callable[[Path], Mapping[str, str]]] = dataclasses.field(
        default_factory=lambda: {"": no_variables}
    )
    """Name -> variables of a side whose environment is in that folder; the best one counts."""
    source: Callable[[Path, Path], None] | None = None
    """Makes what the peer's own converter takes; None: it takes the folder."""
    suffix: str = ""
    """The ending of a converted model's name."""


def vllm_variables(environment: Path) -> dict[str, str]:
    """What vLLM's pages on CPUs advise; its engine runs in the side's own process, so OpenMP is loaded first."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def write_f16(folder: Path, path: Path) -> None:
    from benchmarks.peers.gguf_model import write_gguf

    write_gguf(folder, path)


PEERS = {
    "llama.cpp": Peer(
        environment="llama",
        script="peers/side_llama.py",
        forms={"16-bit": "F16", "int8": "Q8_0", "int4": "Q4_0"},
        flags="llama-cpp-python built with GGML_NATIVE; flash attention, batch 2048, ubatch 512, unified KV; the "
        "better of libgomp's own spinning and a short one",
        builds={
            "native": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
            "avx2": "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF",
        },
        settings={"": no_variables, "short spin": short_spin},
        source=write_f16,
        suffix=".gguf",
    ),
    "OpenVINO": Peer(
        environment="openvino",
        script="peers/side_openvino.py",
        forms={"16-bit": "fp16", "int8": "int8", "int4": "int4"},
        flags="OpenVINO GenAI, continuous batches in one step, performance hint LATENCY, 1 stream, precision of the "
        "activations and of the KV cache left to it; int8 asymmetric per channel, int4 symmetric in groups of 128 with "
        "an int8 head",
    ),
    "CTranslate2": Peer(
        environment="ctranslate2",
        script="peers/side_ctranslate2.py",
        forms={"int8": "int8"},
        lacks="its kernels for CPUs are float32 and int8",
        flags="compute type auto (int8 with float32), 1 inter thread, prompts forwarded at once, static batches",
    ),
    "onnxruntime-genai": Peer(
        environment="onnxruntime",
        script="peers/side_onnxruntime.py",
        forms={"int8": "int8", "int4": "int4"},
        lacks="its builder makes float32, int8 and int4 for CPUs",
        flags="built with accuracy level 4 (int8 activations), blocks of 32, 1 inter-op thread, static batches",
    ),
    "vLLM": Peer(
        environment="vllm",
        script="peers/side_vllm.py",
        forms={"16-bit": "bfloat16", "int8": "w8a8"},
        lacks="it takes int4 from GPTQ and AWQ checkpoints, which are not made here",
        flags="vllm-cpu compiled, VLLM_CPU_KVCACHE_SPACE=1, VLLM_CPU_OMP_THREADS_BIND to all cores, libiomp5 first, "
        "no prefix cache, a step takes any prompt whole; int8 is W8A8 in compressed-tensors with the head in bfloat16",
        settings={"": vllm_variables},
    ),
}


def python_of(peer: Peer, isa: str) -> str:
    print(f"the environment `{peer.environment}` is made on first use", file=sys.stderr)
    return str(cached_environment(peer.environment, peer.builds[isa]) / "bin" / "python")


def converted(peer: Peer, folder: Path, form: str, python: str) -> Path:
    """The folder's weights as the peer's own converter makes them, kept in the user's cache."""
    path = user_cache_dir(dict(os.environ)) / "peers" / f"{peer.environment}-{folder.name}-{form}{peer.suffix}"
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    source = folder
    if peer.source:
        source = path.with_name(f"{peer.environment}-{folder.name}-{next(iter(peer.forms.values()))}{peer.suffix}")
        if not source.exists():
            peer.source(folder, partial)
            partial.rename(source)
    if source != path:
        command = [python, str(BENCHMARKS / peer.script), "convert", str(source), str(partial), form]
        subprocess.run(command, stdout=sys.stderr, env={**os.environ, **OFFLINE}, check=True)
        partial.rename(path)
    return path


def peer_side(peer: Peer, setting: str, model: Path, python: str) -> Side:
    arguments = ["serve", str(model), str(num_cores()), str(NUM_SEQUENCES), str(KV_TOKENS)]
    return Side(
        python, peer.script, arguments, {**os.environ, **OFFLINE, **peer.settings[setting](Path(python).parents[1])}
    )


def pytgi_side(form: str, folder: str, isa: str, kv_tokens: int = 1024) -> Side:
    environ = {**os.environ, **OUR_ISA[isa]}
    environ |= engine_environment(num_cores(), environ)
    return Side(sys.executable, "side_pytgi.py", [form, folder, str(kv_tokens)], environ)
