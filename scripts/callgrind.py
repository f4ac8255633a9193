#!/usr/bin/env python3
"""Counts the host's instructions in each call on device memory, with valgrind. No GPU: benches/enqueue.rs on the driver
double, with launches that do nothing.

    scripts/callgrind.py            print the tables
    scripts/callgrind.py --write    the same, and write benches/record/enqueue-instructions.csv and docs/performance.md
    scripts/callgrind.py --check    the same, and fail where the counts differ from that file by more than a tenth

What is counted is this crate with cudarc, and what they call of libc (copying, comparing, allocating). The double's own
instructions are not: a driver's would be others. Its calls are counted instead, and have to be the same exactly.

A tenth: the same sources give the same count to within a few instructions from run to run, but another release of rustc
or libc moves it by some per cent. What is worth noticing is a branch or a division more for each tensor, or a driver
call, and those are more.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from cuda_packages import ROOT, fail

RECORD = ROOT / "benches/record/enqueue-instructions.csv"
PAGE = ROOT / "docs/performance.md"
COLUMNS = ("gradients", "list", "verb", "tensors", "driver_calls", "instructions")
TOLERANCE = 0.10
DOUBLE = "libcuda.so"


def build():
    command = ["cargo", "bench", "--bench", "enqueue", "--no-run", "--message-format=json"]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "enqueue")


def instructions(dump):
    """Of one dump: those of the program itself, and of all that it calls but the double."""
    total, ours, where, callee, in_call = 0, None, None, None, False
    for line in dump.read_text().splitlines():
        if line.startswith("cmd: "):
            ours = Path(line.split()[1]).name
        elif line.startswith("ob="):
            where = Path(line[3:]).name
        elif line.startswith("fn="):
            callee = None
        elif line.startswith("cob="):
            callee = Path(line[4:]).name
        elif line.startswith("cfn=__libc_start_main"):
            callee = None  # all of the program runs in it
        elif line.startswith("calls="):
            in_call = True
        elif re.match(r"[0-9+*-]", line):
            cost = int(line.split()[1])
            if where == ours and (not in_call or callee not in (None, ours, DOUBLE)):
                total += cost
            if in_call:
                in_call, callee = False, None
    return total


def measure(binary):
    """One row for each case that the program prints; valgrind writes a dump for each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        name = "gradclip_enqueue"
        command = ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}", "--compress-strings=no",
                   "--compress-pos=no", f"--toggle-collect={name}", f"--dump-after={name}", binary]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if result.returncode != 0:
            fail(f"valgrind ended with {result.returncode}")
        cases = [line.split(",") for line in result.stdout.splitlines()]
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        counts = [instructions(dump) for dump in dumps]
        if not cases or len(counts) < len(cases) or any(counts[len(cases):]):
            fail(f"{len(cases)} cases, {len(counts)} dumps: {result.stdout}")
        return [dict(zip(COLUMNS, [*case, str(count)])) for case, count in zip(cases, counts)]


def key(row):
    return tuple(row[column] for column in COLUMNS[:4])


def differences(rows, recorded):
    recorded = {key(row): row for row in recorded}
    for row in rows:
        old = recorded.pop(key(row), None)
        if old is None:
            yield f"{', '.join(key(row))}: not in the record"
            continue
        now, then = int(row["instructions"]), int(old["instructions"])
        if abs(now - then) > TOLERANCE * then:
            yield f"{', '.join(key(row))}: {now} instructions, recorded {then} ({100 * (now / then - 1):+.0f} %)"
        if row["driver_calls"] != old["driver_calls"]:
            yield f"{', '.join(key(row))}: {row['driver_calls']} driver calls, recorded {old['driver_calls']}"
    for gone in recorded:
        yield f"{', '.join(gone)}: recorded, and not measured any more"


def table(rows):
    """By difference: what one tensor adds, and what is left for the call."""
    groups = defaultdict(dict)
    for row in rows:
        groups[row["gradients"], row["list"], row["verb"]][int(row["tensors"])] = row
    lines = ["| gradients | list | verb | up to 160 | more | a call | driver calls a tensor | a call |",
             "|---|---|---|---|---|---|---|---|"]
    for (gradients, which, verb), by_tensors in groups.items():
        slope = lambda column, a, b: (int(by_tensors[b][column]) - int(by_tensors[a][column])) / (b - a)
        short, long = slope("instructions", 80, 160), slope("instructions", 1500, 3000)
        calls = slope("driver_calls", 1500, 3000)
        once = int(by_tensors[80]["instructions"]) - 80 * short
        calls_once = int(by_tensors[3000]["driver_calls"]) - 3000 * calls
        lines.append(f"| {gradients} | {which} | `{verb}` | {short:.1f} | {long:.1f} | {once:.0f} | {calls:g} | "
                     f"{calls_once:g} |")
    return "\n".join(lines)


def write_page(text):
    page = PAGE.read_text()
    marks = r"(<!-- enqueue:begin -->\n).*?(<!-- enqueue:end -->)"
    page, found = re.subn(marks, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
    if found != 1:
        fail(f"{PAGE} has no place for the table")
    PAGE.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="write the record, and the table into docs/performance.md")
    mode.add_argument("--check", action="store_true", help="compare with the record")
    args = parser.parse_args()
    if not shutil.which("valgrind"):
        fail("valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)")
    rows = measure(build())
    print(table(rows))
    if args.write:
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_page(table(rows))
        print(f"wrote {RECORD.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    if args.check:
        if not RECORD.exists():
            fail(f"there is no {RECORD}; run scripts/callgrind.py --write")
        wrong = list(differences(rows, csv.DictReader(RECORD.open(newline=""))))
        if wrong:
            fail("the host's work differs; if that is wanted, or the compiler is another one, run "
                 "scripts/callgrind.py --write\n  " + "\n  ".join(wrong))
        print(f"{len(rows)} cases as recorded, to within {100 * TOLERANCE:.0f} %")


if __name__ == "__main__":
    main()
