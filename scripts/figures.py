#!/usr/bin/env python3
"""The figures in README.md, benches/README.md and docs/performance.md, from the newest records in benches/record and
from kernels/prebuilt/registers.csv.

    scripts/figures.py            writes them
    scripts/figures.py --check    fails where a page says something else
    scripts/figures.py --records FOLDER --show NAME    prints one, of other records

They stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Records are called cpu-DATE.csv, before-after-DATE.csv,
gpu-NAME-DATE.csv, predictions-NAME-DATE.csv and variants-NAME-DATE.csv; the predictions are those of
benches/predictions/predictions.json and benches/variants/variants.json.
scripts/plots.py draws the pictures, of the same records.
"""

import argparse
import csv
import re
import sys
from pathlib import Path
from statistics import quantiles

from record_to_tables import bars_table, found, lists_table, quotient, read, rows_of
from predictions import table as predicted_times
from variants import described

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benches" / "record"
REGISTERS = ROOT / "kernels" / "prebuilt" / "registers.csv"

# The kernels that a call launches, and so loads; tests/double_suite/loading.rs compares.
KERNELS = {
    "total_norm": ("norm_partials_l2", "clip_coef"),
    "clip_coef": ("norm_partials_l2", "clip_coef"),
    "clip_grad_norm": ("norm_partials_l2", "clip_coef", "scale"),
    "clip_grad_norm, order 3": ("norm_partials_p", "clip_coef_p", "scale"),
    "clip_grad_norm_into": ("norm_partials_l2", "clip_coef", "scale_into"),
    "clip_with_norm": ("clip_coef_of_norm", "scale_any"),
    "clip_grad_value": ("clamp", "clamp_counts"),
    "norms_by": ("scoped_partials_l2", "scoped_coefs"),
    "clip_grad_norm_by": ("scoped_partials_l2", "scoped_coefs", "scoped_scale"),
    "clip_grad_norm_by, telemetry": ("scoped_stats_l2", "scoped_coefs_stats", "scoped_scale"),
    "clip_grad_value_by": ("scoped_clamp", "scoped_clamp_counts"),
    "clip_grad_norm_sharded": ("norm_partials_l2", "fold_partials", "clip_coef_of_ranks", "scale"),
}

# What the README shows of the CPU, with any list on which something is slower than PyTorch.
README_LISTS = ("1 GiB", "GPT-2", "ResNet-50", "Qwen3-30B-A3B 1/32", "3000 x 4 Ki")
README_DTYPES = ("f32", "bf16")
ALL_DTYPES = ("f32", "f64", "f16", "bf16")
SWEEPS = re.compile(r"\d+ [KM]iB|\d+ x 4 Ki")
MODELS = ("3000 x 4 Ki", "300 x 4 Ki")  # which are not of a sweep only
OPS = {
    "norm": "norm",
    "clip; within": "clip by norm, within the threshold",
    "clip": "clip by norm, scaled",
    "value; 0 % outside": "by value, nothing outside",
    "value; 2 % outside": "by value, 2 % outside",
}


def newest(kind, read=read):
    """(path, record) of the newest of a kind, or None."""
    paths = sorted(RECORDS.glob(f"{kind}-*.csv"), key=lambda path: path.stem[-len("2026-11-22"):])
    return (paths[-1], read(paths[-1])) if paths else None


def faster(record, key, op):
    return quotient(record.torch(key, op), record.ours(key, op))


def cell(record, key, op):
    speed, ratio, times = record.ours(key, op, "GB/s", worst=min), record.ratio(key, op), faster(record, key, op)
    if speed is None or ratio is None:
        return ""
    text = f"{speed:.1f} GB/s, {100 * ratio:.0f} %"
    if times is None:
        return text
    return f"{text}, **{times:.2f} x**" if times < 1 else f"{text}, {times:.2f} x"


