#!/usr/bin/env python3
"""Tables of a record of benches/torch_gpu.py: the bars that the crate sets itself, and the lists.

    scripts/record_to_tables.py RECORD.csv

To have them in the pages, commit the record to benches/record and run scripts/figures.py.

Each list was measured before PyTorch and after it; the slower of the two is what counts here.
"""

import argparse
import csv
import sys
from pathlib import Path

LARGE = 1 << 30
LARGE_LISTS = ("1 GiB", "4 GiB", "16 GiB")  # and what else is as large
SHORT_LISTS = ("3000 x 4 Ki", "GPT-2", "Qwen3-30B-A3B 1/32")
SMALL_LISTS = ("1 MiB", "1 MiB in 160")
# A tensor of more elements than PyTorch takes; more than half of the memory. No bar compares them with PyTorch.
WITHOUT_TORCH = ("2^31 + 1 elements", "64 GiB")
FEW_TENSORS = 8
USUAL = ("f32", "bf16")
VALUE = ("value; 0 % outside", "value; 1 % outside", "value; 100 % outside")


class Record:
    """Of a GPU, or of a CPU: that has neither modes nor caches."""

    def __init__(self, rows):
        self.run = rows[0]
        self.lists = list(dict.fromkeys((row["list"], row["dtype"]) for row in rows))
        self.size = {(row["list"], row["dtype"]): int(row.get("bytes") or 0) for row in rows}
        self.tensors = {(row["list"], row["dtype"]): int(row.get("tensors") or 1) for row in rows}
        self.rows = {}
        for row in rows:
            names = ("list", "dtype", "op", "implementation", "mode", "cache")
            usual = {"mode": "eager", "cache": "warm"}
            self.rows.setdefault(tuple(row.get(name, usual.get(name)) for name in names), []).append(row)

    def worst(self, key, op, implementation, column="median_us", mode="eager", cache="warm", worst=max):
        """The value of that column, of two passes the worse one; None where there is none."""
        rows = self.rows.get((*key, op, implementation, mode, cache), [])
        found = [float(row[column]) for row in rows if row.get(column)]
        return worst(found) if found else None

    def ours(self, key, op, column="median_us", **how):
        return self.worst(key, op, "gradclip", column, **how)

    def torch(self, key, op, column="median_us", **how):
        """Of its ways to do it, the quickest."""
        found = [self.worst(key, op, way, column, worst=min, **how) for way in ("torch", "torch foreach=False")]
        return min((time for time in found if time is not None), default=None)

    def ratio(self, key, op):
        return self.worst(key, op, "gradclip", "ratio", worst=min)


def quotient(a, b):
    return a / b if a is not None and b else None


