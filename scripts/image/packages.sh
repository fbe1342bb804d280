#!/bin/sh
# packages.sh cpu|cuda|hip: make /opt/venv with torch in that build and what pyproject.toml asks for.
# TORCH_SPEC and TORCH_INDEX say which torch, and where beside PyPI pip looks for it. Run by the Dockerfile.
set -eu
build=$1

python3 -m venv /opt/venv
# torch is TORCH_SPEC's, and brings the Triton that it was made with.
grep -Ev '^(torch|triton)==' constraints.txt > others.txt
pip install --no-cache-dir --no-compile -c others.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH_SPEC"
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
