#!/usr/bin/env bash
# Packs the test binaries into a folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/gpu_pack.sh FOLDER      then, on the GPU machine:      FOLDER/run.sh RECORD
# run.sh runs every GPU test with skips forbidden, then a small part under compute-sanitizer where it is installed, and
# writes what it saw to RECORD.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=${1:?usage: scripts/gpu_pack.sh FOLDER}
mkdir -p "$pack"

# The path of each test binary, from cargo itself.
binary() {
  cargo test --release --test "$1" --no-run --message-format=json 2>/dev/null |
    python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("reason") == "compiler-artifact" and m["target"]["name"] == sys.argv[1] and m.get("executable"):
        print(m["executable"])' "$1"
}
for test in on_gpu no_driver; do
  cp "$(binary "$test")" "$pack/$test"
  strip --strip-debug "$pack/$test"
done
mkdir -p "$pack/golden"
cp tests/golden/*.json tests/golden/README.md "$pack/golden"
{
  echo "commit $(git rev-parse HEAD)$(git diff --quiet HEAD -- || echo ' with local changes')"
  echo "built $(date -u +%F), $(rustc --version)"
} > "$pack/COMMIT"

cat > "$pack/run.sh" <<'RUN'
#!/usr/bin/env bash
# Usage: run.sh RECORD. Exits with 1 if anything failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
record=${1:?usage: run.sh RECORD}
failed=0
export GRADCLIP_REQUIRE_GPU=1 GRADCLIP_GOLDEN=$here/golden
check() { echo "\$ $*"; "$@" || { echo "FAILED: $*"; failed=1; }; }
{
  cat "$here/COMMIT"
  date -u +"date %FT%TZ"
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,power.limit,ecc.mode.current --format=csv
  check "$here/no_driver"
  check "$here/on_gpu" --test-threads 1
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      # The semantics suite is small: every kernel, every dtype, a few elements each.
      check compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/on_gpu" --test-threads 1 suite::semantics
    done
  else
    echo "compute-sanitizer is not installed: SKIPPED"
  fi
  [ $failed = 0 ] && echo "ALL PASSED" || echo "SOME FAILED"
} 2>&1 | tee "$record"
grep -q "^ALL PASSED" "$record"
RUN
chmod +x "$pack/run.sh"
echo "packed into $pack; on the GPU machine: $pack/run.sh RECORD"
