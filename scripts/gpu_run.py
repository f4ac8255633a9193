"""Runs a folder that scripts/gpu_pack.sh has packed; run.sh, beside it, has the two command lines.

    run.sh RECORD [--seconds N] [--only STAGE,...] [--skip STAGE,...] [--archive FILE] [--keep-going]

The stages, what says most per second first. Each process has its own limit, its own file in RECORD, and its own verdict:
`passed`, `FAILED`, `NOT FINISHED` (it ran into its limit) or `NOT RUN` with the reason. Only the first is success; only
FAILED and NOT FINISHED are failures, and make the exit code 1.

    card         what machine this is: GPU, driver, commit
    jit          the first call of each verb, compiled by the driver, then from its cache
    smoke        every kernel once, bit for bit. If it fails: the first failing test alone with blocking launches, and
                 under memcheck; then the script stops, so that the time is left for a mend (--keep-going goes on)
    predictions  what docs/performance.md predicts, measured: a minute that says how fast the kernels are
    suite        all other tests, of the GPU and of the CPU path, several processes at once
    adapters     the tests of candle, tch and NCCL in the libraries of this machine's PyTorch
    examples     models trained on the GPU, one after the other
    bench        beside PyTorch
    sanitizers   memcheck, racecheck, initcheck and synccheck over every kernel, at once
    variants     other ways to write the kernels
    ncu          counters of four kernels
    large        a list of 64 GiB, where a GPU has room for it and its copy

RECORD is emptied first. It gets a file for each process, and: environment.txt, verdicts.csv, clocks.csv (samples of the
GPU's clocks), predictions.csv, bench.csv, tables.md, variants.csv, summary.txt.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import datetime
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUMMARY_CHARACTERS = 12_000
KILL_AFTER = 5  # seconds from SIGTERM to SIGKILL
SHORTEST = 5  # what has less time is not started
CLOCK_PAUSE = 10  # seconds between samples: each asks the driver, which one a second would disturb (bench: medians)

MARK = "RECORD"  # the file that says of a folder that it is a record

PASSED, FAILED, NOT_FINISHED = "passed", "FAILED", "NOT FINISHED"
NO_TIME = "NOT RUN: no time"

# A panic of Rust, an error of Python, a finding of a sanitizer: printed as it happens, with the lines after it.
ALARM = re.compile(
    r"panicked at|^error:|^Error|Traceback|^========= (Invalid|Error:|Uninitialized|Barrier|Race|Program hit)")
ALARM_LINES, ALARMS = 4, 6
# The line that says how a sanitizer ended, a share of a step, a prediction.
KEPT = re.compile(r"ERROR SUMMARY|RACECHECK SUMMARY|confirmed|refuted|of a step|first call|test result: |SKIPPED|STOPPED")


@dataclass
class Task:
    """One process."""

    name: str
    command: list
    limit: float
    environment: dict = field(default_factory=dict)
    why_not: str = ""  # why it cannot run, if it cannot
    proof: tuple = ()  # patterns that its output has if it did its work: some tools do nothing and call that a success


@dataclass
class Stage:
    name: str
    tasks: object  # a function of the run that lists them
    at_once: int = 1  # processes


@dataclass
class Verdict:
    stage: str
    task: str
    text: str
    seconds: float = 0
    alarms: list = field(default_factory=list)
    kept: list = field(default_factory=list)

    @property
    def is_failure(self):
        return self.text.startswith((FAILED, NOT_FINISHED))


class Run:
    def __init__(self, args, stages):
        self.started = time.monotonic()
        self.record, self.seconds, self.keep_going, self.stages = args.record, args.seconds, args.keep_going, stages
        self.programs = unpack()
        self.scratch = Path(tempfile.mkdtemp())
        self.verdicts, self.lock = [], threading.Lock()
        self.running, self.stopped_by = set(), ""
        self.torch, self.nvidia_smi = find_torch(), NvidiaSmi()
        self.environment = environment(self.programs)

    def left(self):
        return self.seconds - (time.monotonic() - self.started)

    def say(self, text):
        with self.lock, contextlib.suppress(OSError):  # nobody may be listening any more
            print(f"{time.monotonic() - self.started:5.0f} s  {text}", flush=True)

    def program(self, name, *arguments):
        return [str(self.programs / name), *map(str, arguments)]

    def is_packed(self, name):
        return "" if (self.programs / name).exists() else "not packed"

    # Processes

    def execute(self, stage, task):
        verdict = Verdict(stage, task.name, "")
        limit = min(task.limit, self.left() - SHORTEST)  # as long is kept for the summary
        if task.why_not or self.stopped_by:
            verdict.text = f"NOT RUN: {task.why_not or self.stopped_by}"
        elif limit < SHORTEST:
            verdict.text = NO_TIME
        else:
            try:
                self.watch(verdict, task, limit)
            except OSError as error:  # a full disk takes one verdict, not the record
                verdict.text = f"{FAILED}: {error}"
        with self.lock:
            self.verdicts.append(verdict)
        seconds = f" in {verdict.seconds:.1f} s" if verdict.seconds else ""
        self.say(f"{verdict.text}{seconds}: {label(verdict)}")
        return verdict

    def watch(self, verdict, task, limit):
        began = time.monotonic()
        path = self.record / f"{re.sub('[^A-Za-z0-9_]+', '-', label(verdict))}.txt"
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"$ {' '.join(Path(part).name if part.startswith('/') else part for part in task.command)}\n")
            file.flush()
            # `timeout` ends the whole group, and is itself waited for with a limit: a process that hangs in the driver
            # cannot be killed, and must not take the other stages with it. What is preloaded is so into the program alone.
            variables = [f"{name}={value}" for name, value in task.environment.items()]
            through_env = ["env", *variables] if variables else []
            command = ["timeout", "-k", str(KILL_AFTER), f"{limit:.1f}", *through_env, *task.command]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env=self.environment)
            self.running.add(process)
            reader = threading.Thread(target=self.read, args=(verdict, process.stdout, file), daemon=True)
            reader.start()
            try:
                code = process.wait(limit + KILL_AFTER + 3)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
            reader.join(3)
            self.running.discard(process)
        verdict.seconds = time.monotonic() - began
        # 124: it ended on SIGTERM; 137 or -9: timeout had to kill it, and went with it. A program that the system kills for
        # its memory ends so as well, but early.
        late = code is None or (code in (124, 137, -9) and verdict.seconds > limit - 1)
        if code == 0:
            printed = path.read_text(errors="replace")
            lacking = [pattern for pattern in task.proof if not re.search(pattern, printed)]
            verdict.text = f"{FAILED}: its output lacks {lacking[0]}" if lacking else PASSED
        elif self.stopped_by:
            verdict.text = f"{NOT_FINISHED}, {self.stopped_by}"
        else:
            verdict.text = f"{NOT_FINISHED}, {limit:.0f} s" if late else f"{FAILED} with {code}"

    def read(self, verdict, stream, file):
        follow = 0
        with contextlib.suppress(ValueError):  # the file was closed: the process would not end
            for raw in stream:
                line = raw.decode(errors="replace")
                with contextlib.suppress(OSError):  # on a full disk the process still wants to be read
                    file.write(line)
                    file.flush()
                if ALARM.search(line) and len(verdict.alarms) < ALARMS:
                    verdict.alarms.append([])
                    follow = ALARM_LINES
                elif KEPT.search(line):
                    verdict.kept.append(line.strip()[:200])
                if follow:
                    follow -= 1
                    verdict.alarms[-1].append(line.rstrip()[:300])
                    self.say(f"  {label(verdict)} | {line.rstrip()[:300]}")

    def stage(self, stage):
        tasks = stage.tasks(self)
        with concurrent.futures.ThreadPoolExecutor(stage.at_once) as pool:
            verdicts = list(pool.map(lambda task: self.execute(stage.name, task), tasks))
        return not any(verdict.is_failure for verdict in verdicts)

    def leave_out(self, stage, reason):
        for task in stage.tasks(self):
            self.verdicts.append(Verdict(stage.name, task.name, f"NOT RUN: {reason}"))
        self.say(f"NOT RUN: {reason}: {stage.name}")


def label(verdict):
    return verdict.stage if verdict.task == verdict.stage else f"{verdict.stage}: {verdict.task}"


# What is packed, and where it runs


def unpack():
    """The programs, in a folder of this user's below the system's for temporary files: the pack itself stays small."""
    archive = HERE / "programs.tar.xz"
    if not archive.exists():
        sys.exit(f"run.sh: there is no {archive.name} beside it; scripts/gpu_pack.sh makes the pack")
    folder = Path(tempfile.gettempdir()) / f"gradclip-{os.getuid()}-{zlib.crc32(archive.read_bytes()):08x}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        sys.exit(f"run.sh: {folder} belongs to another user; set TMPDIR")
    if not (folder / "complete").exists():
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder)
        except tarfile.ReadError:  # a python3 that was built without lzma
            subprocess.run(["tar", "-C", folder, "-xJf", archive], check=True)
        (folder / "complete").touch()
    return folder


@dataclass
class Torch:
    version: str  # without what follows the "+"
    libraries: str  # folders for the loader
    cuda: Path


def find_torch():
    """The PyTorch of this machine's python3, or None. Importing it takes seconds, so it is only looked for."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    home = Path(next(iter(spec.submodule_search_locations)))
    version = re.search(r"__version__ = '([^'+]*)", (home / "version.py").read_text())
    folders = [home / "lib", *sorted(home.parent.glob("nvidia/*/lib"))]
    return Torch(version[1] if version else "?", ":".join(map(str, folders)), home / "lib" / "libtorch_cuda.so")


