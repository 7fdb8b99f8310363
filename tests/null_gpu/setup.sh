#!/usr/bin/env bash
# Makes the null GPU: an environment with the CUDA build of torch, and the stand-ins for CUDA's libraries.
#
#   tests/null_gpu/setup.sh [--venv ENVIRONMENT] [FOLDER]
#
# FOLDER: where to make it; $GRASS_NULL_GPU, or .null_gpu in the repository. Made anew where something is missing or has
# changed; otherwise this takes some seconds. It takes 5 GB, most of which are CUDA's libraries.
# ENVIRONMENT: an existing virtual environment that has a CUDA build of torch; it is used as it is.
# GRASS_TORCH: the version of torch instead of that in requirements.txt, for CUDA 13; FOLDER is then .null_gpu-VERSION.
# NULL_GPU_INDEX_URL: where the CUDA build is, if not on PyPI. PYTHON: the interpreter. Pip's settings are not read, which
# may prefer a CPU build.
# Exits with 3 where it cannot be made: on another platform, without a compiler, or where pip cannot download.
set -euo pipefail
sources=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$sources/../.."
fail() { echo "no null GPU: $*" >&2; exit "${code:-1}"; }
given=
if [[ ${1:-} == --venv ]]; then given=$(realpath -s "$2"); shift 2; fi
folder=${1:-${GRASS_NULL_GPU:-.null_gpu${GRASS_TORCH:+-$GRASS_TORCH}}}
[[ $(uname -sm) == "Linux x86_64" ]] || code=3 fail "it is for Linux on x86-64"
for compiler in gcc g++; do command -v $compiler >/dev/null || code=3 fail "there is no $compiler"; done
mkdir -p "$folder"
folder=$(realpath "$folder")
if command -v flock >/dev/null; then exec 9>"$folder/.lock"; flock 9; fi

# The environment.
python=$folder/venv/bin/python
if [[ -n $given ]]; then
    ln -sfn "$given" "$folder/venv"
elif [[ ! -L $folder/venv ]]; then
    version=${GRASS_TORCH:-$(sed -n 's/^torch==//p' requirements.txt)}
    wanted="torch==$version"$'\n'$(grep -v '^torch==' requirements.txt)
    if [[ ! -f $folder/installed || $(<"$folder/installed") != "$wanted" ]]; then
        echo "null GPU: installing torch $version with CUDA into $folder (5 GB) ..." >&2
        [[ -x $python ]] || "${PYTHON:-python3}" -m venv "$folder/venv"
        echo "$wanted" >"$folder/requirements.txt"
        "$python" -m pip --isolated ${PIP_CERT:+--cert "$PIP_CERT"} install --quiet --disable-pip-version-check \
            ${NULL_GPU_INDEX_URL:+--extra-index-url "$NULL_GPU_INDEX_URL"} -r "$folder/requirements.txt" ||
            code=3 fail "pip could not install torch $version"
        mv "$folder/requirements.txt" "$folder/installed"
    fi
fi
cuda=$("$python" -c 'from torch.version import cuda; print(cuda or "the CPU")')
[[ $cuda == 13.* ]] || fail "the torch in $folder/venv is built for $cuda, and the stand-ins are for CUDA 13"

# The stand-ins: one library, which is CUDA's driver by its name, and NVML by another. The runtime's package lacks some
# headers that Triton brings along.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
library=$folder/stand-ins/libcuda.so.1
stale() { for file in "$sources"/*.cpp "$sources"/*.h; do [[ $library -nt $file ]] || return 0; done; return 1; }
if stale; then
    mkdir -p "$folder/stand-ins"
    g++ -std=c++17 -O2 -Wall -Wextra -shared -fPIC -fvisibility=hidden -Wl,-soname,libcuda.so.1 \
        -isystem "$packages/nvidia/cu13/include" -isystem "$packages/triton/backends/nvidia/include" \
        "$sources"/*.cpp -o "$library.new" -ldl
    mv "$library.new" "$library" # programs that use the one before go on with it
    ln -sf libcuda.so.1 "$folder/stand-ins/libcuda.so"
    ln -sf libcuda.so.1 "$folder/stand-ins/libnvidia-ml.so.1"
fi

"$sources/run.sh" "$folder" python -c '
import torch
assert torch.cuda.get_device_capability() in ((8, 0), (9, 0)), torch.cuda.get_device_name()
assert torch.ones(4, device="cuda").add(1).cpu().shape == (4,)
print(f"null GPU: torch {torch.__version__} on {torch.cuda.device_count()} × {torch.cuda.get_device_name()}, which computes nothing")'
