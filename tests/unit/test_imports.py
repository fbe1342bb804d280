"""Imports point one way: pytgi -> server -> engine -> {parallel, quant}, and within a package from room to room.

Imports inside functions count: those hide cycles.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pytgi", "server", "engine", "parallel", "quant")
FLAT = ("pytgi", "parallel", "quant")
"""Packages that are one room each."""

ROOMS: dict[str, str] = {
    # server
    "server.config": "",
    "server.piped_process": "",
    "server.launcher": "engine.link parallel.partition server.config",
    "server.text": "engine.link server.piped_process",
    "server.errors": "engine.link",
    "server.operation": "",
    "server.telemetry": "engine.link server.errors server.operation",
    "server.error_handlers": "server.errors server.telemetry",
    "server.client": "engine.link",
    "server.ui": "",
    "server.edge": "engine.link server.errors server.operation server.ui",
    "server.schemas": "",
    "server.requests": "engine.link server.config server.errors server.piped_process server.schemas server.text",
    "server.chat": "server.errors server.piped_process server.requests server.text",
    "server.generation": "engine.link server.errors server.requests server.telemetry server.text",
    "server.service": "server.chat server.client server.config server.edge server.errors server.generation "
    "server.requests server.telemetry server.text",
    "server.answers": "engine.link server.config server.edge server.errors server.generation "
    "server.requests server.schemas server.telemetry server.text",
    "server.routes": "engine.link server.answers server.chat server.edge server.errors server.generation "
    "server.operation server.requests server.service server.telemetry server.text server.ui",
    "server.openapi": "server.answers server.config server.errors server.operation server.requests",
    "server.app": "server.client server.config server.edge server.error_handlers server.openapi server.operation "
    "server.routes server.service server.telemetry server.text",
    "server.__main__": "engine.link server.app server.client server.config server.edge server.text server.ui",
    "server.bench": "engine.link",
    "server.terminal": "engine.link server.bench",
    "server.replicas": "engine.link server.answers server.config server.errors server.launcher server.ui",
    # engine
    "engine.link": "",
    "engine.kernel_cache": "",
    "engine.numa": "",
    "engine.limits": "engine.link",
    "engine.memory": "engine.link",
    "engine.graph_capture": "quant",
    "engine.device": "engine.graph_capture engine.link engine.memory quant",
    "engine.scheduling": "engine.link",
    "engine.sampling": "engine.link engine.scheduling quant",
    "engine.layers": "engine.link parallel quant",
    "engine.attention": "engine.layers quant",
    "engine.models": "engine.attention engine.layers engine.link parallel quant",
    "engine.checkpoint": "engine.link engine.memory engine.models quant",
    "engine.adapter_rows": "engine.layers engine.scheduling quant",
    "engine.adapters": "engine.adapter_rows engine.checkpoint engine.link engine.models engine.scheduling parallel "
    "quant",
    "engine.step_inputs": "engine.scheduling",
    "engine.step_buffers": "engine.attention engine.step_inputs quant",
    "engine.graphs": "engine.attention engine.graph_capture engine.link engine.step_buffers engine.step_inputs "
    "parallel quant",
    "engine.programs": "engine.layers quant",
    "engine.runner": "engine.adapters engine.attention engine.device engine.graphs engine.layers engine.link "
    "engine.models engine.programs engine.scheduling "
    "engine.step_buffers engine.step_inputs quant",
    "engine.ranks": "engine.checkpoint engine.device engine.graphs engine.limits engine.link engine.runner "
    "engine.scheduling engine.step_inputs parallel",
    "engine.build": "engine.adapters engine.checkpoint engine.device engine.layers engine.limits engine.link "
    "engine.models parallel quant",
    "engine.full_step": "engine.device engine.limits engine.link engine.runner engine.sampling engine.step_inputs",
    "engine.summary": "engine.build engine.device engine.limits engine.link quant",
    "engine.shedding": "engine.link engine.scheduling",
    "engine.core": "engine.link engine.runner engine.sampling engine.scheduling engine.shedding",
    "engine.overlap": "engine.core engine.device engine.link engine.runner engine.sampling engine.scheduling quant",
    "engine.kernel_variants": "engine.core engine.link engine.sampling engine.scheduling",
    "engine.warm_up": "engine.core engine.link engine.runner engine.sampling engine.scheduling",
    "engine.start": "engine.build engine.checkpoint engine.core engine.device engine.full_step engine.graphs "
    "engine.kernel_cache engine.kernel_variants engine.limits engine.link engine.numa engine.overlap engine.ranks "
    "engine.runner "
    "engine.sampling "
    "engine.scheduling engine.summary engine.warm_up",
    "engine.__main__": "engine.link engine.memory engine.ranks engine.start parallel",
    "engine.bench": "engine.checkpoint engine.core engine.link engine.start",
    "engine.compile": "engine.kernel_cache engine.link engine.sampling engine.start parallel",
    "engine.quantize": "engine.attention engine.build engine.checkpoint engine.device engine.layers engine.link "
    "engine.memory engine.models engine.runner engine.scheduling engine.start quant",
    "engine.cli": "engine.checkpoint engine.link engine.quantize",
    # the others are flat
    "pytgi": "server.bench server.launcher server.replicas server.terminal engine.cli engine.compile",
    "parallel": "quant.base",
    "quant": "",
}
"""A folder, or a file that stands beside the folders -> what of ours it may import beside its own files.

