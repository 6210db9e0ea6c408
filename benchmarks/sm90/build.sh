#!/bin/bash
# Builds build/sm90/calibrate: one binary that needs a driver and no CUDA toolkit.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p build/sm90
nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -Werror all-warnings \
  -Xcompiler -Wall,-Wextra,-Werror,-static-libstdc++,-static-libgcc -Xptxas -v \
  -o build/sm90/calibrate benchmarks/sm90/calibrate.cu 2>build/sm90/compiler.log ||
  { cat build/sm90/compiler.log >&2; exit 1; }
grep -E "spill|warning" build/sm90/compiler.log | grep -v " 0 bytes spill stores, 0 bytes spill loads" || true
ls -la build/sm90/calibrate
