#!/usr/bin/env python3
"""PyTorch and gradclip on the CPU, on the same lists, in turn: gradclip, PyTorch, gradclip again, list by list.

    benches/torch_cpu.py --bench BINARY --budget 330 --out record.csv

BINARY is that of `cargo bench --bench cpu`. It stays open and measures when it is asked to (`--serve`). Both have the
same number of threads and the same elements. PyTorch is called as its users call it, and with `foreach=False`; of the
two the quicker is what gradclip has to be held against.

Before a list is timed, its norm is compared with that of gradclip's list, in float64; PyTorch's norm with it, within
the bound of PyTorch's arithmetic (`tolerance`); and what it makes of the first 2^20 elements of each gradient.
"""

import argparse
import csv
import gc
import json
import math
import subprocess
import sys
import time

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MIN_ROUNDS, MAX_ROUNDS = 5, 200
FEWEST_ROUNDS = 3  # of what takes long
LANES = 8  # partial sums of PyTorch's norm, at least
LARGE_EVERY, PERIOD = 64, 1 << 20  # as in benches/support/cases.rs, with `pattern`


def pattern():
    """What every gradient holds, over and over, in float64: `element` in benches/support/cases.rs, to the bit."""
    index = torch.arange(PERIOD, dtype=torch.int64)
    state = index ^ (0x9E3779B97F4A7C15 - (1 << 64))
    total = torch.zeros(PERIOD, dtype=torch.float64)
    for _ in range(2):
        state = state * 0x5851F42D4C957F2D + 0x14057B7EF767814F
        total += (state >> 40 & 0xFFFFFF).double() / (1 << 23) - 1
    large = index % LARGE_EVERY == LARGE_EVERY // 2
    return torch.where(large, total.sign(), total / 200)


