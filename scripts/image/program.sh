#!/bin/sh
# program.sh [compile]: install the program's wheel into /opt/venv; with `compile`, its CPU kernels as well, for
# processors like this one. Run by the Dockerfile.
set -eu

touch /tmp/before
pip install --no-cache-dir --no-compile --no-index --no-deps /build/dist/*.whl
# Only what is new: a file of the packages that is written again is in two layers.
find /opt/venv -newer /tmp/before -name '*.py' > /tmp/new
# Numba trusts a compiled kernel as long as its source is as old as it was. A layer keeps times to the second only.
xargs touch -d 2000-01-01T00:00:00Z < /tmp/new
python -m compileall -qq -i /tmp/new --invalidation-mode unchecked-hash
if [ "${1:-}" = compile ]; then
    XDG_CACHE_HOME=/opt/venv/share pytgi compile
fi
rm -rf /tmp/before /tmp/new /build/program.sh
