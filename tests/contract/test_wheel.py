"""What is in the wheel: one import package with everything that serves."""

from __future__ import annotations

import email
import zipfile
from pathlib import Path

import pytest

from tests.wheels import ROOMS, ROOT, build, copy_tree, files_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", copy_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel"))


def test_it_has_every_module_and_every_file_of_data_under_one_name(wheel: Path) -> None:
    modules = {f"pytgi/{path.relative_to(ROOT / 'pytgi')}" for path in (ROOT / "pytgi").rglob("*.py")}
    rooms = {f"pytgi/_rooms/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    data = {f"pytgi/_rooms/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.json")}
    assert data, "the tables of the GPU's kernels are data"
    pages = {f"pytgi/_rooms/{path.relative_to(ROOT)}" for path in (ROOT / "server" / "ui" / "source").iterdir()}
    files = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert files == {*modules, *rooms, *data, *pages, "pytgi/py.typed"}


def test_its_metadata_names_license_system_and_bounds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["License-Expression"]) == ("pytgi", "Apache-2.0")
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(metadata.get_all("Classifier", []))
    assert any(line.startswith("torch<3,>=") for line in metadata.get_all("Requires-Dist", []))
