#!/usr/bin/env bash
# The tests on the oldest dependencies that pyproject.toml allows (tests/tools/oldest.txt), in a new environment.
#   tests/tools/oldest.sh [FOLDER]        uses FOLDER/oldest for the environment; default: a temporary one
# TORCH: what to install as torch. The pinned one has no build for the CPU alone on every index; any in the
# range will do, e.g. TORCH=torch==2.13.0. To renew the list (needs uv):
#   uv pip compile --resolution lowest-direct --python-version 3.11 --only-binary :all: \
#       --extra build --extra data --extra serve --extra sign --extra test pyproject.toml -o tests/tools/oldest.txt
set -euo pipefail
cd "$(dirname "$0")/../.."
place="${1:-$(mktemp -d)}/oldest"
"${PYTHON:-python3}" -m venv "$place"
grep -viE '^(torch|triton|nvidia|cuda)' tests/tools/oldest.txt > "$place/pins.txt"
"$place/bin/pip" install --quiet "${TORCH:-$(grep -E '^torch==' tests/tools/oldest.txt)}"
"$place/bin/pip" install --quiet --no-deps -r "$place/pins.txt"
PYTHONPATH="$PWD" OMP_NUM_THREADS=1 "$place/bin/python" -m pytest -p no:cacheprovider -m "not slow" \
    --ignore tests/test_package.py --ignore tests/test_triton_conv.py --ignore tests/test_triton_gla.py "${@:2}"