class Torch:
    def __init__(self):
        self.pattern = pattern()

    def load(self, entry):
        dtype = DTYPES[entry["dtype"]]
        self.period = self.pattern.to(dtype)
        self.smallest = 2**-24 if dtype == torch.float16 else 0.0  # its unit below 2^-14
        self.grads = [torch.empty(numel, dtype=dtype) for numel in entry["numels"]]
        self.fill()
        self.params = []
        for grad in self.grads:
            param = torch.nn.Parameter(grad, requires_grad=True)
            param.grad = grad
            self.params.append(param)

    def fill(self):
        for grad in self.grads:
            for part in grad.split(PERIOD):
                part.copy_(self.period[:len(part)])

    def exact_norm(self):
        squares = torch.cat([torch.zeros(1), self.period.double().square()]).cumsum(0)
        sums = [len(grad) // PERIOD * squares[PERIOD] + squares[len(grad) % PERIOD] for grad in self.grads]
        return math.sqrt(math.fsum(sums))

    def differ(self, expected, tolerance):
        """Whether an element is not what `expected` makes of it, by more than that share of it."""
        expected = expected(self.period.double())
        limit = tolerance * expected.abs() + self.smallest
        off = lambda grad: (grad[:PERIOD] - expected[:len(grad)]).abs() > limit[:len(grad)]
        return any(bool(off(grad).any()) for grad in self.grads)

    def tolerance(self):
        """Of PyTorch's norm: an addition in float32 is off by at most 2^-24 of the sum so far, and every square goes
        through as many as come after it; then each tensor's norm, and the norm of those, is rounded to the type."""
        dtype = self.grads[0].dtype
        addition = 2**-53 if dtype == torch.float64 else 2**-24
        longest = max(grad.numel() for grad in self.grads)
        return (longest / LANES + len(self.grads)) * addition / 2 + 4 * torch.finfo(dtype).eps

    def check(self, norm):
        """Why PyTorch's answers are not those that were expected, or None."""
        dtype = self.grads[0].dtype
        # Of bf16 and f16 PyTorch rounds by way of f32, which once in 2^16 elements is the other neighbour.
        same = 1e-9 if dtype in (torch.float32, torch.float64) else 2**-24
        near = lambda a, b, tolerance: abs(a / b - 1) <= tolerance
        exact, tolerance = self.exact_norm(), self.tolerance()
        if not near(exact, norm, same):
            return f"its elements have the norm {exact}, gradclip's {norm}"
        for foreach in (None, False):
            theirs = get_total_norm(self.grads, 2.0, foreach=foreach).item()
            if not near(theirs, norm, tolerance):
                return f"its norm is {theirs}, gradclip's {norm}"
        print(f"        PyTorch's norm is off by {abs(theirs / norm - 1):.1e}", file=sys.stderr)
        clip_grad_norm_(self.params, norm / 2)
        # The coefficient is off as the norm is, by eps = 1e-6, and by rounding; then the product is rounded.
        if self.differ(lambda x: x / 2, 1.1 * tolerance + 2e-6 / norm + 2 * torch.finfo(dtype).eps):
            return "it clips by norm to something else"
        self.fill()
        clip_grad_value_(self.params, 0.5)
        if self.differ(lambda x: x.clamp(-0.5, 0.5), 0):
            return "it clips by value to something else"
        self.fill()
        return None

    def cases(self, norm):
        """(op, passes over the gradients, implementation, call)

        The work is the same whatever the threshold is and whatever is outside, so that nothing is restored.
        """
        for foreach, name in ((None, "torch"), (False, "torch foreach=False")):
            how = {"foreach": foreach}
            yield "norm", 1, name, lambda how=how: get_total_norm(self.grads, 2.0, **how)
            yield "clip; within", 1, name, lambda how=how: clip_grad_norm_(self.params, 2 * norm, **how)
            yield "clip", 3, name, lambda how=how: clip_grad_norm_(self.params, 0.9999 * norm, **how)
            yield "value; 0 % outside", 1, name, lambda how=how: clip_grad_value_(self.params, 2.0, **how)
            yield "value; 2 % outside", 2, name, lambda how=how: clip_grad_value_(self.params, 0.5, **how)

    def rows(self, norm, seconds):
        """One dict for each case. As with gradclip, the implementations of one operation come once a round."""
        cases = sorted(self.cases(norm), key=lambda case: case[0])
        moved = sum(grad.numel() * grad.element_size() for grad in self.grads)
        ops = list(dict.fromkeys(case[0] for case in cases))
        for op in ops:
            of_op = [case for case in cases if case[0] == op]
            times = [[] for _ in of_op]
            started = time.perf_counter()
            for number in range(MAX_ROUNDS):
                took = time.perf_counter() - started
                if number >= (MIN_ROUNDS if took < 2 * seconds else FEWEST_ROUNDS) and took >= seconds / len(ops):
                    break
                for column, (_, _, _, call) in zip(times, of_op):
                    start = time.perf_counter()
                    call()
                    column.append(time.perf_counter() - start)
            for column, (_, passes, name, _) in zip(times, of_op):
                median = quantile(column, 0.5)
                yield {
                    "op": op, "implementation": name, "rounds": len(column), "median_us": f"{median * 1e6:.3f}",
                    "p10_us": f"{quantile(column, 0.1) * 1e6:.3f}", "p90_us": f"{quantile(column, 0.9) * 1e6:.3f}",
                    "GB/s": f"{passes * moved / median / 1e9:.2f}", "checked": "norm",
                }

    def unload(self):
        self.grads = self.params = None
        gc.collect()


def quantile(values, at):
    return sorted(values)[round((len(values) - 1) * at)]


class Gradclip:
    """The bench's binary, which measures what it is asked to."""

    def __init__(self, binary):
        self.process = subprocess.Popen([binary, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.line() != "ready":
            sys.exit(f"{binary} is not the bench of the CPU")

    def line(self):
        return self.process.stdout.readline().strip() or sys.exit("the bench of gradclip has ended")

    def measure(self, number, seconds, index):
        """The norm of the list, and its rows."""
        self.process.stdin.write(f"{number} {seconds:.3f} {index}\n")
        self.process.stdin.flush()
        norm = float(self.line().removeprefix("norm "))
        return norm, list(iter(self.line, "done"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True, help="the binary of `cargo bench --bench cpu`")
    parser.add_argument("--budget", type=float, default=330, help="seconds for everything")
    parser.add_argument("--out", required=True, help="file for the rows")
    parser.add_argument("--list", default="", help="only lists whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, help="only this type")
    args = parser.parse_args()

    started = time.perf_counter()
    export = json.loads(subprocess.run([args.bench, "--export-lists"], check=True, capture_output=True).stdout)
    header = export["header"].split(",")
    lists = [(i, entry) for i, entry in enumerate(export["lists"])
             if args.list in entry["list"] and args.dtype in (None, entry["dtype"])]
    torch.set_num_threads(export["threads"])
    torch.set_grad_enabled(False)
    gc.disable()
    theirs, failed = Torch(), False
    # Before the file is there, which may change what git says of the commit.
    ours = Gradclip(args.bench)
    print(f"PyTorch {torch.__version__}, {export['threads']} threads each", file=sys.stderr)
    with open(args.out, "w", newline="") as out:
        out.write(export["header"] + "\n")
        writer = csv.DictWriter(out, header, restval="", lineterminator="\n")
        for done, (index, entry) in enumerate(lists):
            name = f"{entry['list']} {entry['dtype']}"
            left = args.budget - (time.perf_counter() - started)
            if left <= 0:
                print(f"SKIPPED {name}: the time is over", file=sys.stderr)
                continue
            # Three turns, the last one half as long. As much again goes to what is not counted.
            seconds = min(left / (len(lists) - done) / 2.5 / 2, 3)
            norm, rows = ours.measure(1, seconds, index)
            theirs.load(entry)
            problem = theirs.check(norm)
            if problem is not None:
                print(f"FAILED {name}: {problem}", file=sys.stderr)
                failed = True
                continue
            run = dict(zip(header, next(csv.reader(rows[:1]))))
            run = {column: run[column] for column in header[:header.index("op")]}
            run["command"] = f"{run['command']} (PyTorch {torch.__version__})"
            torchs = list(theirs.rows(norm, seconds))
            theirs.unload()
            rows += ours.measure(2, seconds / 2, index)[1]
            out.writelines(row + "\n" for row in rows)
            writer.writerows(run | row for row in torchs)
            out.flush()
            print(f"{time.perf_counter() - started:6.1f} s  {name}", file=sys.stderr)
    ours.process.stdin.close()
    ours.process.wait()
    sys.exit(failed)


if __name__ == "__main__":
    main()
