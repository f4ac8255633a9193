#!/usr/bin/env python3
"""Plain clipping on the CPU at two commits, turn by turn on the same machine.

    scripts/before_after.py --out benches/record/before-after-DATE.csv [--before 7b33cd3] [--turns 60]

7b33cd3 had clipping by global norm and by value, and nothing else: no other norm, scope, loss scale, telemetry, output or
rank. benches/before_after/program.rs is built against each commit, so both run the same loops over the same data. In each turn
both measure all cases, in an order that changes from turn to turn; what counts is the ratio of the two in a turn.
Two minutes. Nothing else should run.
"""

import argparse
import csv
import datetime
import subprocess
import sys
from pathlib import Path

from cuda_packages import ROOT, target_dir

FOLDER = target_dir() / "before-after"
MANIFEST = """[package]
name = "before_after"
version = "0.0.0"
edition = "2021"

[[bin]]
name = "before_after"
path = "{source}"

[dependencies]
gradclip = {{ path = "{crate}", default-features = false }}
half = "2"

[workspace]
"""


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def build(name, crate):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    source = ROOT / "benches" / "before_after" / "program.rs"
    (folder / "Cargo.toml").write_text(MANIFEST.format(source=source, crate=crate))
    subprocess.run(["cargo", "build", "--quiet", "--release", "--target-dir", FOLDER / "build"], cwd=folder, check=True)
    program = folder / "before_after"
    program.write_bytes((FOLDER / "build" / "release" / "before_after").read_bytes())
    program.chmod(0o755)
    return subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(program):
    program.stdin.write("\n")
    program.stdin.flush()
    times = {}
    while (line := program.stdout.readline().strip()) != "done":
        if not line:
            sys.exit("a program ended early")
        case, time = line.rsplit(",", 1)
        times[case] = float(time)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", default="7b33cd3")
    parser.add_argument("--turns", type=int, default=60)
    arguments = parser.parse_args()
    old = FOLDER / "old"
    if not old.exists():
        git("worktree", "add", "--force", "--detach", str(old), arguments.before)
    git("-C", str(old), "checkout", "--quiet", "--detach", arguments.before)
    programs = {"before": build("before", old), "after": build("after", ROOT)}
    commits = {"before": git("rev-parse", "--short", arguments.before), "after": git("rev-parse", "--short", "HEAD")}
    with arguments.out.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("date", "before", "after", "turn", "case", "before_us", "after_us"))
        for number in range(arguments.turns + 1):
            order = list(programs) if number % 2 else list(programs)[::-1]
            times = {name: turn(programs[name]) for name in order}
            for case in times["before"] if number else ():  # the first turn warms up
                out.writerow((datetime.date.today(), commits["before"], commits["after"], number, case,
                              f"{times['before'][case]:.3f}", f"{times['after'][case]:.3f}"))
            file.flush()


if __name__ == "__main__":
    main()
