#!/usr/bin/env bash
# Of a folder that scripts/gpu_pack.sh has packed: run.sh RECORD [SECONDS [BENCH_SECONDS]]
#
# Runs every GPU test with skips forbidden, those of candle and tch where they were packed, and the examples; measures for
# BENCH_SECONDS (215), beside PyTorch where python3 has one; then, in what is left of SECONDS (470), the semantics suite
# under each tool of compute-sanitizer, and the CPU path's tests, as this machine's processor may be another one. The
# folder RECORD gets:
#   environment.txt  the machine, the driver, the commit, and whether all has passed
#   tests.txt        what the tests printed
#   examples.txt     what the examples printed
#   bench.csv        the measurements; benches/README.md has the columns
#   bench.txt        which lists were measured and which were skipped
#   tables.md        bench.csv as tables
#   clocks.csv       clocks, power and temperature of the GPU, every second
#   sanitizers.txt   what the sanitizers printed
# Exits with 1 if anything failed or was not finished.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
record=${1:?usage: run.sh RECORD [SECONDS [BENCH_SECONDS]]}
seconds=${2:-470} bench_seconds=${3:-215}
mkdir -p "$record"
tar -C "$here" -xzf "$here/programs.tar.gz"
programs=$here/programs
export GRADCLIP_REQUIRE_GPU=1 GRADCLIP_GOLDEN=$here/golden PYTHONUNBUFFERED=1
GRADCLIP_COMMIT=$(cat "$here/COMMIT")
export GRADCLIP_COMMIT
failed=0

left() { echo $((seconds - SECONDS)); }
note() { echo "$*" | tee -a "$record/environment.txt"; }

# check LIMIT FILE COMMAND...: within LIMIT seconds (or what is left), its output to FILE.
check() {
  local limit=$1 file=$2 code
  shift 2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    note "NOT RUN, the time is over: ${*##*/}"
    failed=1
    return
  fi
  echo "\$ ${*##*/}" >> "$file"
  timeout "$limit" "$@" >> "$file" 2>&1
  code=$?
  case $code in
    0) note "passed after $SECONDS s: ${*##*/}" ;;
    124) note "NOT FINISHED in $limit s: ${*##*/}"; failed=1 ;;
    *) note "FAILED with $code: ${*##*/}"; failed=1; tail -n 20 "$file" ;;
  esac
}

: > "$record/environment.txt"
note "commit $GRADCLIP_COMMIT; $(cat "$here/BUILT")"
note "$(date -u +"date %FT%TZ")"
note "$(uname -srm), $(nproc) cores"
note "$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current --format=csv)"
nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active \
  --format=csv --loop=1 > "$record/clocks.csv" 2>&1 &
clocks=$!
scratch=$(mktemp -d)
trap 'kill "$clocks" 2>/dev/null; rm -rf "$scratch"' EXIT

check 60 "$record/tests.txt" "$programs/no_driver"
check 150 "$record/tests.txt" "$programs/on_gpu" --test-threads 1

# What candle and tch are linked to: the libraries of PyTorch, and of the NVIDIA packages it came with.
libraries=$(python3 - <<'PYTHON'
import glob, os, site, sys
try:
    import torch
except ImportError:
    sys.exit()
home = os.path.dirname(torch.__file__)
print(":".join([f"{home}/lib", *sorted(glob.glob(f"{os.path.dirname(home)}/nvidia/*/lib"))]))
PYTHON
)
torch=$(python3 -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null)
libraries=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ -e "$programs/candle_on_gpu" ]; then
  LD_LIBRARY_PATH=$libraries check 60 "$record/tests.txt" "$programs/candle_on_gpu" --test-threads 1
fi
if [ -e "$programs/tch_tests" ] && [ "$torch" = "$(cat "$here/TORCH")" ]; then
  LD_LIBRARY_PATH=$libraries check 60 "$record/tests.txt" "$programs/tch_tests" --test-threads 1
  LD_LIBRARY_PATH=$libraries check 30 "$record/examples.txt" "$programs/tch_cartpole" --quick
elif [ -e "$programs/tch_tests" ]; then
  note "SKIPPED: the tests of tch are for PyTorch $(cat "$here/TORCH"), here is ${torch:-none}"
fi

check 30 "$record/examples.txt" "$programs/cuda_graph"
check 30 "$record/examples.txt" "$programs/fused_adamw"
if grep -q "^not run:" "$record/examples.txt"; then note "FAILED: an example found no GPU"; failed=1; fi

# The budget is of the lists; starting, and the list that is under way when it ends, come on top.
if python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
  check $((bench_seconds + 45)) "$record/bench.txt" python3 "$here/torch_gpu.py" --bench "$programs/gpu_bench" \
    --budget "$bench_seconds" --out "$record/bench.csv"
else
  note "python3 has no PyTorch: measured without"
  check $((bench_seconds + 45)) "$record/bench.txt" "$programs/gpu_bench" --budget "$bench_seconds" --out "$record/bench.csv"
fi
# The largest list takes most of the memory, so PyTorch has none beside it.
if [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits --id=0)" -gt 136000 ] 2>/dev/null; then
  check 60 "$record/bench.txt" "$programs/gpu_bench" --max-gib 64 --list "64 GiB" --budget 20 --out "$scratch/large.csv"
  tail -n +2 "$scratch/large.csv" >> "$record/bench.csv"
else
  note "SKIPPED: the list of 64 GiB takes 128 GiB of GPU memory"
fi
grep -E "^PyTorch|SKIPPED|FAILED" "$record/bench.txt" | sed 's/^/bench: /' | tee -a "$record/environment.txt"
python3 "$here/record_to_tables.py" "$record/bench.csv" > "$record/tables.md"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    # The semantics suite is small: every kernel, every dtype, a few elements each.
    check 60 "$record/sanitizers.txt" compute-sanitizer --tool "$tool" --error-exitcode 1 "$programs/on_gpu" \
      --test-threads 1 suite::semantics
  done
else
  note "compute-sanitizer is not installed: SKIPPED"
fi

for test in $(cat "$here/CPU_TESTS"); do check 30 "$record/tests.txt" "$programs/$test"; done
check 30 "$record/examples.txt" "$programs/exploding_rnn" --quick --out "$scratch/chart.png"
check 30 "$record/examples.txt" "$programs/transformer_lm" --quick

cat "$record/tables.md"
if [ "$failed" = 0 ]; then note "ALL PASSED after $SECONDS s"; else note "SOME FAILED, after $SECONDS s"; fi
exit "$failed"
