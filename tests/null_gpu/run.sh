#!/usr/bin/env bash
# Runs a command on the null GPU that setup.sh has made: tests/null_gpu/run.sh [FOLDER] COMMAND...
#
# FOLDER: an existing one; $GRASS_NULL_GPU, or .null_gpu in the repository, or .null_gpu-$GRASS_TORCH. `python` is that of
# its environment, the repository is on PYTHONPATH, and the compilers' caches are in FOLDER/cache unless the environment
# names others.
# NULL_GPUS: how many devices there are (1, at most 16). NULL_GPU_GIB: the memory of each (79.1).
# NULL_GPU_CAPABILITY: 9.0 for an H100 (the default), 8.0 for an A100.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${GRASS_NULL_GPU:-$root/.null_gpu${GRASS_TORCH:+-$GRASS_TORCH}}
if [[ -d ${1:-} ]]; then folder=$1; shift; fi
(($#)) || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
folder=$(realpath "$folder")
[[ -e $folder/stand-ins/libcuda.so.1 ]] || { echo "No null GPU in $folder: run tests/null_gpu/setup.sh first" >&2; exit 2; }
export PATH="$folder/venv/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export LD_LIBRARY_PATH="$folder/stand-ins" TRITON_LIBCUDA_PATH="$folder/stand-ins"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$folder/cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$folder/cache/inductor}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # there is no cuDNN: attention takes another kernel
export KINETO_LOG_LEVEL=5               # the profiler has no CUPTI, and would say so again and again
exec env LD_PRELOAD="$folder/stand-ins/libcuda.so.1" "$@"