The order is that of the floors: a room stands below the rooms that import it.
"""

FOREIGN: dict[str, set[str]] = {
    "server": {"torch", "transformers", "numba", "numpy"},
    "engine": {"fastapi", "pydantic", "starlette", "uvicorn"},
    "engine.link": {"torch", "numba", "numpy"},
    "engine.scheduling": {"torch"},
}
"""A package or room -> libraries that none of its files may import."""

STANDARD_LIBRARY_ONLY = {
    "pytgi.commands": "pytgi server.bench server.launcher server.replicas server.terminal engine.cli engine.compile",
    "pytgi": "pytgi",
    "server.launcher": "engine.link parallel.partition server.config server.launcher",
    "server.config": "",
    "server.schemas": "server.schemas",
    "server.ui": "server.ui",
    "engine.link.config": "",
    "engine.link.encoding": "",
    "engine.link.environment": "engine.link.errors",
    "engine.link.errors": "",
    "engine.link.exit_codes": "",
    "engine.link.logs": "engine.link.progress engine.link.repeats",
    "engine.link.progress": "",
    "engine.link.repeats": "",
    "engine.link.model_files": "engine.link.errors",
    "engine.link.registry": "engine.link.errors",
    "parallel.partition": "",
}
"""These start before anything is installed or loaded: the standard library, and of ours only what is named."""


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything the file imports anywhere; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = {name_of(path): path for path in source_files()}


def room_of(module: str) -> str:
    """`engine.scheduling` for engine.scheduling.batch, `engine.core` for itself, `quant` for all files below it."""
    parts = module.split(".")
    if parts[0] in FLAT or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def is_within(imported: str, names: str) -> bool:
    return any(imported == name or imported.startswith(f"{name}.") for name in names.split())


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`."""
    room, package, first = room_of(module), module.split(".")[0], imported.split(".")[0]
    if first in {"tests", "scripts", "benchmarks"} | FOREIGN.get(package, set()) | FOREIGN.get(room, set()):
        return f"{room} must not import {first}"
    if first not in PACKAGES or room == package and first == package:
        return None
    if not is_within(imported, f"{room} {ROOMS[room]}"):
        return f"{room} may import only: {ROOMS[room] or 'nothing of ours'}"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_direction(module: str) -> None:
    complaints = {f"{name}: {why}" for name in imports_of(MODULES[module]) if (why := complaint(module, name))}
    assert not complaints


def test_every_room_has_a_rule_and_every_rule_a_room() -> None:
    rooms = {room_of(module) for module in MODULES if module not in PACKAGES} | set(FLAT)
    assert rooms == set(ROOMS)


