#!/usr/bin/env bash
# Formatting, types, the direction of imports, and the tests: ./test.sh [pytest arguments]
# Sets up .venv when that is missing or out of date. `./test.sh -m slow` runs the slow tests, and only those.
# `GRASS_TORCH=2.11.0 ./test.sh` tests with another torch, the oldest one here, in an environment of its own. Types are
# left out then: they are checked against the torch in requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env dev requirements.txt requirements-dev.txt requirements-extra.txt requirements-baselines.txt requirements-sweep.txt requirements-docs.txt
setup_browser

# Two threads for these tiny tensors gain nothing, and wait for each other whenever anything else runs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
failed=()
check() { # NAME PYTHON_ARGUMENTS...
    local name=$1
    shift
    "$python" "$@" || failed+=("$name")
}
check "ruff check" -m ruff check .
check "ruff format" -m ruff format --check .
if [[ -z ${GRASS_TORCH:-} ]]; then check "mypy" -m mypy; fi
check "lint-imports" -c 'import importlinter.cli as cli; cli.lint_imports_command(["--no-logo"])'
if ((${#failed[@]})); then say "FAILED before the tests: ${failed[*]}"; fi
# All tests, a file at a time on each core; a part of them as it is asked for.
if (($# == 0)); then set -- -n auto --maxprocesses 8 --dist loadfile; fi
check "pytest" -m pytest -q "$@" # last, so that its closing line is the last one
exit $((${#failed[@]} > 0))