def cpu_table(path, record, keys, link):
    run = record.run
    source = f"commit {run['commit']}, {run['date']} ([record]({link}{path.name}))"
    has_torch = any(faster(record, key, "norm") is not None for key in record.lists)
    lines = [
        f"{run['machine']}, {run['cores']} threads, {source}.",
        "In a cell: bytes that have to move per second; how near that is to a plain read, or update in place, of the",
        "same list; " + ("how many times as fast it is as the quicker of PyTorch's CPU calls, bold where it is slower."
                    if has_torch else "PyTorch was not measured in that record."),
        "",
        "| list | type | " + " | ".join(OPS.values()) + " |",
        "|---" * (2 + len(OPS)) + "|",
    ]
    lines += ["| " + " | ".join([*key, *(cell(record, key, op) for op in OPS)]) + " |" for key in keys]
    return "\n".join(lines)


def cpu_speed(cpu, gpu):
    """For the README, with the picture as long as there is none of a GPU."""
    if cpu is None:
        return "No CPU has been measured yet."
    path, record = cpu
    lost = lambda key: any((faster(record, key, op) or 1) < 1 for op in OPS)
    main = [key for key in record.lists if key[0] in README_LISTS and key[1] in README_DTYPES]
    keys = main + [key for key in record.lists if key not in main and lost(key)]
    table = cpu_table(path, record, keys, "benches/record/")
    return (picture("cpu", "docs/images/") if gpu is None else "") + table


def cpu_lists(cpu):
    """All lists, for benches/README.md."""
    if cpu is None:
        return "Not measured yet."
    path, record = cpu
    keys = [key for key in record.lists if key[0] in MODELS or not SWEEPS.fullmatch(key[0])]
    spread = []
    for key in keys:
        for op in OPS:
            turns = [record.ours(key, op, worst=worst) for worst in (min, max)]
            spread += [turns[1] / turns[0] - 1] if None not in turns else []
    text = cpu_table(path, record, keys, "record/")
    if any(spread):
        spread.sort()
        text += ("\n\nBetween the turn before PyTorch's and the one after it, gradclip's times differ by "
                 f"{100 * spread[len(spread) // 2]:.0f} % in the median, and by up to {100 * spread[-1]:.0f} %.")
    return text + "\n\n" + picture("cpu", "../docs/images/", "tensors")


