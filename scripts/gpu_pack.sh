#!/usr/bin/env bash
# Packs tests, benches and examples into a folder that runs on a machine with an NVIDIA driver and no Rust.
#   scripts/gpu_pack.sh FOLDER [--candle] [--tch]    then, on the GPU machine:    FOLDER/run.sh RECORD
# run.sh (scripts/gpu_run.sh) has the two calls for a machine that is borrowed for minutes.
#
# --candle adds candle with its own kernels, compiled for sm_90 (H100, H200) by nvcc from packages: the adapter's tests, and
#   two examples that train on the GPU. They take the CUDA 13 libraries of the machine's PyTorch. Some 10 minutes, once.
# --tch adds the tests of tch and its example, built against the libtorch of PyTorch 2.11 (tch 0.24). They run where PyTorch
#   is 2.11, in its own libraries; for another release see scripts/libtorch.py, and set TORCH. 600 MB to download, once.
# --smoke packs the GPU tests and nothing else: what CI tries.
#
# Not packed, as they need the sources: on_double, old_driver, driver_double, host_kernels, abi and candle_cuda compile
# C++ of tests/double, build_script runs build.rs on kernels/; and the bench enqueue, which runs on the double.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: scripts/gpu_pack.sh FOLDER [--candle] [--tch] | FOLDER --smoke"
case ${1:-} in
  '' | -*) echo "$usage" >&2; exit 2 ;;
esac
pack=$1
shift
smoke='' candle='' tch=''
for option; do
  case $option in
    --smoke) smoke=1 ;;
    --candle) candle=1 ;;
    --tch) tch=1 ;;
    *) echo "gpu_pack.sh: $option is no option; $usage" >&2; exit 2 ;;
  esac
done

# What a device machine takes: the pack and the tracked tree together, in MiB.
MOST_MIB=56

# Before anything is touched. Where the tree is not clean, which files differ.
commit=$(git rev-parse --short=12 HEAD)
differ=$(git status --porcelain --untracked-files=normal | cut -c4- | tr '\n' ' ')
[ -z "$differ" ] || commit="$commit, but for ${differ% }"

if [ -n "$(ls -A "$pack" 2>/dev/null)" ] && { [ ! -e "$pack/COMMIT" ] || [ ! -d "$pack/golden" ]; }; then
  echo "gpu_pack.sh: $pack holds files, and they are no pack; name an empty folder" >&2
  exit 2
fi
rm -rf "$pack"
mkdir -p "$pack/golden"
pack=$(cd "$pack" && pwd)
echo "$commit" > "$pack/COMMIT"
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT

# Builds targets and packs them by name: `pack_built [NAME=OTHER]... -- cargo's arguments`; OTHER where the name says too
# little, or is that of a folder.
pack_built() {
  python3 - "$programs" "$@" <<'PYTHON'
import json, shutil, subprocess, sys
programs, *rest = sys.argv[1:]
names, command = dict(arg.split("=") for arg in rest[:rest.index("--")]), rest[rest.index("--") + 1:]
built = subprocess.run([*command, "--quiet", "--message-format=json"], stdout=subprocess.PIPE, text=True)
if built.returncode != 0:
    sys.exit(f"gpu_pack.sh: {' '.join(command)} failed")
for line in built.stdout.splitlines():
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        name = message["target"]["name"]
        path = f"{programs}/{names.get(name, name)}"
        shutil.copy(message["executable"], path)
        subprocess.run(["strip", path], check=True)
PYTHON
}

if [ -n "$smoke" ]; then
  : > "$pack/CPU_TESTS"
  pack_built -- cargo test --release --no-run --features nccl --test=on_gpu --test=no_driver
else
  cpu_tests=(accuracy conversions exact fp_env golden hostile into properties threads)
  echo "unit_tests ${cpu_tests[*]/#golden/golden_tests}" > "$pack/CPU_TESTS"
  tests=(on_gpu no_driver "${cpu_tests[@]}")
  pack_built gpu=gpu_bench variants=variants_bench golden=golden_tests gradclip=unit_tests -- \
    cargo test --release --no-run --features nccl --lib "${tests[@]/#/--test=}" --bench=gpu --bench=variants
  pack_built -- cargo build --release --example cuda_graph --example fused_adamw
  cp benches/torch_gpu.py scripts/record_to_tables.py "$pack"
fi

[ -z "$candle" ] || scripts/candle_cuda.py gpu-programs "$programs"

if [ -n "$tch" ]; then
  torch=${TORCH:-2.11.0}
  variables=$(python3 scripts/libtorch.py --torch "$torch")   # not within eval, which would hide a failure
  target=$(cargo metadata --no-deps --format-version=1 | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
  # In a copy of the tree: Cargo.lock, which has another tch, stays as it is, also if this is interrupted.
  copy=$target/gpu-pack-tch
  rm -rf "$copy"
  mkdir -p "$copy"
  git ls-files -z | tar --null --ignore-failed-read -T - -c | tar -x -C "$copy"
  (
    cd "$copy"
    eval "$variables"
    export CARGO_TARGET_DIR=$target
    case $torch in 2.11.*) cargo update --quiet -p tch --precise 0.24.0 ;; esac
    pack_built tch=tch_tests -- cargo test --release --no-run --features tch --test tch
    pack_built -- cargo build --release --features tch --example tch_cartpole
  )
  rm -rf "$copy"
  echo "$torch" > "$pack/TORCH"
fi

cp tests/golden/*.json tests/golden/*.md "$pack/golden"
cp scripts/gpu_run.sh "$pack/run.sh"
cp scripts/gpu_run.py "$pack/run.py"
echo "built $(date -u +%F), $(rustc --version)" > "$pack/BUILT"
# The programs have most of their bytes in common, further apart than the window of gzip.
python3 - "$programs" "$pack/programs.tar.xz" <<'PYTHON'
import os, sys, tarfile
folder, archive = sys.argv[1:]
with tarfile.open(archive, "w:xz", preset=9) as tar:
    for name in sorted(os.listdir(folder)):
        tar.add(f"{folder}/{name}", arcname=name)
PYTHON

# Not the empty files of the stand-in for nvcc that is used without a GPU.
[ -z "$candle" ] || scripts/candle_cuda.py kernels "$pack/programs.tar.xz"

mib() { du -cB1 --apparent-size "$@" | tail -n 1 | awk '{ print int($1 / 1048576) + 1 }'; }
pack_mib=$(mib "$pack")
tree_mib=$(git ls-files -z | xargs -0 cat 2>/dev/null | wc -c | awk '{ print int($1 / 1048576) + 1 }')
echo "packed commit $commit into $pack in $SECONDS s: $pack_mib MiB, with the tracked tree $((pack_mib + tree_mib)) MiB of $MOST_MIB"
[ $((pack_mib + tree_mib)) -lt "$MOST_MIB" ] || { echo "gpu_pack.sh: that is too much to carry" >&2; exit 1; }
