"""The rules of the house hold in the whole tree, and each check finds a fault that is planted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.house import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    PACKAGES,
    ROOT,
    TABLES,
    cached_closure_complaints,
    citation_complaints,
    complaints_of,
    docstring_complaints,
    file_size_complaints,
    function_size_complaints,
    module_docstring_complaints,
    name_complaints,
    sentences_of,
    source_files,
    star_complaints,
    text_files,
)
from tests.unit.test_imports import FLAT, ROOMS, room_of

PROGRAMS = [*source_files(), *source_files("tests scripts benchmarks".split()), ROOT / "setup.py"]


def test_nothing_cites_a_document_outside_the_repository() -> None:
    complaints = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in text_files()
        for complaint in citation_complaints(sentences_of(path), path.parent)
    ]
    assert not complaints, "\n".join(complaints)


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_table_of_modules_names_files_that_exist() -> None:
    """The first name of a row has its folder, the others may lack it."""
    rows = section_of(ARCHITECTURE.read_text(), "Modules").splitlines()
    missing = []
    for first, *others in (re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows if row.startswith("| `")):
        folder = ROOT / first if first.endswith("/") else (ROOT / first).parent
        missing += [name for name in others if not (folder / name).exists() and not (ROOT / name).exists()]
        missing += [] if (ROOT / first).exists() else [first]
    assert not missing


def test_the_drawing_of_the_rooms_is_true() -> None:
    """Each room stands once, above all rooms of its package that it imports."""
    floors = floors_of(section_of(ARCHITECTURE.read_text(), "Rooms"))
    assert set(floors) == set(ROOMS)
    wrong = [
        (room, other)
        for room, names in ROOMS.items()
        for other in map(room_of, names.split())
        if other.split(".")[0] == room.split(".")[0] and floors[other] >= floors[room]
    ]
    assert not wrong


def section_of(document: str, heading: str) -> str:
    return document.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def floors_of(section: str) -> dict[str, int]:
    """Room -> floor, of the first block; a line that is not indented begins a package."""
    floors: dict[str, int] = {}
    lines = section.split("```text\n")[1].split("\n```")[0].splitlines()
    package = ""
    for number, line in enumerate(lines):
        if not line.startswith(" "):
            package = line
        names = [f"{package}.{name.strip('/')}" for name in line.split()] if line.startswith(" ") else []
        floors |= dict.fromkeys(names, len(lines) - number)
    return floors | {package: 0 for package in lines if package in FLAT}


@pytest.mark.parametrize(
    ("name", "owners"),
    [("WORD_BITS", ["engine/sampling/grammar.py", "quant/packing.py"]), ("OUTPUTS_AT_A_TIME", ["quant/packing.py"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_several_modules_need_stands_once_in_a_package(name: str, owners: list[str]) -> None:
    definition = re.compile(rf"^{name} = ", re.MULTILINE)
    paths = [path for path in source_files() if definition.search(path.read_text())]
    assert sorted(str(path.relative_to(ROOT)) for path in paths) == owners


def test_no_file_is_too_long() -> None:
    paths = [path for path in source_files() if str(path.relative_to(ROOT)) not in TABLES]
    complaints = complaints_of(paths, file_size_complaints)
    assert not complaints, "\n".join(complaints)


def test_every_table_that_may_be_long_is_long() -> None:
    short = [name for name in TABLES if not file_size_complaints((ROOT / name).read_text())]
    assert not short


@pytest.mark.parametrize(
    ("paths", "check"),
    [
        (source_files(), function_size_complaints),
        (source_files(), cached_closure_complaints),
        (PROGRAMS, star_complaints),
        (PROGRAMS, docstring_complaints),
        (PROGRAMS, module_docstring_complaints),
        (source_files([*PACKAGES, "scripts", "benchmarks"]), name_complaints),
    ],
    ids="functions kernels lists docstrings modules names".split(),
)
def test_the_tree_keeps_the_rule_on(paths: list[Path], check: Callable[[str], list[str]]) -> None:
    complaints = complaints_of(paths, check)
    assert not complaints, "\n".join(complaints)


# ---- planted faults ----


@pytest.mark.parametrize(
    "text",
    [
        '"""Framing (reference 3.1)."""',
        "# as in TGI (reference `tgi-http.md` 4.4)",
        "x = 1  # quirk 26",
        '"""Bits (design section 3)."""',
        "It replaces the design's path.",
        "The table of tgi-cli.md says so.",
        "refuse()  # 22",
        "refuse()  # 21 to 24",
        "refuse()  # 3, 4",
        "See docs/nowhere.md for it.",
        "[there](nowhere.md)",
        "`docs/wire.md, 99`",
        "# said in `docs/wire.md`, 2.9",
        "# said in\n    # `docs/wire.md`, 2.3 and 2.9",
        "docs/command-line.md, 3.1 to 3.9",
        "(`docs/compatibility.md`, row 99)",
        "docs/compatibility.md, rows 16 to 99",
        'docs/quantization.md, "How nobody stores a weight"',
    ],
)
def test_a_citation_that_leads_nowhere_is_found(text: str) -> None:
    assert citation_complaints(text)


@pytest.mark.parametrize(
    "text",
    [
        "a reference implementation in torch; 3 references",
        "x = 1  # 3 rows a step",
        "`docs/wire.md, 2.3`, and docs/wire.md",
        "# said in `docs/wire.md`,\n    # 2.3 and 4.4",
        "`docs/command-line.md, 3`",
        "docs/compatibility.md, rows 16 to 21 and 30",
        'docs/quantization.md, "How the formats store a weight"',
        "tests/oracles/checkpoints/README.md, SECURITY.md, [metrics](metrics.md#traces)",
        "https://github.com/somebody/something/blob/main/docs/nowhere.md",
    ],
)
def test_a_citation_that_leads_somewhere_is_none(text: str) -> None:
    assert citation_complaints(text) == []


def test_a_long_file_is_found() -> None:
    assert file_size_complaints("x = 1\n" * MAX_FILE_LINES) == []
    assert file_size_complaints("x = 1\n" * (MAX_FILE_LINES + 1))


def function_of(num_lines: int) -> str:
    return "def act():\n" + "    pass\n" * (num_lines - 1)


def test_a_long_function_is_found_unless_it_is_a_kernel() -> None:
    long = function_of(MAX_FUNCTION_LINES + 1)
    assert function_size_complaints(function_of(MAX_FUNCTION_LINES)) == []
    assert function_size_complaints(long)
    assert function_size_complaints(long.replace("def", "async def"))
    assert function_size_complaints(f"import numba\n\n\n@numba.njit\n{long}") == []
    assert function_size_complaints(f"from numba import njit\n\n\n@njit\n{long}") == []


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (
            cached_closure_complaints,
            "def make():\n    @njit(parallel=True, **FAST)\n    def multiply(): ...",
            "@njit(**FAST)\ndef multiply(): ...\n\ndef make():\n    @njit\n    def tile(): ...",
        ),
        (star_complaints, 'NAMES = {*("a", "b"), *("c",)}', 'NAMES = {*"a b".split(), *OTHERS}'),
        (star_complaints, "run(*[1, 2])", "run(*numbers)"),
        (docstring_complaints, 'SIZE = 3\n"""Of addresses, in bytes."""', 'SIZE = 3\n"""Address space in bytes."""'),
        (docstring_complaints, 'def f():\n    """Those successors."""', 'def f():\n    """The successors."""'),
        (docstring_complaints, '"""Likewise."""', '"""As above, for prompts. Of two, the first."""'),
        (name_complaints, "def settle_limits(): ...", "def resolve_limits(): ..."),
        (name_complaints, "class Quantiser: ...", "class Quantizer: ..."),
        (name_complaints, "def f(is_widening): ...", "def f(computes_in_float32): ..."),
        (name_complaints, "MOST_ROWS = 3", "MAX_ROWS = 3"),
        (name_complaints, "self.twin = 1", "self.reference = 1"),
        (name_complaints, "wanted: int", "def test_wanted_rows_come_first(): ..."),
        (name_complaints, "def f(self): self.most = 1", "def f(self): most = 1"),
        (module_docstring_complaints, '# three\nX = 3\n"""Three."""', '"""Numbers."""\nX = 3'),
    ],
)
def test_a_planted_fault_is_found(check: Callable[[str], list[str]], bad: str, good: str) -> None:
    assert check(bad)
    assert check(good) == []
