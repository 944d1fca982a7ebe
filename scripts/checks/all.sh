#!/usr/bin/env bash
# Everything that needs a GPU and is not a benchmark of speed, in one go: kernels and methods against their references, a full-size Wan
# end to end, and quality curves of the bundled model at 9 216 video tokens. Needs the package on the path; writes JSON to a folder.
# LPIPS=none leaves LPIPS out where its weights are missing.
#
#   scripts/checks/all.sh out
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(mkdir -p "${1:?usage: scripts/checks/all.sh FOLDER}" && cd "$1" && pwd)
failed=()

run() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" >"$out/$name.log" 2>&1 || failed+=("$name")
    tail -n 12 "$out/$name.log"
    echo "== $name took $((SECONDS - start)) s"
}

for name in kernels methods quantised sparge training linears; do
    flags=()
    [ "$name" = methods ] || flags=(--no-timing)
    run "$name" python3 "$here/$name.py" "${flags[@]}" --out "$out/$name.json"
done
run wan python3 "$here/../bench/wan.py" --out "$out/wan-1.3b.json"
clusters=num_q_clusters=200,num_k_clusters=800,warmup_layers=0,min_k_ratio=0.02
run quality python3 "$here/../bench/quality.py" --size 33x256x256 --prompts 3 --lpips "${LPIPS:-alex}" --out "$out/quality-9216.json" --configs \
    dense,dense_backend=math sage2 \
    svg1,density=0.2,warmup_layers=0 svg1,density=0.3,warmup_layers=0 \
    "svg2,top_p=0.7,$clusters" "svg2,top_p=0.9,$clusters" \
    "svg2,top_p=0.4,compensate=true,$clusters" "svg2,top_p=0.8,compensate=true,$clusters" \
    "svg2,top_p=0.7,precision=int8-fp8,$clusters" sparge,topk=0.3,order=rowmajor,warmup_layers=0
run tiny-wan python3 "$here/../tiny/check.py" --batch 32 --out "$out/tiny-wan.json" --sheet "$out/tiny-wan.png"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
