"""The rules of the house on citations, sizes, lists, docstrings and names: from a file's text to complaints."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pytgi", "server", "engine", "parallel", "quant")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

TABLES = {
    "server/launcher/flags.py": "a row for each flag and variable",
}
"""Files of the packages that may be longer, because they are tables of data -> what they list."""

KERNEL_LIBRARIES = {"llvmlite", "numba", "triton"}
"""Functions of a module that imports one of these are kernels, which may be long."""

ABSENT_DOCUMENTS = re.compile(
    r"\breference (?:\d|`?[\w-]+\.md)|\breference's (?:table|section|\d+ rows)|\bquirks? \d"
    r"|\bthe design's\b|\bdesign section|\(design(?: \d|:)",
    re.IGNORECASE,
)
BARE_ROW = re.compile(r"# \d+(?:(?: to |, | and )\d+)*\.?$")
"""A comment that is nothing but numbers: rows of a table that it does not name."""
DOCUMENT = re.compile(r"(?<![\w/:.-])((?:[\w.-]+/)*[\w-]+\.md)\b")
NUMBERS = r"\d+(?:\.\d+)?(?:(?:, | and | to | or )\d+(?:\.\d+)?)*"
SECTION = re.compile(rf"\b((?:docs/)?(?:wire|command-line)\.md)`?,? (?:sections? )?`?({NUMBERS})(?![\w%])")
ROW = re.compile(rf"\b((?:docs/)?compatibility\.md)`?,? \(?rows? ({NUMBERS})")
HEADING = re.compile(r"\b((?:[\w.-]+/)*[\w-]+\.md)`?,? (?:section )?\"([A-Z][^\"]+)\"")

STAR_AND_BRACKET = re.compile(r"\*\s*[(\[]")
BAD_BEGINNINGS = ("Of ", "Those ", "Those.", "Likewise")

NAMES: dict[str, str] = {
    "settle": "the act: plan_kv_blocks, choose_quantization",
    "settled": "the act: plan_kv_blocks, choose_quantization",
    "settles": "the act: plan_kv_blocks, choose_quantization",
    "quantise": "quantize",
    "quantised": "quantized",
    "quantiser": "quantizer",
    "quantisers": "quantizers",
    "quantisation": "quantization",
    "dequantise": "dequantize",
    "dequantised": "dequantized",
    "tokenise": "tokenize",
    "tokenised": "tokenized",
    "initialise": "initialize",
    "serialise": "serialize",
    "twin": "reference",
    "twins": "references",
    "deal": "split",
    "mend": "fix",
    "most": "max",
    "least": "min",
    "fewest": "min",
    "largest": "max",
    "smallest": "min",
    "pulse": "heartbeat",
    "meeting": "rendezvous",
    "widening": "float32: computes_in_float32",
    "modest": "has_default_cap",
    "scattered": "unordered: has_unordered_groups",
    "wanted": "a noun: spec, request",
    "asked": "a noun: request",
    "told": "a noun: message",
}
"""A part of an identifier -> what to write in its place."""


def source_files(folders: Sequence[str] = PACKAGES) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> list[Path]:
    """Every file of the tree in which people read sentences."""
    files = [
        *ROOT.glob("*.md"),
        *(ROOT / name for name in "Makefile Dockerfile pyproject.toml setup.py .ci/run".split()),
        *(path for folder in ("docs", "examples") for path in (ROOT / folder).iterdir() if path.is_file()),
        *source_files([*PACKAGES, *"tests scripts benchmarks".split()]),
        *(path for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.md")),
    ]
    return sorted(files)


def sentences_of(path: Path) -> str:
    """All of a document; the comments and docstrings of a program, whose other texts may be anything."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*comments, *(docstring for _, docstring in docstrings_of(ast.parse(text)))])


def joined(text: str) -> str:
    """Comments and paragraphs as one line each, so that a citation may be broken over two."""
    return re.sub(r"[ \t]*\n[ \t]*(?:# )?(?=[^\s#|-])", " ", text)


# ---- citations ----


