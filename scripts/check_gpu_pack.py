#!/usr/bin/env python3
"""Tries the GPU pack where there is no GPU, outside the checkout: what would otherwise fail first on a borrowed machine.

    scripts/check_gpu_pack.py

With programs that stand in for a test: each verdict, a process that does not want to end, a panic printed as it happens,
the gate, a stop from outside, a summary that stays short. With the real pack of the GPU tests: the smoke on the driver
double, and the whole script without any driver.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from candle_cuda import build_double
from cuda_packages import ROOT, fail, target_dir

# In the order of scripts/gpu_run.py.
GPU_STAGES = ("jit", "smoke", "predictions", "suite", "adapters", "examples", "bench", "sanitizers", "variants", "ncu", "large")
MOST_CHARACTERS = 12_000

# Prints as libtest does; `suite::every_kernel` is the smoke, `--exact` is what looks closer, `suite::parity` etc. are parts.
ON_GPU = r"""#!/usr/bin/env bash
passed="test result: ok. ${TESTS:-5} passed; 0 failed"
case "$*" in
  *--skip*) trap '' TERM; echo "thread 'x' panicked at here:1:1:"; echo "the reason"; for _ in {1..400}; do sleep 0.1; done ;;
  *first_calls*) echo "first call of total_norm: 1.0 ms"; echo "$passed" ;;
  *--exact*) echo "alone: $*, blocking ${CUDA_LAUNCH_BLOCKING:-0}"; exit 101 ;;
  *suite::every_kernel*)
    [ -z "${SMOKE_EXIT:-}" ] && { echo "$passed"; exit 0; }
    printf 'test suite::every_kernel::norms ... ok\ntest suite::every_kernel::values ... '
    echo "thread 'suite::every_kernel::values' panicked at a.rs:1:1:"; echo "left: 1"; echo FAILED
    exit "$SMOKE_EXIT" ;;
  *suite::scoped*) echo "$passed" ;;
  *suite::parity*) for i in {1..3000}; do echo "test result: FAILED. a long line that should not fill the summary $i"; done; exit 3 ;;