def bars(record):
    """(what, list and type, the bar, what was measured, whether it is met; None where it was not measured)"""
    named = lambda names: [(name, dtype) for name in names for dtype in USUAL]
    of_size = lambda bytes: [key for key in record.lists if record.size[key] >= bytes and key[1] in USUAL]
    # What was not measured of those that have to be is shown too.
    large = list(dict.fromkeys(named(LARGE_LISTS) + of_size(LARGE)))
    from_half = list(dict.fromkeys(named(LARGE_LISTS) + of_size(LARGE // 2)))
    beside_torch = lambda keys: [key for key in keys if key[0] not in WITHOUT_TORCH]
    for key in large:
        yield at_least("norm only, of the plain read", key, 0.97, record.ratio(key, "norm"), "share")
    for key in list(dict.fromkeys(from_half + of_size(LARGE // 16))):
        share = quotient(record.ours(key, "clip; within"), record.ours(key, "norm"))
        yield at_most("clip by norm, not clipped, to norm only", key, 1.03 if key in from_half else 1.10, share)
    for key in beside_torch(from_half):
        faster = quotient(record.torch(key, "clip; within"), record.ours(key, "clip; within"))
        yield at_least("clip by norm, not clipped, faster than torch", key, 2.7, faster)
    for key in large:
        yield at_most("clip by norm, clipped, to read + copy", key, 1.05, quotient(1, record.ratio(key, "clip")))
    for key in beside_torch(large):
        faster = quotient(record.torch(key, "clip"), record.ours(key, "clip"))
        # Both move three times the bytes of one large f32 tensor, or of a few.
        one = key[1] == "f32" and record.tensors.get(key, 1) <= FEW_TENSORS
        yield at_least("clip by norm, clipped, faster than torch", key, 1.1 if one else 1.2, faster)
    for key in large:
        yield at_least("clip by value, all outside, of the copy", key, 0.97, record.ratio(key, VALUE[2]), "share")
        yield at_least("clip by value, nothing outside, of the plain read", key, 0.97, record.ratio(key, VALUE[0]), "share")
    for key in beside_torch(large):
        faster = [quotient(record.torch(key, op), record.ours(key, op)) for op in VALUE]
        yield at_least("clip by value, faster than torch", key, 1.9, min(faster) if None not in faster else None)
    for key in named(SHORT_LISTS):
        for op in ("clip; within", "clip"):
            faster = quotient(record.torch(key, op, "done_us"), record.ours(key, op, "done_us"))
            yield at_least(f"call to done, {op}, faster than torch", key, 10, faster)
    for key in named(SMALL_LISTS):
        yield at_most("clip by norm, clipped, on a stream", key, 6.5, record.ours(key, "clip"), "us")
        yield at_most("clip by norm, clipped, in a graph", key, 4.5, record.ours(key, "clip", mode="graph"), "us")


def at_least(what, key, bar, measured, kind="times"):
    text = (lambda x: f"{100 * x:.1f} %") if kind == "share" else (lambda x: f"{x:.2f} x")
    return what, key, ">= " + text(bar), text(measured) if measured is not None else None, verdict(measured, bar, 1)


def at_most(what, key, bar, measured, kind="times"):
    text = (lambda x: f"{x:.2f} us") if kind == "us" else (lambda x: f"{x:.3f} x")
    return what, key, "<= " + text(bar), text(measured) if measured is not None else None, verdict(measured, bar, -1)


def verdict(measured, bar, sign):
    return None if measured is None else measured * sign >= bar * sign


def header(record):
    run = record.run
    return f"{run['gpu']}, driver {run['driver']}, commit {run['commit']}, {run['date']}; eager, warm cache.\n"


def bars_table(record):
    lines = [header(record), "| what | list | bar | measured | met |", "|---|---|---|---|---|"]
    for what, (name, dtype), bar, measured, met in bars(record):
        answer = {True: "yes", False: "**no**", None: "not measured"}[met]
        lines.append(f"| {what} | {name}, {dtype} | {bar} | {measured or ''} | {answer} |")
    return "\n".join(lines)


def lists_table(record):
    lines = [header(record), "Microseconds on the GPU; in brackets the share of the limit, then from call to done.\n",
             "| list | type | norm | torch | not clipped | torch | clipped | torch | by value, 1 % | torch |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for key in record.lists:
        cells = [*key]
        for op in ("norm", "clip; within", "clip", VALUE[1]):
            time, ratio, done = record.ours(key, op), record.ratio(key, op), record.ours(key, op, "done_us")
            cells.append("" if time is None else f"{time:.1f}"
                         + (f" ({100 * ratio:.0f} %)" if ratio is not None else "")
                         + (f", {done:.0f}" if done is not None else ""))
            theirs, done = record.torch(key, op), record.torch(key, op, "done_us")
            cells.append("" if theirs is None else f"{theirs:.1f}" + (f", {done:.0f}" if done is not None else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file)) or sys.exit(f"{path} holds no rows")


def read(path):
    return Record(rows_of(path))


def found(rows):
    """Of a record of benches/variants.rs, for each change by its key: what came of its variants. A ratio is the variant's
    time over the library's."""
    variants = {}
    for row in rows:
        variants.setdefault(row["change"], {}).setdefault(row["variant"], []).append(row)
    return {key: "; ".join(f"{name}: {of_variant(own)}" for name, own in named.items())
            for key, named in variants.items()}


def of_variant(rows):
    where = lambda row: f"{float(row['ratio']):.3f} ({row['list']} {row['dtype']}, {row['op']}, {row['mode']}, {row['cache']})"
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("wins", "loses")}
    timed = sorted((row for row in rows if row["ratio"]), key=lambda row: float(row["ratio"]))
    if not timed:
        return "no time"
    return (f"wins {counts['wins']} and loses {counts['loses']} of {len(timed)}, from {where(timed[0])} "
            f"to {where(timed[-1])}".replace(";", ","))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    record = read(parser.parse_args().record)
    print(f"{bars_table(record)}\n\n{lists_table(record)}")


if __name__ == "__main__":
    main()
