"""The packages of the wheel: the top-level folders that serve go into `pytgi/_rooms`, where `pytgi.rooms` finds them.

Everything else about the distribution is in pyproject.toml, which can't list packages under other names.
"""

from setuptools import find_packages, setup

ROOMS = ["server", "engine", "parallel", "quant"]
PLACE = "pytgi._rooms"

folders = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
setup(
    packages=["pytgi", *(f"{PLACE}.{folder}" for folder in folders)],
    package_dir={f"{PLACE}.{room}": room for room in ROOMS},
    package_data={"pytgi": ["py.typed"], f"{PLACE}.quant.kernels": ["*.json"], f"{PLACE}.server.ui": ["source/*"]},
)
