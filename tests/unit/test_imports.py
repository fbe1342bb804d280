"""Imports point one way: server -> engine -> {parallel, quant}. Imports inside functions count: those hide cycles."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "engine", "parallel", "quant")
ENGINE_FOR_SERVER = {"types", "config", "errors", "ipc", "logs"}
STDLIB_ONLY = {
    "server.launcher": {
        *("engine.config", "engine.errors", "engine.logs"),
        *("server.args", "server.children", "server.config", "server.runtime"),
    },
    "server.children": {"engine.config"},
    "server.args": {"server.flags"},
    "server.flags": {"engine.logs"},
    "server.runtime": set(),
    "server.config": set(),
    "engine.config": {"engine.errors"},
    "engine.errors": set(),
    "engine.logs": set(),
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


def complaint(package: str, imported: str) -> str | None:
    """Why a file of `package` may not import `imported`."""
    first, _, rest = imported.partition(".")
    forbidden = {
        "server": {"torch", "transformers", "numba", "parallel", "quant"},
        "engine": {"server", "fastapi", "pydantic", "starlette", "uvicorn"},
        "parallel": {"engine", "server"},
        "quant": {"engine", "server", "parallel"},
    }[package]
    if first in forbidden | {"tests", "scripts", "benchmarks"}:
        return f"{package} must not import {first}"
    if (package, first) == ("server", "engine") and rest.split(".")[0] not in ENGINE_FOR_SERVER:
        return f"server may import only engine.{{{', '.join(sorted(ENGINE_FOR_SERVER))}}}"
    if (package, first) == ("parallel", "quant") and rest.split(".")[0] != "base":
        return "parallel may import only quant.base"
    return None


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    complaints = {f"{imported}: {why}" for imported in imports_of(path) if (why := complaint(package, imported))}
    assert not complaints


@pytest.mark.parametrize(
    ("package", "imported", "is_allowed"),
    [
        ("server", "engine.types.TokenEvent", True),
        ("server", "engine.core.EngineCore", False),
        ("server", "engine", False),
        ("server", "torch", False),
        ("engine", "parallel.state.ParallelState", True),
        ("engine", "server.args", False),
        ("parallel", "quant.base.LinearMethod", True),
        ("parallel", "quant.none.DenseMethod", False),
        ("quant", "parallel.state", False),
        ("quant", "tests.tiny_model", False),
    ],
)
def test_the_rules_themselves(package: str, imported: str, is_allowed: bool) -> None:
    assert (complaint(package, imported) is None) == is_allowed


@pytest.mark.parametrize("module", STDLIB_ONLY)
def test_standard_library_only(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    for imported in imports_of(path):
        first = imported.split(".")[0]
        is_ours = any(imported == name or imported.startswith(f"{name}.") for name in STDLIB_ONLY[module])
        assert first in sys.stdlib_module_names or is_ours, f"{module} imports {imported}"


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
        assert {"server.app", "engine.types", "fastapi", "tokenizers"} <= loaded
        assert not loaded & {"torch", "transformers", "numpy", "numba", "llvmlite", "safetensors", "triton"}


def test_the_launcher_needs_the_standard_library_only() -> None:
    bare = modules_after("pass")  # what a site hook of this environment may load by itself
    loaded = {name.split(".")[0] for name in modules_after("import server.launcher") - bare}
    assert loaded - set(sys.stdlib_module_names) == {"server", "engine"}


def test_the_command_line_tool_answers_without_loading_the_hub_or_torch() -> None:
    assert not modules_after("import engine.cli") & {"torch", "huggingface_hub", "numpy"}
