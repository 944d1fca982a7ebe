#!/usr/bin/env bash
# Everything that needs a GPU and is not a benchmark of speed, in one go: kernels and methods against their references, a full-size Wan
# end to end, and quality curves of the bundled model at 9 216 video tokens. Needs the package on the path; writes JSON to a folder.
#
#   scripts/check_gpu.sh out
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: scripts/check_gpu.sh FOLDER}
mkdir -p "$out"
failed=()

run() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
    tail -n 12 "$out/$name.log"
    echo "== $name took $((SECONDS - start)) s"
}

run kernels python3 "$here/check_kernels.py" --out "$out/kernels.json"
run methods python3 "$here/check_methods.py" --out "$out/methods.json"
run wan python3 "$here/bench_wan.py" --out "$out/wan-1.3b.json"
run quality python3 "$here/bench_quality.py" --size 33x256x256 --prompts 3 --lpips "${LPIPS:-none}" --out "$out/quality-9216.json" --configs \
    dense,dense_backend=math \
    svg1,density=0.3,warmup_layers=0 svg1,density=0.5,warmup_layers=0 \
    svg2,top_p=0.6,num_q_clusters=100,num_k_clusters=400,warmup_layers=0,min_k_ratio=0.05 \
    svg2,top_p=0.75,num_q_clusters=100,num_k_clusters=400,warmup_layers=0 \
    svg2,top_p=0.9,num_q_clusters=100,num_k_clusters=400,warmup_layers=0 \
    svg2,top_p=0.75,num_q_clusters=200,num_k_clusters=800,warmup_layers=0
run tiny-wan python3 "$here/check_tiny.py" --batch 32 --out "$out/tiny-wan.json" --sheet "$out/tiny-wan.png"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
