#!/usr/bin/env python3
"""PyTorch and gradclip on the same lists, in turn: gradclip, PyTorch, gradclip again, list by list.

    benches/torch_gpu.py --bench BINARY --budget 240 --out record.csv

BINARY is that of `cargo bench --bench gpu`. It stays open and measures when it is asked to (`--serve`), so that both
meet the same clocks. The lists that a bar names come first. Rows are written as they are made. A list that fails is named,
and the others are measured; where gradclip's side has lost the GPU, or ended, it stops there. Exits with 1 after either. Columns and method are those of benches/measure: time between two events on the GPU with work
before the first, the call by the clock on an idle stream, rounds in which every case comes once.

What users of candle and of tch have, one tensor after the other, cannot be measured itself on a machine without Rust's
CUDA builds of them; the rows `torch: tch's sequence` and `torch: candle's sequence` are the same operations in the same
order with the same waits, by PyTorch, from Python. Its kernels are the ones tch calls; candle's own are others. As these
take milliseconds, they are measured eager, warm, and on lists of up to 3000 tensors; and as no bar asks for them, after all
lists that one names.

`--device cpu` runs PyTorch's side on the CPU, by the clock: it tries out this script, and measures nothing.
"""

import argparse
import csv
import gc
import json
import subprocess
import sys
import time

STARTED = time.perf_counter()  # before PyTorch is imported, which takes seconds of the budget

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MIN_ROUNDS, MAX_ROUNDS = 5, 100
FEWEST_ROUNDS = 3  # of what takes long: 18,867 tensors
BATCH_US, MAX_CALLS = 300, 100  # Options in benches/measure/mod.rs
COLD_BYTES = 512 << 20
MOST_IN_SEQUENCE = 3000  # tensors, where each is some launches and maybe a wait
MOST_SECONDS = 3  # of one list


