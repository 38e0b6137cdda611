#!/usr/bin/env bash
# One page on what the models do on this machine's GPU, on the screen and in a file:
#
#     bash tests/bench_gpu.sh [page.txt]        # about 6 minutes; --tiny first for a dry run on a CPU
#
# Needs PyTorch with CUDA and this repository. PyAV and tqdm are fetched into a temporary folder if
# they are not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
tiny=""
if [ "${1:-}" = "--tiny" ]; then tiny="--tiny"; shift; fi
page="${1:-bench_gpu.txt}"
python="$(command -v python3 || command -v python)"
if ! "$python" -c "import av, tqdm" 2>/dev/null; then
    packages="$(mktemp -d)"
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --target "$packages" --no-deps "av>=18.1,<19" tqdm
    export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
PYTHONUNBUFFERED=1 "$python" tests/bench_gpu.py $tiny 2>&1 | tee "$page"
