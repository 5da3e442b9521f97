#!/usr/bin/env bash
# Runs every test file in a process of its own: none may rely on what another file imported.
# Usage: tools/test_alone.sh [processes] [pytest arguments]; lists the files that fail.
set -uo pipefail
cd "$(dirname "$0")/.."
processes=${1:-2}
shift || true
export OMP_NUM_THREADS=1
find tests lab/tests -name 'test_*.py' | sort | grep -v -e interpreted -e optional/ |
    xargs -P "$processes" -I{} sh -c '
        .venv/bin/python -m pytest -q -p no:cacheprovider "$@" {} >"${TMPDIR:-/tmp}/alone-$$.log" 2>&1
        code=$?
        [ $code -eq 0 ] || [ $code -eq 5 ] || { echo "FAILED {}"; tail -n 3 "${TMPDIR:-/tmp}/alone-$$.log"; }
        rm -f "${TMPDIR:-/tmp}/alone-$$.log"
        exit $((code != 0 && code != 5))
    ' alone "$@" && echo "every file passes alone"