def plain_before_and_after(record):
    """Plain clipping at a commit that had nothing else, and later."""
    if record is None:
        return "Not measured yet."
    path, rows = record
    ratios = {}
    for row in rows:
        ratios.setdefault(row["case"], []).append(float(row["after_us"]) / float(row["before_us"]))
    lines = [f"Time at commit {rows[0]['after']} over that at {rows[0]['before']}, median of {len(next(iter(ratios.values())))} "
             f"turns and the quarters around it ([record](../benches/record/{path.name}), `scripts/before_after.py`).", "",
             "| case | ratio | quarters |", "|---|---|---|"]
    for case, found in ratios.items():
        low, middle, high = quantiles(found, n=4)
        lines.append(f"| {case.replace('; ', ', ')} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def telemetry(cpu):
    """What a call with telemetry takes, over one without."""
    if cpu is None:
        return "Not measured yet."
    path, record = cpu
    lines = [f"Time over that of the same call without telemetry, on the CPU (commit {record.run['commit']}, "
             f"[record](../benches/record/{path.name})).", "", "| list | " + " | ".join(ALL_DTYPES) + " |",
             "|---" * (1 + len(ALL_DTYPES)) + "|"]
    for name in dict.fromkeys(name for name, _ in record.lists if name in MODELS or not SWEEPS.fullmatch(name)):
        cells = []
        for dtype in ALL_DTYPES:
            pair = [record.worst((name, dtype), "clip; within", implementation)
                    for implementation in ("gradclip each tensor with telemetry", "gradclip each tensor")]
            cells.append(f"{quotient(*pair):.2f}" if None not in pair else "")
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(kind, folder, what="bandwidth"):
    """scripts/plots.py draws it where the record has what it shows."""
    alt = {"bandwidth": "Bandwidth against size", "tensors": "Time against number of tensors"}[what]
    name = f"{kind}_{what}.svg"
    return f"![{alt}]({folder}{name})\n\n" if (ROOT / "docs" / "images" / name).exists() else ""


def gpu_speed(gpu):
    return "No GPU has been measured yet." if gpu is None else picture("gpu", "docs/images/") + bars_table(gpu[1])


def predictions(variants):
    """What is predicted of each change, and what the newest record of the variants found."""
    lines, results = [], {}
    if variants is not None:
        path, rows = variants
        run, results = rows[0], found(rows)
        lines = [f"{run['gpu']}, driver {run['driver']}, commit {run['commit']}, {run['date']} "
                 f"([record](../benches/record/{path.name})).", ""]
    lines += ["| change | what it should do | where | found |", "|---|---|---|---|"]
    for change in described()["changes"]:
        cells = [change["change"], change["prediction"], change["where"], results.get(change["key"], "not measured")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_calls():
    """What each call loads, by the machine code of one GPU."""
    target = "sm_90"
    with REGISTERS.open(newline="") as file:
        of = {row["kernel"]: row for row in csv.DictReader(file) if row["target"] == target}
    total = lambda kernels, column: sum(int(of[kernel][column]) for kernel in kernels)
    lines = ["Norms of order 2, unless the row says otherwise. Instructions for sm_90 by ptxas, without padding "
             "([`registers.csv`](kernels/prebuilt/registers.csv), which CI compares with the PTX).", "",
             "| first call | kernels | instructions | KiB of PTX |", "|---|---|---|---|"]
    for call, kernels in KERNELS.items():
        name, _, option = call.partition(", ")
        lines.append(f"| `{name}`{', ' * bool(option)}{option} | {', '.join(f'`{kernel}`' for kernel in kernels)} | "
                     f"{total(kernels, 'instructions'):,} | {total(kernels, 'ptx_bytes') / 1024:.0f} |")
    return "\n".join(lines)


def blocks():
    """{page: {name: text}}"""
    cpu, gpu = newest("cpu"), newest("gpu")
    return {
        ROOT / "README.md": {"cpu-speed": cpu_speed(cpu, gpu), "gpu-speed": gpu_speed(gpu), "first-call": first_calls()},
        ROOT / "benches" / "README.md": {"cpu-lists": cpu_lists(cpu)},
        ROOT / "docs" / "performance.md": {
            "gpu-bars": "Not measured yet." if gpu is None else bars_table(gpu[1]),
            "gpu-lists": "Not measured yet." if gpu is None else
                         lists_table(gpu[1]) + "\n\n" + picture("gpu", "images/", "tensors"),
            "cpu-plain": plain_before_and_after(newest("before-after", rows_of)),
            "cpu-telemetry": telemetry(cpu),
            "predicted-times": predicted_times(newest("predictions"), [gpu]),
            "predictions": predictions(newest("variants", rows_of)),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--records", type=Path, help="folder of the records; needs --show")
    parser.add_argument("--show", metavar="NAME", help="print this one, write nothing")
    args = parser.parse_args()
    check = args.check
    if args.show:
        global RECORDS
        RECORDS = args.records or RECORDS
        print({name: text for texts in blocks().values() for name, text in texts.items()}[args.show])
        return
    if args.records:
        parser.error("--records needs --show")
    differ = []
    for page, texts in blocks().items():
        old = new = page.read_text()
        for name, text in texts.items():
            pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
            if not pattern.search(new):
                sys.exit(f"{page.relative_to(ROOT)} has no place for {name}")
            new = pattern.sub(lambda match, text=text: f"{match[1]}{text.rstrip()}\n{match[2]}", new)
        if new != old:
            differ.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    if check and differ:
        sys.exit(f"not what the newest records say: {', '.join(differ)}; run scripts/figures.py")


if __name__ == "__main__":
    main()