def citation_complaints(text: str, folder: Path = ROOT) -> list[str]:
    """Documents, sections and rows that `text` names and the tree does not have."""
    bare = [f"{line.strip()!r} is a number of no table" for line in text.splitlines() if BARE_ROW.search(line)]
    flat = joined(text)
    absent = [
        f"{match.group(0)!r} names a document outside the repository" for match in ABSENT_DOCUMENTS.finditer(flat)
    ]
    missing = [f"{name} does not exist" for name in DOCUMENT.findall(flat) if find_document(name, folder) is None]
    parts = [
        f"{match.group(1)} has no {kind} {number}"
        for pattern, kind, known in ((SECTION, "section", sections_of), (ROW, "row", rows_of))
        for match in pattern.finditer(flat)
        if (document := find_document(match.group(1), folder)) is not None
        for number in re.findall(r"\d+(?:\.\d+)?", match.group(2))
        if number not in known(document.read_text())
    ]
    headings = [
        f"{name} has no heading {heading!r}"
        for name, heading in HEADING.findall(flat)
        if (document := find_document(name, folder)) is not None and heading not in headings_of(document.read_text())
    ]
    return absent + bare + missing + parts + headings


def find_document(name: str, folder: Path) -> Path | None:
    """Where `name` is: from the root, among the documents, or beside the file that names it."""
    return next((path for base in (ROOT, ROOT / "docs", folder) if (path := base / name).is_file()), None)


def sections_of(document: str) -> set[str]:
    """Numbers of headings, and of paragraphs that begin with one in bold."""
    return set(re.findall(r"^(?:#+ |\*\*)(\d+(?:\.\d+)?)\b", document, flags=re.MULTILINE))


def rows_of(document: str) -> set[str]:
    return set(re.findall(r"^\| (\d+) \|", document, flags=re.MULTILINE))


def headings_of(document: str) -> set[str]:
    return set(re.findall(r"^#+ (.*)$", document, flags=re.MULTILINE))


# ---- sizes ----


def file_size_complaints(text: str) -> list[str]:
    num_lines = text.count("\n")
    return [f"{num_lines} lines, at most {MAX_FILE_LINES}"] if num_lines > MAX_FILE_LINES else []


def function_size_complaints(text: str) -> list[str]:
    tree = ast.parse(text)
    if imported_libraries(tree) & KERNEL_LIBRARIES:
        return []
    return [
        f"line {node.lineno}: {node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (num_lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def imported_libraries(tree: ast.Module) -> set[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


# ---- lists, docstrings, names ----


def cached_closure_complaints(text: str) -> list[str]:
    """A compiled function that a function makes is never found in the cache of Numba: its key changes."""
    return [
        f"line {inner.lineno}: {inner.name} is compiled again at each start, as a function makes it"
        for outer in ast.walk(ast.parse(text))
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
        if isinstance(inner, ast.FunctionDef) and inner is not outer
        if any("FAST" in ast.unparse(decorator) for decorator in inner.decorator_list)
    ]


def star_complaints(text: str) -> list[str]:
    """Lists held together by stars before literal tuples."""
    if not STAR_AND_BRACKET.search(text):  # spares the parser three files of four
        return []
    return [
        f"line {node.lineno}: write one item a line, or split a text"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List)
    ]


def docstring_complaints(text: str) -> list[str]:
    if not any(beginning in text for beginning in BAD_BEGINNINGS):  # spares the parser most files
        return []
    return [
        f"line {line}: {docstring.split(chr(10))[0]!r} does not name its noun"
        for line, docstring in docstrings_of(ast.parse(text))
        if docstring.startswith(BAD_BEGINNINGS)
    ]


def module_docstring_complaints(text: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(text)) else ["the module does not say what it is"]


def docstrings_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Texts of modules, classes and functions, and those below a constant or a field, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def name_complaints(text: str) -> list[str]:
    """Identifiers that the file defines and that have a part which the house does not use."""
    complaints = {
        f"line {line}: {name}: write {NAMES[part]}"
        for line, name in names_of(ast.parse(text))
        for part in parts_of(name)
        if part in NAMES
    }
    return sorted(complaints, key=lambda complaint: int(complaint.split(":")[0].split()[1]))


def names_of(node: ast.AST, *, is_local: bool = False) -> Iterator[tuple[int, str]]:
    """What is defined below `node`, with its line: not local variables, nor tests, whose names are sentences."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("test_"):
        yield node.lineno, node.name
    elif isinstance(node, ast.arg):
        yield node.lineno, node.arg
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.lineno, node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not is_local:
        yield node.lineno, node.id
    for child in ast.iter_child_nodes(node):
        yield from names_of(child, is_local=is_local or is_function)


def parts_of(identifier: str) -> list[str]:
    """`is_max_tokens` and `IsMaxTokens` have the parts is, max, tokens."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().strip("_").split("_")


def complaints_of(paths: Sequence[Path], check: Callable[[str], list[str]]) -> list[str]:
    """`check`'s complaints about each of `paths`, with the path in front."""
    return [f"{path.relative_to(ROOT)}: {complaint}" for path in paths for complaint in check(path.read_text())]