def environment(programs):
    cache = programs / "jit"
    fixed = {
        "GRADCLIP_REQUIRE_GPU": "1",
        "GRADCLIP_GOLDEN": str(HERE / "golden"),
        "GRADCLIP_COMMIT": (HERE / "COMMIT").read_text().strip(),
        "PYTHONUNBUFFERED": "1",
        "RUST_BACKTRACE": "0",
        # The driver keeps what it has compiled, wherever HOME is, read-only or unset. The default of 256 MiB would do.
        "CUDA_CACHE_DISABLE": "0",
        "CUDA_CACHE_PATH": str(cache),
        "CUDA_CACHE_MAXSIZE": str(1 << 30),
        # So that CUDA's first GPU is the one that nvidia-smi is asked about.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    return os.environ | fixed


class NvidiaSmi:
    """Asks for the GPU that CUDA counts first. One that hangs is given up, and asked nothing more."""

    LIMIT = 10  # seconds

    def __init__(self):
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.gpu = first if re.fullmatch(r"\d+|GPU-[0-9a-f-]+", first) else "0"
        self.why_not = "" if shutil.which("nvidia-smi") else "nvidia-smi is not installed"

    def ask(self, fields):
        """The answer, or in parentheses why there is none."""
        if self.why_not:
            return f"({self.why_not})"
        command = ["nvidia-smi", f"--id={self.gpu}", f"--query-gpu={fields}", "--format=csv,noheader"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            return process.communicate(timeout=self.LIMIT)[0].strip()
        except subprocess.TimeoutExpired:
            process.kill()  # and not waited for: in the driver nothing can be killed
            self.why_not = f"nvidia-smi gave no answer in {self.LIMIT} s"
            return f"({self.why_not})"

    def sample(self, record, done):
        """In a thread of its own, until `done`."""
        fields = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
        with contextlib.suppress(OSError), open(record / "clocks.csv", "w", encoding="utf-8") as file:
            file.write(fields + "\n")
            while not self.why_not:
                file.write(self.ask(fields) + "\n")
                file.flush()
                if done.wait(CLOCK_PAUSE):
                    break


def card(run):
    """No process of ours: what machine this is."""
    lines = [
        f"commit {run.environment['GRADCLIP_COMMIT']}; {(HERE / 'BUILT').read_text().strip()}",
        f"date {datetime.datetime.now(datetime.timezone.utc):%FT%TZ}; {run.seconds:.0f} s",
        f"{os.uname().sysname} {os.uname().release} {os.uname().machine}, {os.cpu_count()} cores",
        run.nvidia_smi.ask("name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"),
        f"PyTorch {run.torch.version}" if run.torch else "python3 has no PyTorch",
    ]
    (run.record / "environment.txt").write_text("\n".join(lines) + "\n")
    for line in lines:
        run.say(line)
    return []


# The stages


DID_RUN = r"\A(?![\s\S]*not run:)"  # the examples say so where there is no GPU
MEASURED = r"(?m)^ *\d+\.\d s  \S"  # the benches say how far they are after each list
TESTS_PASSED = r"test result: ok\. [1-9]"  # where a filter matches nothing, libtest says "ok. 0 passed"


def on_gpu(run, *arguments):
    return run.program("on_gpu", "--test-threads", 1, "--nocapture", *arguments)


def jit(run):
    cache = Path(run.environment["CUDA_CACHE_PATH"])
    shutil.rmtree(cache, ignore_errors=True)
    first_calls = on_gpu(run, "gpu::first_calls")
    return [
        Task("driver or a clear error", run.program("no_driver"), 20, why_not=run.is_packed("no_driver")),
        Task("compiled", first_calls, 60, proof=(TESTS_PASSED,)),
        Task("from the cache", first_calls, 30, proof=(TESTS_PASSED,)),
    ]


def smoke(run):
    return [Task("smoke", on_gpu(run, EVERY_KERNEL), 75, proof=(TESTS_PASSED,))]


def predictions(run):
    command = run.program("gpu_bench", "--predictions", "--budget", 40, "--out", run.record / "predictions.csv")
    return [Task("predictions", command, 60, why_not=run.is_packed("gpu_bench"), proof=(MEASURED,))]


EVERY_KERNEL = "suite::every_kernel"
SUITE_PARTS = (("suite::parity",), ("suite::scoped", "suite::into"))


def suite(run):
    skipped = [EVERY_KERNEL, "nccl", "gpu::first_calls", *(name for part in SUITE_PARTS for name in part)]
    rest = on_gpu(run, *(word for name in skipped for word in ("--skip", name)))
    tasks = [Task(" ".join(part), on_gpu(run, *part), 150, proof=(TESTS_PASSED,)) for part in SUITE_PARTS]
    tasks.append(Task("the rest", rest, 150, proof=(TESTS_PASSED,)))
    tasks += [Task(f"CPU {name}", run.program(name), 90) for name in (HERE / "CPU_TESTS").read_text().split()]
    return tasks


def in_torch(run, preload=False):
    """In the libraries that PyTorch brings: CUDA 13, cuBLAS, cuRAND, NCCL. libtorch decides at its first look whether
    there is CUDA, and a `backward` on the CPU is such a look: so its CUDA part is in the process from the start."""
    if run.torch is None:
        return {}
    inherited = os.environ.get("LD_LIBRARY_PATH")
    # cudarc looks for libnccl.so, and the packages have libnccl.so.2.
    links = run.scratch / "lib"
    links.mkdir(exist_ok=True)
    for folder in run.torch.libraries.split(":"):
        nccl = Path(folder) / "libnccl.so.2"
        if nccl.exists() and not (links / "libnccl.so").exists():
            (links / "libnccl.so").symlink_to(nccl)
    libraries = ":".join(filter(None, [str(links), run.torch.libraries, inherited]))
    return {"LD_LIBRARY_PATH": libraries} | ({"LD_PRELOAD": str(run.torch.cuda)} if preload else {})


def without_torch(run, name):
    return run.is_packed(name) or ("" if run.torch else "python3 has no PyTorch, whose libraries it needs")


def without_same_torch(run, name):
    built_for = (HERE / "TORCH").read_text().strip() if (HERE / "TORCH").exists() else ""
    other = run.torch and run.torch.version != built_for
    return without_torch(run, name) or (f"built for PyTorch {built_for}, here is {run.torch.version}" if other else "")


def adapters(run):
    tests = ["--test-threads", 1, "--nocapture"]
    has_nccl = any((Path(folder) / "libnccl.so.2").exists() for folder in run.torch.libraries.split(":")) if run.torch else False
    return [
        Task("candle", run.program("candle_on_gpu", *tests), 90, in_torch(run), without_torch(run, "candle_on_gpu"),
             (TESTS_PASSED,)),
        Task("tch on the GPU", run.program("tch_tests", *tests, "gpu::"), 90, in_torch(run, preload=True),
             without_same_torch(run, "tch_tests"), (TESTS_PASSED,)),
        # Those of `loading` compile a library, and need the sources.
        Task("tch", run.program("tch_tests", "--skip", "gpu::", "--skip", "loading::"), 90, in_torch(run),
             without_same_torch(run, "tch_tests"), (TESTS_PASSED,)),
        Task("NCCL", on_gpu(run, "nccl"), 60, in_torch(run), "" if has_nccl else "PyTorch brings no NCCL here",
             (TESTS_PASSED,)),
    ]


def examples(run):
    return [
        *(Task(name, run.program(name), 30, why_not=run.is_packed(name), proof=(DID_RUN,))
          for name in ("cuda_graph", "fused_adamw")),
        Task("exploding_rnn", run.program("exploding_rnn_gpu", "--gpu", "--quick", "--out", run.record / "exploding_rnn.png"), 60,
             in_torch(run), without_torch(run, "exploding_rnn_gpu")),
        Task("transformer_lm", run.program("transformer_lm_gpu", "--gpu", "--seeds", 1, "--check"), 60, in_torch(run),
             without_torch(run, "transformer_lm_gpu")),
        Task("tch_cartpole", run.program("tch_cartpole", "--gpu", "--quick"), 60, in_torch(run, preload=True),
             without_same_torch(run, "tch_cartpole")),
    ]


# Starting, and the list that is under way when the budget ends, come on top of it.
BENCH_BUDGET, BENCH_REST, FOR_SANITIZERS = 110, 25, 60


def bench(run):
    later = FOR_SANITIZERS if "sanitizers" in run.stages else 0
    budget = min(BENCH_BUDGET, run.left() - later - BENCH_REST - 2 * SHORTEST)
    why_not = run.is_packed("gpu_bench") or ("" if budget > 10 else "no time")
    measured = ["--budget", f"{budget:.0f}", "--out", str(run.record / "bench.csv")]
    if run.torch:
        command = [sys.executable, str(HERE / "torch_gpu.py"), "--bench", *run.program("gpu_bench"), *measured]
    else:
        command = run.program("gpu_bench", *measured)
    return [Task("bench", command, budget + BENCH_REST, why_not=why_not, proof=(MEASURED,))]


def sanitizers(run):
    missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    proof = (TESTS_PASSED, r"SUMMARY: 0 (errors|hazards)")
    return [Task(tool, sanitized(tool, on_gpu(run, EVERY_KERNEL)), 75, why_not=missing, proof=proof)
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck")]


def sanitized(tool, command):
    # A call of the driver that a test expects to be refused is no error of a kernel.
    return ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--print-limit", "20", "--error-exitcode", "1",
            *command]


def variants(run):
    budget = min(50, run.left() - 15 - 2 * SHORTEST)
    command = run.program("variants_bench", "--budget", f"{budget:.0f}", "--out", run.record / "variants.csv")
    why_not = run.is_packed("variants_bench") or ("" if budget > 10 else "no time")
    return [Task("variants", command, budget + 15, why_not=why_not, proof=(MEASURED,))]


def ncu(run):
    command = ["ncu", "--clock-control", "none", "-k", r"regex:norm_partials_l2|^scale$|^clamp$|^clip_coef$", "-c", "8",
               "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats",
               *run.program("gpu_bench", "--list", "1 GiB", "--dtype", "bf16", "--budget", 1, "--max-gib", 2)]
    why_not = run.is_packed("gpu_bench") or ("" if shutil.which("ncu") else "ncu is not installed")
    return [Task("ncu", command, 40, why_not=why_not, proof=("norm_partials_l2", "Memory Throughput"))]


LARGE_MIB = 136_000  # the list of 64 GiB, and what restores it


def large(run):
    """Alone: PyTorch would have no memory beside it. Its rows become part of bench.csv."""
    memory = re.match(r"\d+", run.nvidia_smi.ask("memory.total"))
    command = run.program("gpu_bench", "--max-gib", 64, "--list", "64 GiB", "--budget", 20, "--out", run.record / "large.csv")
    has_room = memory and int(memory[0]) >= LARGE_MIB
    why_not = run.is_packed("gpu_bench") or ("" if has_room else f"the GPU is not known to have {LARGE_MIB} MiB")
    return [Task("large", command, 60, why_not=why_not, proof=(MEASURED,))]


STAGES = (
    Stage("card", card),
    Stage("jit", jit),
    Stage("smoke", smoke),
    Stage("predictions", predictions),
    Stage("suite", suite, at_once=max(3, min(8, os.cpu_count() or 1))),
    Stage("adapters", adapters, at_once=4),
    Stage("examples", examples),
    Stage("bench", bench),
    Stage("sanitizers", sanitizers, at_once=4),
    Stage("variants", variants),
    Stage("ncu", ncu),
    Stage("large", large),
)


# The gate


def first_failing_test(text):
    """Of libtest's output with one thread: the first that failed, or the one that was under way at the end."""
    started = re.findall(r"^test (\S+) \.\.\. ", text, re.MULTILINE)
    results = list(re.finditer(r"^test (\S+) \.\.\.(?:(?!^test ).)*?\b(ok|FAILED|ignored)$", text, re.MULTILINE | re.DOTALL))
    failed = [result[1] for result in results if result[2] == "FAILED"]
    unfinished = [name for name in started if name not in {result[1] for result in results}]
    return next(iter(failed + unfinished), None)


def look_closer(run):
    """After a smoke that failed: where, with launches that wait, and what memcheck says of it."""
    test = first_failing_test((run.record / "smoke.txt").read_text(errors="replace"))
    if test is None:
        run.say("the smoke ended before its first test")
        return
    alone = on_gpu(run, "--exact", test)
    run.execute("smoke", Task("first failing test, blocking launches", alone, 40, {"CUDA_LAUNCH_BLOCKING": "1"}))
    missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    run.execute("smoke", Task("first failing test, memcheck", sanitized("memcheck", alone), 60, why_not=missing))


# The end


def archive_record(record, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(record, arcname=record.name)


def write_tables(run):
    measured, large_rows = run.record / "bench.csv", run.record / "large.csv"
    if large_rows.exists() and measured.exists():
        rows = large_rows.read_text().splitlines(keepends=True)
        with open(measured, "a", encoding="utf-8") as file:
            file.writelines(rows[1:] if measured.stat().st_size else rows)
    if not measured.exists() or measured.stat().st_size == 0:
        return ""
    made = subprocess.run([sys.executable, HERE / "record_to_tables.py", measured], capture_output=True, text=True, timeout=60)
    (run.record / "tables.md").write_text(made.stdout + made.stderr)
    return made.stdout


def summary(run, tables):
    """What says most first; cut to what a terminal that keeps so many characters shows."""
    failures = [verdict for verdict in run.verdicts if verdict.is_failure]
    head = [f"SUMMARY, after {time.monotonic() - run.started:.0f} s"]
    where = run.record / "environment.txt"
    head += [line[:300] for line in where.read_text().splitlines()] if where.exists() else []
    for verdict in failures + [verdict for verdict in run.verdicts if not verdict.is_failure]:
        seconds = f"{verdict.seconds:6.1f} s" if verdict.seconds else " " * 8
        head.append(f"{seconds}  {verdict.text}: {label(verdict)}")
    for turn in (0, 1):  # each failure shows one panic before any shows two
        head += [f"{label(verdict)} | {line}" for verdict in failures for alarm in verdict.alarms[turn:turn + 1] for line in alarm]
    for verdict in run.verdicts:
        head += [f"{label(verdict)}: {line}" for line in verdict.kept if "test result: ok" not in line]
    passed = sum(verdict.text == PASSED for verdict in run.verdicts)
    not_run = sum(verdict.text.startswith("NOT RUN") for verdict in run.verdicts)
    last = "ALL THAT RAN HAS PASSED" if passed else "NOTHING HAS RUN"
    last = f"{len(failures)} FAILED OR NOT FINISHED" if failures else last
    last += f": {passed} passed, {len(failures)} failed or not finished, {not_run} not run"
    room = SUMMARY_CHARACTERS - len(last) - 60
    text = "\n".join([*head, tables.strip()])
    return (text if len(text) <= room else text[:room].rsplit("\n", 1)[0] + "\n... (all of it is in the record)") + f"\n{last}\n"


def finish(run, archive):
    tables = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        tables = write_tables(run)
    with contextlib.suppress(OSError), open(run.record / "verdicts.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["stage", "process", "verdict", "seconds"])
        rows.writerows([verdict.stage, verdict.task, verdict.text, f"{verdict.seconds:.1f}"] for verdict in run.verdicts)
    text = summary(run, tables)
    with contextlib.suppress(OSError):
        (run.record / "summary.txt").write_text(text)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        archive_record(run.record, archive)
    except OSError as error:
        run.say(f"NO ARCHIVE: {error}")
    shutil.rmtree(run.scratch, ignore_errors=True)
    with contextlib.suppress(OSError):
        print(f"\n{text}", end="", flush=True)
    nothing_ran = run.verdicts and not any(verdict.text == PASSED for verdict in run.verdicts)
    return nothing_ran or any(verdict.is_failure for verdict in run.verdicts)


def chosen(args):
    names = [stage.name for stage in STAGES]
    only, skip = ([name.strip() for name in value.split(",")] if value is not None else [] for value in (args.only, args.skip))
    for name in only + skip:
        if name not in names:
            sys.exit(f"run.sh: no stage is called '{name}'; the stages are {', '.join(names)}")
    return {name for name in names if (not only or name in only or name == "card") and name not in skip}


def go(run):
    gate_closed = ""
    for stage in STAGES:
        if stage.name not in run.stages:
            continue
        if gate_closed:
            run.leave_out(stage, gate_closed)
        elif not run.stage(stage) and stage.name == "smoke":
            no_gpu = re.search("no GPU can be used: .*", (run.record / "smoke.txt").read_text(errors="replace"))
            if no_gpu:
                run.say(no_gpu[0])
            else:
                look_closer(run)
            gate_closed = "" if run.keep_going else "there is no GPU" if no_gpu else "the smoke failed"


def seconds(text):
    number = float(text)
    if not 2 * SHORTEST < number < 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above {2 * SHORTEST} and below a day")
    return number


def parse():
    parser = argparse.ArgumentParser(prog="run.sh", description="Runs a pack of scripts/gpu_pack.sh; run.py says what.")
    parser.add_argument("record", type=Path, help="folder for what is found; it is emptied first")
    parser.add_argument("--seconds", type=seconds, default=1200, help="all of it; what does not fit is not run")
    parser.add_argument("--only", metavar="STAGE,...", help="these stages: " + ", ".join(stage.name for stage in STAGES))
    parser.add_argument("--skip", metavar="STAGE,...", help="all but these")
    parser.add_argument("--archive", type=Path, help="where RECORD is packed to, instead of RECORD.tar.gz")
    parser.add_argument("--keep-going", action="store_true", help="go on after a smoke that failed")
    return parser.parse_args()


def empty(record):
    """Removes what an earlier run left there, and refuses a folder with anything else in it."""
    try:
        record.mkdir(parents=True, exist_ok=True)
        if any(record.iterdir()) and not (record / MARK).exists():
            sys.exit(f"run.sh: {record} holds files, and they are no record; name an empty folder")
        for path in record.iterdir():
            path.unlink()
        (record / MARK).write_text("This folder is emptied by each run of the GPU pack that names it.\n")
    except OSError as error:
        sys.exit(f"run.sh: {record} cannot be the folder of the record: {error.strerror}")


def main():
    if sys.version_info < (3, 9):
        sys.exit(f"run.sh: python3 is {sys.version.split()[0]}, and must be 3.9 or later")
    args = parse()
    stages = chosen(args)
    args.record = args.record.resolve()
    empty(args.record)
    run = Run(args, stages)
    done = threading.Event()
    threading.Thread(target=run.nvidia_smi.sample, args=(run.record, done), daemon=True).start()

    def stop(number, _frame):
        """What runs is ended, nothing more is started, and what there is comes back."""
        run.stopped_by = f"stopped by {signal.Signals(number).name}"
        for process in list(run.running):
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    go(run)
    done.set()
    failed = finish(run, args.archive or Path(f"{args.record}.tar.gz"))
    # os._exit: a reader of a process that hangs in the driver would be waited for.
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
