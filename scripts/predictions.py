"""benches/predictions/predictions.json as a table, with what the newest records found. Twin: benches/predictions/predicted.rs,
which judges while it measures."""

import json
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "benches" / "predictions" / "predictions.json"
UNITS = {"us": ("median_us", max), "share": ("ratio", min)}  # the column, and which of two passes counts


def predictions():
    return json.loads(FILE.read_text())


def interval(all, case, card, kernels):
    """[low, high] of what still counts as predicted, each maybe None; None where nothing is predicted for that card."""
    key = next((key for key, known in all["cards"].items() if known["name"] == card), None)
    ends = case["predicted"].get(key, {}).get(kernels)
    if ends is None:
        return None
    low, high = ends[0], ends[-1]
    return [None if low is None else low * (1 - case["within"]), None if high is None else high * (1 + case["within"])]


def kernels_of(all, case):
    return all["kernels"]["value" if case["op"].startswith("value") else "norm"]


def verdict(interval, unit, measured):
    if interval is None:
        return "no prediction"
    below, above = ["faster", "slower"] if unit == "us" else ["slower", "faster"]
    low, high = interval
    if low is not None and measured < low:
        return f"refuted: {below}"
    if high is not None and measured > high:
        return f"refuted: {above}"
    return "confirmed"


def found(all, case, records):
    """Of the first record that has it."""
    unit = case.get("unit", "us")
    column, worst = UNITS[unit]
    for record in records:
        key = (case["list"], case["dtype"])
        measured = record.worst(key, case["op"], case["implementation"], column, case["mode"], case["cache"], worst)
        if measured is None:
            continue
        row = record.rows[(*key, case["op"], case["implementation"], case["mode"], case["cache"])][0]
        # A record of gpu_bench --predictions says which kernels it is of.
        kernels = row.get("kernels") or kernels_of(all, case)
        judged = verdict(interval(all, case, row["gpu"], kernels), unit, measured)
        return f"{quantity(measured, unit)}, " + (judged if judged == "confirmed" else f"**{judged}**")
    return "not measured"


def quantity(x, unit):
    return f"{x:.1f} us" if unit == "us" else f"{100 * x:.1f} %"


def predicted(case, card):
    """The cell of a card: for the kernels as they were when it was predicted, then for others."""
    cells = []
    for kernels, ends in case["predicted"].get(card, {}).items():
        percent = case.get("unit") == "share"
        text = " to ".join(f"{100 * end if percent else end:g}" for end in dict.fromkeys(ends) if end is not None)
        text += (" %" if percent else "") + (" or more" if ends[-1] is None else "")
        cells.append(text if kernels == "now" else f"{text} {kernels}")
    return ", ".join(cells)


def table(path_and_record, others):
    """`others`: records that are looked into for what the first lacks, as (path, record) or None."""
    all, known = predictions(), [each for each in (path_and_record, *others) if each is not None]
    kernels = [f"*{name}*, {what}" for name, what in all["described"].items()]
    lines = [f"Microseconds, or a share of the plain read; {all['source'].split('; ')[0]}. The kernels are: {'; '.join(kernels)}. "
             f"A number without a word is for *now*. What is found is compared with *{all['kernels']['norm']}* for norms and clips "
             f"by norm, and with *{all['kernels']['value']}* for clips by value: those are the crate's kernels.", ""]
    for path, record in known:
        run = record.run
        lines += [f"{run['gpu']}, driver {run['driver']}, commit {run['commit']}, {run['date']} "
                  f"([record](../benches/record/{path.name})).", ""]
    cards = [f"{key.upper()}, {card['copy_tb_s']} TB/s" for key, card in all["cards"].items()]
    lines += ["| list | op | implementation | how | within | " + " | ".join(cards) + " | found |", "|---" * (6 + len(cards)) + "|"]
    for case in all["cases"]:
        cells = [f"{case['list']}, {case['dtype']}", case["op"], case["implementation"],
                 f"{case['mode']}, {case['cache']}", f"{100 * case['within']:g} %",
                 *(predicted(case, card) for card in all["cards"]), found(all, case, [record for _, record in known])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