class ClockEvent:
    """An event of a device that has none."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Torch:
    def __init__(self, device, header, max_bytes, align, sigma, bounds):
        self.device, self.header, self.align, self.sigma, self.bounds = device, header, align, sigma, bounds
        self.cuda = device == "cuda"
        self.grads = torch.zeros(max_bytes, dtype=torch.uint8, device=device)
        self.spare = torch.zeros(max_bytes, dtype=torch.uint8, device=device)
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 1 << 20
        self.flush_buffer = torch.zeros(cache * 5 // 2 // 8, dtype=torch.int64, device=device)
        self.filled = None

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def event(self):
        return torch.cuda.Event(enable_timing=True) if self.cuda else ClockEvent()

    def load(self, entry):
        """The list as views of one buffer."""
        dtype = DTYPES[entry["dtype"]]
        size, (starts, self.span) = dtype.itemsize, layout(entry, self.align)
        self.bytes = sum(entry["numels"]) * size
        typed = self.grads[:self.span].view(dtype)
        spare = self.spare[:self.span].view(dtype)
        if self.filled is None or self.filled[0] != dtype or self.filled[1] < self.span:
            generator = torch.Generator(device=self.device).manual_seed(1)
            drawn = torch.randn(min(1 << 20, len(spare)), generator=generator, device=self.device) * self.sigma
            for at in range(0, len(spare), len(drawn)):
                part = spare[at:at + len(drawn)]
                part.copy_(drawn[:len(part)])
            self.filled = (dtype, self.span)
        self.restore()
        views = [typed[s // size:s // size + n] for s, n in zip(starts, entry["numels"])]
        self.params = []
        for view in views:
            param = torch.nn.Parameter(view, requires_grad=True)
            param.grad = view
            self.params.append(param)
        self.views, self.flat = views, self.grads[:self.bytes].view(dtype)

    def restore(self):
        self.grads[:self.span].copy_(self.spare[:self.span])

    def flush(self):
        self.flush_buffer.zero_()
        self.flush_buffer.sum()

    def norm(self):
        return self.sigma * self.flat.numel()**0.5  # next to exactly

    def cases(self):
        """(op, implementation, mode, call, whether the gradients have to be restored before)"""
        norm = self.norm()
        calls = [
            ("limit", "torch copy", lambda: self.grads[:self.bytes].copy_(self.spare[:self.bytes]), False),
            ("norm", "torch", lambda: get_total_norm(self.views, 2.0, foreach=True), False),
            ("norm", "torch on one flat buffer", lambda: torch.linalg.vector_norm(self.flat), False),
            ("clip; within", "torch", lambda: clip_grad_norm_(self.params, norm * 1e3, foreach=True), False),
            # Its work is the same whatever the threshold is; this one leaves next to everything as it was.
            ("clip", "torch", lambda: clip_grad_norm_(self.params, norm * 0.99999, foreach=True), False),
        ]
        for op, bound in self.bounds.items():
            if op.startswith("value"):
                call = lambda bound=bound: clip_grad_value_(self.params, bound, foreach=True)
                calls.append((op, "torch", call, not op.startswith("value; 0")))
        cases = [(op, implementation, "eager", call, restored) for op, implementation, call, restored in calls]
        if self.cuda:
            for op, implementation, call, restored in calls:
                if implementation == "torch":
                    graph = self.capture(op, call)
                    if graph is not None:
                        cases.append((op, implementation, "graph", graph.replay, restored))
        self.restore()
        return cases

    def sequences(self):
        """What nn::Optimizer of tch 0.24 to 0.26 does, and what candle's users write (benches/support/cases.rs)."""
        norm = self.norm()

        def tch_norm(max_norm):
            total = torch.stack([view.norm() for view in self.views]).norm().item()  # waits
            if max_norm / (total + 1e-6) < 1.0:
                for view in self.views:
                    view.mul_(max_norm / (total + 1e-6))

        def tch_value(bound):
            for view in self.views:
                view.clamp_(-bound, bound)

        def candle_norm():
            # One wait for each tensor.
            return sum(view.square().sum().double().item() for view in self.views)**0.5

        def candle_clip(max_norm):
            total = candle_norm()
            if max_norm < total:
                for view in self.views:
                    view * (max_norm / total)  # a new tensor each, which replaces the gradient in the store

        def candle_value(bound):
            for view in self.views:
                view.clamp(-bound, bound)

        tch, candle = "torch: tch's sequence", "torch: candle's sequence"
        # tch's clip scales the gradients where they are, so it is restored, or the next one would find them within.
        calls = [("clip; within", tch, lambda: tch_norm(norm * 2), False), ("clip", tch, lambda: tch_norm(norm / 2), True),
                 ("norm", candle, candle_norm, False), ("clip", candle, lambda: candle_clip(norm / 2), False)]
        for op, bound in self.bounds.items():
            if op.startswith("value"):
                changes = not op.startswith("value; 0")
                calls += [(op, tch, lambda bound=bound: tch_value(bound), changes),
                          (op, candle, lambda bound=bound: candle_value(bound), False)]
        return [(op, implementation, "eager", call, restored) for op, implementation, call, restored in calls]

    def capture(self, op, call):
        """The call as a graph. None where PyTorch cannot capture it."""
        try:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            return graph
        except RuntimeError as error:
            print(f"SKIPPED torch {op} as a graph: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            return None

    def enqueue(self, case, cache, calls, pair):
        _, _, _, call, restored = case
        if restored:
            self.restore()
        if cache == "cold":
            self.flush()
        elif not restored:
            call()
        pair[0].record()
        for _ in range(calls):
            call()
        pair[1].record()

    def by_the_clock(self, case):
        _, _, _, call, restored = case
        if restored:
            self.restore()
        self.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.synchronize()
        return host * 1e6, (time.perf_counter() - start) * 1e6

    def measure(self, cases, cache, seconds):
        started = time.perf_counter()
        pairs = [(self.event(), self.event()) for _ in cases]
        calls = [1] * len(cases)
        times = [([], [], []) for _ in cases]
        for i, (case, pair) in enumerate(zip(cases, pairs)):
            self.enqueue(case, cache, 1, pair)
            self.synchronize()
            took = pair[0].elapsed_time(pair[1]) * 1e3
            if cache == "warm" and not case[4] and took > 0:
                calls[i] = int(min(max(BATCH_US / took, 1), MAX_CALLS))
        for number in range(MAX_ROUNDS):
            took = time.perf_counter() - started
            if (number >= MIN_ROUNDS and took >= seconds) or (number >= FEWEST_ROUNDS and took >= 2 * seconds):
                break
            for i, (case, pair) in enumerate(zip(cases, pairs)):
                self.enqueue(case, cache, calls[i], pair)
            self.synchronize()
            for i, pair in enumerate(pairs):
                times[i][0].append(pair[0].elapsed_time(pair[1]) * 1e3 / calls[i])
            if cache == "warm":
                for i, case in enumerate(cases):
                    for column, took in zip(times[i][1:], self.by_the_clock(case)):
                        column.append(took)
        return calls, times

    def rows(self, entry, run, seconds, sequences):
        """One dict for each case: of the sequences, or of all others."""
        passes = {"limit": 2, "norm": 1, "clip; within": 1, "clip": 3, "value; 0 % outside": 1}
        cases = self.sequences() if sequences else self.cases()
        caches = ["warm", "cold"] if self.span <= COLD_BYTES and not sequences else ["warm"]
        for cache in caches:
            calls, times = self.measure(cases, cache, seconds / len(caches))
            for case, count, (gpu, host, done) in zip(cases, calls, times):
                median = quantile(gpu, 0.5)
                row = dict.fromkeys(self.header, "")
                row.update(run)
                row.update({
                    "pass": 1, "list": entry["list"], "tensors": len(entry["numels"]), "bytes": self.bytes,
                    "dtype": entry["dtype"], "op": case[0], "implementation": case[1], "mode": case[2],
                    "cache": cache, "rounds": len(gpu), "calls": count, "median_us": f"{median:.3f}",
                    "p10_us": f"{quantile(gpu, 0.1):.3f}", "p90_us": f"{quantile(gpu, 0.9):.3f}",
                    "GB/s": f"{passes.get(case[0], 2) * self.bytes / median / 1e3:.1f}" if median else "",
                    "host_us": f"{quantile(host, 0.5):.2f}" if host else "",
                    "done_us": f"{quantile(done, 0.5):.2f}" if done else "", "checked": "no",
                })
                yield row

    def unload(self):
        self.params = self.views = self.flat = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def layout(entry, align):
    """Where each gradient starts, and where the last one ends, in bytes: as in benches/measure/lists.rs."""
    size, starts, end = DTYPES[entry["dtype"]].itemsize, [], 0
    for numel in entry["numels"]:
        starts.append(end + entry["offset"] * size)
        end = -(-(starts[-1] + numel * size) // align) * align
    return starts, end


def quantile(values, at):
    return sorted(values)[round((len(values) - 1) * at)]


class Stopped(Exception):
    """gradclip's side measures nothing more."""


class Gradclip:
    """The bench's binary, which measures what it is asked to."""

    def __init__(self, binary, max_gib):
        self.process = subprocess.Popen([binary, "--serve", "--max-gib", str(max_gib)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        first = self.process.stdout.readline().strip()
        if first != "ready":
            sys.exit(first or f"{binary} ended without a word")

    def measure(self, number, seconds, index, name, write):
        """Each row to `write` as it comes. False where the list failed."""
        try:
            self.process.stdin.write(f"{number} {seconds:.3f} {index}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Stopped(f"the bench of gradclip has ended before {name}") from None
        while line := self.process.stdout.readline().strip():
            if line == "done":
                return True
            if line.startswith("failed "):
                print(f"FAILED {name}: {line.removeprefix('failed ')}", file=sys.stderr)
                return False
            if line.startswith("stopped "):
                raise Stopped(line)
            write(line)
        raise Stopped(f"the bench of gradclip has ended while it measured {name}")

    def close(self):
        self.process.stdin.close()
        return self.process.wait()


def jobs_of(lists, weighted):
    """(index, list, whether it is the sequences that are measured): what a bar names, then its sequences, then the rest."""
    with_sequences = lambda entry: len(entry["numels"]) <= MOST_IN_SEQUENCE
    parts = [[job for job in lists if job[0] < weighted], [job for job in lists if job[0] >= weighted]]
    for part in parts:
        yield from ((index, entry, False) for index, entry in part)
        yield from ((index, entry, True) for index, entry in part if with_sequences(entry))


class Run:
    """Both sides, list by list, in the time that there is."""

    def __init__(self, args, export, ours, theirs, out):
        self.args, self.export, self.ours, self.theirs, self.out = args, export, ours, theirs, out
        self.failed, self.run = False, None
        print(export["header"], file=self.out, flush=True)
        self.writer = csv.DictWriter(out, export["header"].split(","), lineterminator="\n")

    def all(self, lists):
        jobs = list(jobs_of(lists, self.export["weighted"]))
        for done, (index, entry, sequences) in enumerate(jobs):
            name = f"{entry['list']} {entry['dtype']}" + (", sequences" if sequences else "")
            left = self.args.budget - (time.perf_counter() - STARTED)
            # Half a slice for the second pass; a third goes to what is not counted.
            named = lambda i, sequences: i < self.export["weighted"] and not sequences
            weights = [self.export["weight"] if named(i, late) else 1 for i, _, late in jobs[done:]]
            seconds = min(left * weights[0] / sum(weights) / 2.5 * 0.66, MOST_SECONDS)
            why = self.why_not(entry, sequences, left)
            if why:
                print(f"SKIPPED {name}: {why}", file=sys.stderr)
                continue
            if sequences:
                self.torch(entry, name, seconds, True)
            else:
                self.list(index, entry, name, seconds)
            print(f"{time.perf_counter() - STARTED:6.1f} s  {name}", file=sys.stderr)

    def why_not(self, entry, sequences, left):
        if left <= 0:
            return "the time is over"
        if layout(entry, self.export["align"])[1] > int(self.args.max_gib * (1 << 30)):
            return f"it does not fit into {self.args.max_gib:g} GiB"
        if sequences and (self.theirs is None or self.run is None):
            return "there is nothing to compare it with"
        return None

    def list(self, index, entry, name, seconds):
        if not self.ours.measure(1, seconds, index, name, self.row):
            self.failed = True
            return
        if max(entry["numels"]) > self.export["most_elements"]:
            print(f"SKIPPED {name} with torch: it takes no more than {self.export['most_elements']} elements", file=sys.stderr)
        elif self.theirs is not None:
            self.torch(entry, name, seconds, False)
            self.failed |= not self.ours.measure(2, seconds / 2, index, name, self.row)

    def row(self, line):
        self.out.write(line + "\n")
        self.out.flush()
        fields = next(csv.reader([line]))
        self.run = dict(zip(("gpu", "driver", "date", "commit"), fields))

    def torch(self, entry, name, seconds, sequences):
        try:
            self.theirs.load(entry)
            for row in self.theirs.rows(entry, self.run, seconds, sequences):
                self.writer.writerow(row)
                self.out.flush()
            self.theirs.unload()
        except RuntimeError as error:  # as all errors of CUDA's are here, and too little memory
            self.failed = True
            print(f"FAILED {name} with torch: {str(error).splitlines()[0]}", file=sys.stderr)
            try:
                self.theirs.unload()
                self.theirs.synchronize()
            except RuntimeError:
                self.theirs = None
                print("PyTorch has lost the GPU: gradclip alone from here on", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the binary of `cargo bench --bench gpu`")
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything, the start of PyTorch included")
    parser.add_argument("--out", required=True, help="file for the rows")
    parser.add_argument("--max-gib", type=float, default=16, help="of gradients; each side allocates it twice")
    parser.add_argument("--list", default="", help="only lists whose name contains this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()

    export = json.loads(subprocess.run([args.bench, "--export-lists"], check=True, capture_output=True).stdout)
    lists = [(i, entry) for i, entry in enumerate(export["lists"]) if args.list in entry["list"]]
    ours = Gradclip(args.bench, args.max_gib)
    max_bytes = int(args.max_gib * (1 << 30)) // export["align"] * export["align"]
    print(f"PyTorch {torch.__version__}", file=sys.stderr)
    try:
        theirs = Torch(args.device, export["header"].split(","), max_bytes, export["align"], export["sigma"],
                       dict(export["bounds"]))
    except RuntimeError as error:
        theirs = None
        print(f"FAILED to start PyTorch, gradclip alone: {str(error).splitlines()[0]}", file=sys.stderr)
    gc.disable()
    torch.set_grad_enabled(False)
    with open(args.out, "w", newline="") as out:
        run = Run(args, export, ours, theirs, out)
        run.failed = theirs is None
        try:
            run.all(lists)
        except Stopped as why:
            run.failed = True
            print(f"STOPPED: {why}", file=sys.stderr)
    code = ours.close()
    sys.exit(run.failed or code != 0)


if __name__ == "__main__":
    main()
