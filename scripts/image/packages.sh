#!/bin/sh
# packages.sh cpu|cuda|hip: make /opt/venv with torch in that build and what pyproject.toml asks for. Run by the Dockerfile.
# TORCH_SPEC says which torch, in place of the one in constraints.txt, and TORCH_INDEX where beside PyPI pip looks for it.
set -eu
build=$1

default=$(grep '^torch==' constraints.txt)
# PyPI's last CPU build for 64-bit ARM: newer ones there are for CUDA.
if [ "$build $(uname -m) ${TORCH_INDEX:-}" = 'cpu aarch64 ' ]; then default=torch==2.9.1; fi
python3 -m venv /opt/venv
# torch is TORCH_SPEC's, and brings the Triton that it was made with.
grep -Ev '^(torch|triton)==' constraints.txt > others.txt
pip install --no-cache-dir --no-compile -c others.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "${TORCH_SPEC:-$default}"
python - "$build" <<'PYTHON'
import sys
from torch import version
build = "cuda" if version.cuda else "hip" if version.hip else "cpu"
if build != sys.argv[1]:
    sys.exit(
        f"torch {version.__version__} is a {build} build, and this target needs one for {sys.argv[1]}: give PyTorch's "
        "index for it with --build-arg TORCH_INDEX=<address> (pytorch.org shows it under 'Start locally')"
    )
PYTHON
python - > requirements.txt <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["dependencies"]))
PYTHON
pip install --no-cache-dir --no-compile -c others.txt -r requirements.txt
# The bytecode does not depend on the time of the source, which a layer keeps to the second only.
# Packages carry files for newer Pythons, which can't be compiled and are not imported.
python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true