esac
"""


def check(condition, what):
    if not condition:
        fail(f"check_gpu_pack.py: {what}")


def stand_in(folder):
    """A pack whose programs are scripts."""
    pack = folder / "stand-in"
    (pack / "golden").mkdir(parents=True)
    for name in ("COMMIT", "BUILT", "CPU_TESTS"):
        (pack / name).write_text("golden_tests missing\n" if name == "CPU_TESTS" else f"{name} of a stand-in\n")
    programs = {"on_gpu": ON_GPU, "no_driver": "#!/bin/sh\n", "golden_tests": "#!/bin/sh\necho $GRADCLIP_COMMIT\n"}
    with tarfile.open(pack / "programs.tar.xz", "w:xz") as tar:
        for name, text in programs.items():
            path = folder / name
            path.write_text(text)
            path.chmod(0o755)
            tar.add(path, arcname=name)
    for name, script in (("run.sh", "gpu_run.sh"), ("run.py", "gpu_run.py")):
        shutil.copy(ROOT / "scripts" / script, pack / name)
    return pack


def environment(**more):
    """With a folder for temporary files of its own, and no driver but one that is given."""
    return {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"} | more


def run(pack, record, *options, **more):
    """The exit code, what was printed, the verdicts by process, and the seconds."""
    began = time.monotonic()
    done = subprocess.run(["bash", pack / "run.sh", record, *options], env=environment(**more), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=record.parent)
    seconds = time.monotonic() - began
    check((record / "verdicts.csv").exists(), f"no verdicts were written:\n{done.stdout[-2000:]}")
    with tarfile.open(f"{record}.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    check({"verdicts.csv", "summary.txt"} <= names, f"the archive lacks files: {names}")
    summary = done.stdout[done.stdout.rindex("SUMMARY"):]
    check(len(summary) <= MOST_CHARACTERS, f"a summary of {len(summary)} characters")
    check(summary == (record / "summary.txt").read_text(), "what is printed last is not the summary")
    return done.returncode, done.stdout, verdicts(record), seconds


def verdicts(record):
    rows = csv.DictReader((record / "verdicts.csv").open())
    return {row["stage"] if row["stage"] == row["process"] else f"{row['stage']}: {row['process']}": row["verdict"]
            for row in rows}


def check_verdicts(folder):
    pack, record = stand_in(folder), folder / "record"
    temporary = {"TMPDIR": str(folder)}

    code, printed, found, _ = run(pack, record, "--only", "jit,smoke", **temporary)
    check(code == 0 and found["smoke"] == "passed" and "ALL THAT RAN HAS PASSED: 4 passed" in printed, f"all passes: {printed}")

    # Parts that fail, that run into their limit and ignore SIGTERM, that are not there. The record of before is gone.
    (record / "left.txt").write_text("of the run before")
    code, printed, found, seconds = run(pack, record, "--only", "suite", "--seconds", "16", **temporary)
    check(code == 1 and not (record / "left.txt").exists(), f"exit code {code}")
    check(found["suite: suite::parity"] == "FAILED with 3", str(found))
    check(found["suite: the rest"].startswith("NOT FINISHED"), str(found))
    check(found["suite: suite::scoped suite::into"] == "passed" == found["suite: CPU golden_tests"], str(found))
    check(found["suite: CPU missing"].startswith("FAILED"), str(found))
    check(seconds < 30, f"{seconds:.0f} s, and 16 were to be had")
    panic = printed.index("the reason")
    check(panic < printed.index("NOT FINISHED") and panic < printed.index("SUMMARY"), "the panic was not printed as it happened")
    check("COMMIT of a stand-in" in (record / "suite-CPU-golden_tests.txt").read_text(), "a program does not know its commit")

    found = run(pack, record, "--only", "examples,bench", **temporary)[2]
    check(found["examples: cuda_graph"] == found["bench"] == "NOT RUN: not packed", str(found))

    code, printed, found, _ = run(pack, record, "--seconds", "11", "--only", "suite,variants", **temporary)
    check(code == 1 and found["variants"] == "NOT RUN: not packed", str(found))
    code, printed, found, _ = run(pack, record, "--only", "variants,ncu", **temporary)
    check(code == 1 and "NOTHING HAS RUN" in printed, printed)

    found = run(pack, record, "--seconds", "16", "--only", "suite", TESTS="0", **temporary)[2]
    check(found["suite: suite::scoped suite::into"].startswith("FAILED: its output lacks test result: ok"), str(found))

    # The gate: the first test that failed, alone; then nothing more.
    code, printed, found, _ = run(pack, record, SMOKE_EXIT="101", **temporary)
    check(code == 1 and found["smoke"] == "FAILED with 101", str(found))
    closer = (record / "smoke-first-failing-test-blocking-launches.txt").read_text()
    check("--exact suite::every_kernel::values, blocking 1" in closer, closer)
    check(found["bench"] == found["suite: the rest"] == "NOT RUN: the smoke failed", str(found))

    # A stop from outside: what there is comes back.
    process = subprocess.Popen(["bash", pack / "run.sh", record, "--only", "jit,suite"], env=environment(**temporary),
                               stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=30)[0]
    found = verdicts(record)
    check(process.returncode == 1 and found["jit: compiled"] == "passed", str(found))
    check(found["suite: the rest"] == "NOT FINISHED, stopped by SIGTERM" and "SUMMARY" in printed, str(found))

    # A sanitizer that looks at nothing, an nvidia-smi that hangs, a listener that goes, a folder that is not there.
    tools = folder / "tools"
    tools.mkdir()
    for name, script in (("compute-sanitizer", "exit 0"), ("nvidia-smi", "sleep 100")):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    more = temporary | {"PATH": f"{tools}:{os.environ['PATH']}"}
    code, printed, found, seconds = run(pack, record, "--only", "sanitizers", "--skip", "card", **more)
    check(code == 1 and found["sanitizers: memcheck"].startswith("FAILED: its output lacks"), str(found))
    check(seconds < 30, f"{seconds:.0f} s with an nvidia-smi that hangs")
    archive = folder / "not there yet" / "a.tar.gz"
    subprocess.run(f'bash "{pack}/run.sh" "{record}" --only smoke --archive "{archive}" | true', shell=True,
                   env=environment(**temporary))
    check(archive.exists() and verdicts(record)["smoke"] == "passed", "nobody listened, and the record was lost")

    refused = subprocess.run(["bash", pack / "run.sh", record, "--only", "smok"], capture_output=True, text=True)
    check(refused.returncode != 0 and "no stage is called 'smok'" in refused.stderr, refused.stderr)
    for options in (["--seconds", "0"], ["--seconds", "nan"], ["--only", ""], ["--only", ","]):
        refused = subprocess.run(["bash", pack / "run.sh", record, *options], capture_output=True, text=True)
        check(refused.returncode != 0 and "run.sh" in refused.stderr and "Traceback" not in refused.stderr, refused.stderr)
    refused = subprocess.run(["bash", pack / "run.sh", pack / "COMMIT"], capture_output=True, text=True)
    check(refused.returncode != 0 and "Traceback" not in refused.stderr, refused.stderr)
    other = folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    (other / "environment.txt").write_text("which a record has as well")
    refused = subprocess.run(["bash", pack / "run.sh", other], capture_output=True, text=True)
    check(refused.returncode != 0 and (other / "thesis.tex").exists(), "a folder that is no record was emptied")


def check_pack(folder):
    packed = target_dir() / "smoke-pack"
    subprocess.run([ROOT / "scripts/gpu_pack.sh", packed, "--smoke"], check=True)
    pack = folder / "pack"
    shutil.copytree(packed, pack)
    record = folder / "record"

    code, printed, found, seconds = run(pack, record, "--only", "jit,smoke", TMPDIR=str(folder),
                                        LD_LIBRARY_PATH=str(build_double().parent))
    check(code == 0 and found["smoke"] == found["jit: compiled"] == "passed", printed)
    passed = (record / "smoke.txt").read_text()
    check("8 passed; 0 failed" in passed, passed)
    print(f"the smoke passes on the driver double, in {seconds:.1f} s")

    probe = subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], capture_output=True,
                           env=environment())
    if probe.returncode == 0:
        print("SKIPPED: this machine has a driver, so the script cannot be tried without one")
        return
    code, printed, found, seconds = run(pack, record, TMPDIR=str(folder))
    check(code == 1 and seconds < 60, f"without a driver: exit code {code} after {seconds:.0f} s")
    check("no CUDA driver" in printed and "Install the NVIDIA driver" in printed, printed)
    for stage in GPU_STAGES:
        check(any(name.split(":")[0] == stage for name in found), f"the stage {stage} is not named: {found}")
    check(found["smoke"].startswith("FAILED") and found["bench"] == "NOT RUN: there is no GPU", str(found))
    print(f"without a driver the script ends in {seconds:.1f} s, and names each stage")


def main():
    if len(sys.argv) > 1:
        sys.exit(__doc__.strip())
    with tempfile.TemporaryDirectory() as folder:
        check_verdicts(Path(folder))
    print("verdicts, limits, gate and summary of the pack's script: as they should be")
    with tempfile.TemporaryDirectory() as folder:
        check_pack(Path(folder))


if __name__ == "__main__":
    main()