def test_every_room_says_what_it_owns() -> None:
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")):
        assert len(ast.get_docstring(ast.parse(path.read_text())) or "") > 40, path


def test_no_rule_points_up() -> None:
    """A room may import only rooms that stand above it in the table, so there can be no circle."""
    order = list(ROOMS)
    pairs = [(room, other) for room, names in ROOMS.items() for other in names.split() if room_of(other) in ROOMS]
    upward = {(room, other) for room, other in pairs if is_upward(order, room, other)}
    assert not upward


def is_upward(order: list[str], room: str, other: str) -> bool:
    if room.split(".")[0] != room_of(other).split(".")[0]:
        return False
    return order.index(room_of(other)) >= order.index(room)


@pytest.mark.parametrize(
    ("module", "imported", "is_allowed"),
    [
        ("server.client", "engine.link.messages.TokenEvent", True),
        ("server.client", "engine.core.EngineCore", False),
        ("server.client", "engine", False),
        ("server.client", "torch", False),
        ("server.text.tokenizer", "server.errors.ValidationError", False),
        ("engine.ranks", "parallel.state.ParallelState", True),
        ("engine.start", "server.launcher.args", False),
        ("engine.scheduling.scheduler", "torch", False),
        ("engine.scheduling.scheduler", "engine.runner.ModelRunner", False),
        ("parallel.linear", "quant.base.LinearMethod", True),
        ("parallel.linear", "quant.dense.DenseMethod", False),
        ("quant.config", "parallel.state", False),
        ("pytgi.commands", "server.launcher.main.main", True),
        ("pytgi.llm", "server.app.create_app", False),
        ("server.app", "pytgi.rooms", False),
        ("quant.config", "tests.tiny_model", False),
    ],
)
def test_the_rules_themselves(module: str, imported: str, is_allowed: bool) -> None:
    assert (complaint(module, imported) is None) == is_allowed


@pytest.mark.parametrize("module", [name for name in MODULES if is_within(name, " ".join(STANDARD_LIBRARY_ONLY))])
def test_standard_library_only(module: str) -> None:
    ours = next(names for name, names in STANDARD_LIBRARY_ONLY.items() if is_within(module, name))
    for imported in imports_of(MODULES[module]):
        is_standard = imported.split(".")[0] in sys.stdlib_module_names
        assert is_standard or is_within(imported, ours), f"{module} imports {imported}"


def modules_after(statement: str) -> set[str]:
    """Top-level names, and full names of ours, in sys.modules of a fresh interpreter after `statement`."""
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(json.loads(run.stdout))
    return {name.split(".")[0] for name in names} | names


def test_the_http_process_never_loads_the_heavy_libraries() -> None:
    """Its memory stays under 300 MB and it is there in a second or two."""
    for statement in ("import server.app", "import server.__main__"):
        loaded = modules_after(statement)
        assert {"server.app", "engine.link.messages", "fastapi", "tokenizers"} <= loaded
        assert not loaded & {"torch", "transformers", "numpy", "numba", "llvmlite", "safetensors", "triton"}


def test_the_launcher_needs_the_standard_library_only() -> None:
    bare = modules_after("pass")  # what a site hook of this environment may load by itself
    loaded = {name.split(".")[0] for name in modules_after("import server.launcher.main") - bare}
    assert loaded - set(sys.stdlib_module_names) == {"server", "engine", "parallel"}


def test_a_program_that_imports_pytgi_loads_no_more_than_it_uses() -> None:
    """The engine's process has the libraries, and nobody's program gets a module called `server`."""
    bare = modules_after("pass")
    loaded = {name.split(".")[0] for name in modules_after("from pytgi import LLM, RequestError") - bare}
    assert loaded - set(sys.stdlib_module_names) == {"pytgi"}
    assert {"pytgi.llm", "importlib.metadata", "argparse"}.isdisjoint(modules_after("import pytgi") - bare)


def test_the_command_line_tool_answers_without_loading_the_hub_or_torch() -> None:
    assert not modules_after("import engine.cli") & {"torch", "huggingface_hub", "numpy"}
