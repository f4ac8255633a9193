#!/usr/bin/env bash
# Packs tests, benches and examples into a folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/gpu_pack.sh FOLDER [--candle] [--tch]    then, on the GPU machine:    FOLDER/run.sh RECORD [SECONDS [BENCH_SECONDS]]
# run.sh (scripts/gpu_run.sh) says what it does and what it leaves in the folder RECORD.
#
# --candle adds the tests of candle's CUDA tensors: built without a toolkit by scripts/candle_cuda.py, so candle's own
# kernels are missing in them; these tests need none. On the GPU machine they take the CUDA 13 libraries of its PyTorch.
# --tch adds the tests of tch, built against the libtorch of PyTorch 2.11 (tch 0.24). They run where PyTorch is 2.11, in
# its own libraries; for another release see scripts/libtorch.py, and set TORCH. About 600 MB to download, once.
#
# Not packed, as they need the sources: on_double, old_driver, driver_double, host_kernels, abi and candle_cuda compile
# C++ of tests/double, build_script runs build.rs on kernels/; and the bench enqueue, which runs on the double.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=${1:?usage: scripts/gpu_pack.sh FOLDER [--candle] [--tch]}
shift
rm -rf "$pack/programs"
mkdir -p "$pack/golden" "$pack/programs"

# Builds targets and packs them by name: `pack_built [NAME=OTHER]... -- cargo's arguments`; OTHER where the name says too
# little, or is that of a folder.
pack_built() {
  python3 - "$pack" "$@" <<'PYTHON'
import json, shutil, subprocess, sys
pack, *rest = sys.argv[1:]
names, command = dict(arg.split("=") for arg in rest[:rest.index("--")]), rest[rest.index("--") + 1:]
built = subprocess.run([*command, "--quiet", "--message-format=json"], stdout=subprocess.PIPE, text=True)
if built.returncode != 0:
    sys.exit(f"gpu_pack.sh: {' '.join(command)} failed")
for line in built.stdout.splitlines():
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        name = message["target"]["name"]
        path = f"{pack}/programs/{names.get(name, name)}"
        shutil.copy(message["executable"], path)
        subprocess.run(["strip", path], check=True)
PYTHON
}

cpu_tests=(accuracy conversions exact fp_env golden hostile into properties threads)
tests=(on_gpu no_driver "${cpu_tests[@]}")
pack_built gpu=gpu_bench cpu=cpu_bench golden=golden_tests gradclip=unit_tests -- \
  cargo test --release --no-run --lib "${tests[@]/#/--test=}" --bench=gpu --bench=cpu
pack_built -- cargo build --release --example cuda_graph --example fused_adamw
pack_built -- cargo build --release --features candle --example exploding_rnn
pack_built -- cargo build --release -p transformer_lm
echo "unit_tests ${cpu_tests[*]/#golden/golden_tests}" > "$pack/CPU_TESTS"

for option; do
  case $option in
    --candle)
      scripts/candle_cuda.py gpu-test "$pack/programs/candle_on_gpu"
      strip "$pack/programs/candle_on_gpu"
      ;;
    --tch)
      torch=${TORCH:-2.11.0}
      variables=$(python3 scripts/libtorch.py --torch "$torch")   # not within eval, which would hide a failure
      cp Cargo.lock "$pack/Cargo.lock.before"
      trap 'mv "$pack/Cargo.lock.before" Cargo.lock' EXIT
      case $torch in 2.11.*) cargo update --quiet -p tch --precise 0.24.0 ;; esac
      (
        eval "$variables"
        pack_built tch=tch_tests -- cargo test --release --no-run --features tch --test tch
        pack_built -- cargo build --release --features tch --example tch_cartpole
      )
      echo "$torch" > "$pack/TORCH"
      ;;
    *) echo "gpu_pack.sh: $option is no option" >&2; exit 2 ;;
  esac
done

cp tests/golden/*.json tests/golden/*.md "$pack/golden"
cp benches/torch_gpu.py scripts/record_to_tables.py "$pack"
cp scripts/gpu_run.sh "$pack/run.sh"
# As they are they would be 80 MB.
tar -C "$pack" -czf "$pack/programs.tar.gz" programs
rm -r "$pack/programs"
git describe --always --dirty --abbrev=12 > "$pack/COMMIT"
echo "built $(date -u +%F), $(rustc --version)" > "$pack/BUILT"
echo "packed into $pack, $(du -sm "$pack" | cut -f1) MB; on the GPU machine: $pack/run.sh RECORD"
