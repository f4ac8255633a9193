#!/usr/bin/env bash
# Packs the GPU tests and the bench into a folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/gpu_pack.sh FOLDER      then, on the GPU machine:      FOLDER/run.sh RECORD [SECONDS [BENCH_SECONDS]]
# run.sh (scripts/gpu_run.sh) says what it does and what it leaves in the folder RECORD.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=${1:?usage: scripts/gpu_pack.sh FOLDER}
mkdir -p "$pack/golden"

# Builds a target; its path, from cargo itself: `binary test NAME` or `binary bench NAME`.
binary() {
  cargo test --release "--$1" "$2" --no-run --message-format=json 2>/dev/null |
    python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("reason") == "compiler-artifact" and m["target"]["name"] == sys.argv[1] and m.get("executable"):
        print(m["executable"])' "$2"
}
put() {
  local built
  built=$(binary "$1" "$2")
  cp "$built" "$pack/$3"
  strip --strip-debug "$pack/$3"
}
put test on_gpu on_gpu
put test no_driver no_driver
put bench gpu gpu_bench
cp tests/golden/*.json tests/golden/*.md "$pack/golden"
cp benches/torch_gpu.py scripts/record_to_tables.py "$pack"
cp scripts/gpu_run.sh "$pack/run.sh"
git describe --always --dirty --abbrev=12 > "$pack/COMMIT"
echo "built $(date -u +%F), $(rustc --version)" > "$pack/BUILT"
echo "packed into $pack, $(du -sm "$pack" | cut -f1) MB; on the GPU machine: $pack/run.sh RECORD"
