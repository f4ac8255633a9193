#!/usr/bin/env python3
"""Draws the newest records in benches/record: bandwidth against size, and time against the number of tensors.

    scripts/plots.py                            docs/images/{cpu,gpu}_{bandwidth,tensors}.svg
    scripts/plots.py --record X.csv --out DIR   of another record, into another folder; as .png with --png

Installs what it draws with below the target folder, once. As in the tables, of gradclip's two turns the slower one
counts, and of PyTorch's calls the quicker one.
"""

import argparse
import os
import sys
from math import exp, log
from pathlib import Path

from cuda_packages import ROOT, environment, target_dir
from figures import newest
from record_to_tables import read

MATPLOTLIB = ("matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1",
              "numpy==2.4.6", "packaging==26.3", "pillow==13.0.0", "pyparsing==3.3.3", "python-dateutil==4.0.0")

INK, GREY = "#282c34", "#8a8f98"
COLOURS = {"gradclip": "#0069b4", "PyTorch": "#d55e00"}  # told apart without telling red from green
# Operations that are drawn: what moves is read once, or three times the gradients.
PANELS = {
    "clip; within": ("clip_grad_norm, within the threshold", 1),
    "clip": ("clip_grad_norm, scaled", 3),
}
SOLID, DASHED, DOTTED = "-", (0, (4, 1.5)), (0, (1, 1))
TICKS = [(2**power, f"{2**(power % 10)} {'KMG'[power // 10 - 1]}iB") for power in range(10, 40, 4)]
FEWEST = 5  # points that make a curve


class Curves:
    def __init__(self, record):
        self.record = record
        self.gpu = "gpu" in record.run
        self.tensors = {(row["list"], row["dtype"]): int(row.get("tensors") or 0)
                        for rows in record.rows.values() for row in rows}

    def sizes(self, dtype):
        """Lists of one tensor, by size."""
        names = {"1 KiB", "4 KiB", "16 KiB", "64 KiB", "256 KiB"} | {f"{4**i} MiB" for i in range(5)}
        names |= {f"{2**i} GiB" for i in range(7)}
        keys = [key for key in self.record.lists if key[1] == dtype and key[0] in names and self.tensors[key] == 1]
        return sorted(keys, key=lambda key: self.record.size[key])

    def counts(self):
        """Lists of 4 Ki elements a tensor, by the number of tensors."""
        keys = [key for key in self.record.lists if key[1] == "f32" and key[0].endswith(" x 4 Ki")]
        return sorted(keys, key=lambda key: self.tensors[key])

    def time(self, who, key, op, column="median_us"):
        """In microseconds."""
        if who == "limit":
            return self.limit(key, op)
        return (self.record.ours if who == "gradclip" else self.record.torch)(key, op, column)

    def limit(self, key, op):
        """Of a read, and of an update in place (a GPU: a copy) where the operation writes; the quicker of two turns."""
        names = [("limit: plain read", "plain read"), ("limit: plain update in place", "copy")]
        times = []
        for cpu, gpu in names[:2 if op == "clip" else 1]:
            of = ("limit", gpu) if self.gpu else (op, cpu)
            times.append(self.record.worst(key, *of, worst=min))
        return None if None in times else sum(times)

    def footer(self, path):
        run = self.record.run
        machine = f"{run['gpu']}, driver {run['driver']}" if self.gpu else f"{run['machine']}, {run['cores']} threads"
        torch = {row["command"].partition("(PyTorch ")[2].rstrip(")") for rows in self.record.rows.values()
                 for row in rows if "(PyTorch " in row.get("command", "")}
        torch = f", PyTorch {torch.pop()}" if torch else ""
        return f"{machine}{torch}. {path.name}, commit {run['commit']}, {run['date']}."


def points(keys, x, y):
    found = [(x(key), y(key)) for key in keys]
    return [(a, b) for a, b in found if b]


def at(curve, x):
    """The curve's height there, interpolated; None outside."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return exp(log(y0) + (log(y1) - log(y0)) * (log(x) - log(x0)) / (log(x1) - log(x0)))
    return None


def label(axes, text, x, curves, colour, above):
    """At curves that rise: to the left above all of them, or to the right below."""
    heights = [height for height in (at(curve, x) for curve in curves) if height]
    if heights:
        sign = -1 if above else 1
        axes.annotate(text, (x, max(heights) if above else min(heights)), xytext=(5 * sign, -4 * sign),
                      textcoords="offset points", ha="right" if above else "left", va="bottom" if above else "top",
                      color=colour, fontsize=11, fontweight="bold")


def line(axes, curve, colour, style):
    if not curve:
        return
    marked = {"linewidth": 2, "marker": "o", "markersize": 3.5} if colour != GREY else {"linewidth": 1.6}
    axes.plot(*zip(*curve), color=colour, linestyle=style, **marked)


def bandwidth(pyplot, curves, kind):
    keys = {dtype: curves.sizes(dtype) for dtype in ("f32", "bf16")}
    if len(keys["f32"]) < FEWEST:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.9), sharey=True, layout="constrained")
    size = curves.record.size
    for axes, (op, (title, passes)) in zip(panels, PANELS.items()):
        speed = lambda who: lambda key: passes * size[key] / (curves.time(who, key, op) or float("inf")) / 1e3
        limit = points(keys["f32"], size.get, speed("limit"))
        line(axes, limit, GREY, DOTTED)
        largest = limit[-1][0]
        above = max(y for x, y in limit if x > largest / 2**11)  # the label is about as wide
        label(axes, "limit of the memory", largest, [[(1, above), (largest, above)]], GREY, True)
        axes.margins(y=0.09)
        for who, colour in COLOURS.items():
            drawn = [points(keys[dtype], size.get, speed(who)) for dtype in keys]
            for curve, style in zip(drawn, (SOLID, DASHED)):
                line(axes, curve, colour, style)
            label(axes, who, 2**15, drawn, colour, who == "gradclip")
        axes.set_title(title, loc="left", fontsize=12, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([x for x, _ in TICKS], [text for _, text in TICKS])
        axes.set_xlim(2**9.5, 1.4 * max(size[key] for key in keys["f32"]))
        axes.set_xlabel("gradients, one tensor")
    panels[0].set_ylabel("GB/s: bytes that have to move by the time")
    figure.suptitle(f"Clipping by norm on a {kind}: bandwidth against size (f32 solid, bf16 dashed)",
                    x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    return figure


def tensors(pyplot, curves, kind):
    keys = curves.counts()
    if len(keys) < FEWEST:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4.9), layout="constrained")
    column = "done_us" if curves.gpu else "median_us"
    count = curves.tensors.get
    limit = points(keys, count, lambda key: curves.time("limit", key, "clip; within"))
    line(axes, limit, GREY, DOTTED)
    label(axes, "a plain read", 1000, [limit], GREY, False)
    for who, colour in COLOURS.items():
        drawn = [points(keys, count, lambda key, op=op: curves.time(who, key, op, column)) for op in PANELS]
        for curve, style in zip(drawn, (SOLID, DASHED)):
            line(axes, curve, colour, style)
        label(axes, who, 100, drawn, colour, True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([10**i for i in range(5)], [f"{10**i:,}" for i in range(5)])
    axes.set_xlabel("tensors of 4096 elements, f32")
    axes.set_ylabel("microseconds, one call")
    figure.suptitle(f"Clipping by norm on a {kind}: time against number of tensors", x=0.01, ha="left", fontsize=14,
                    fontweight="bold", color=INK)
    axes.set_title("within the threshold solid, scaled dashed", loc="left", fontsize=12, color=INK)
    return figure


def draw(pyplot, path, record, folder, suffix):
    curves = Curves(record)
    prefix, kind = ("gpu", "GPU") if curves.gpu else ("cpu", "CPU")
    for plot in (bandwidth, tensors):
        target = folder / f"{prefix}_{plot.__name__}.{suffix}"
        figure = plot(pyplot, curves, kind)
        if figure is None:
            print(f"{path.name} has too little for {target.name}: none is drawn", file=sys.stderr)
            target.unlink(missing_ok=True)  # it would be of another record
            continue
        for axes in figure.axes:
            axes.grid(color="#e4e6ea", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(curves.footer(path), x=0.01, ha="left", fontsize=8.5, color=GREY)
        # The test of the pages looks for the name of the record; without a date the same record gives the same file.
        metadata = {"Source": path.stem, "Date": None} if suffix == "svg" else {}
        figure.savefig(target, metadata=metadata, facecolor="white", dpi=110)
        pyplot.close(figure)
        print(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="instead of the newest ones")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", metavar="DIR")
    parser.add_argument("--png", action="store_true")
    args = parser.parse_args()
    home = environment(MATPLOTLIB, target_dir() / "plot-packages")
    if Path(sys.prefix).resolve() != home:
        os.execv(home / "bin" / "python", [str(home / "bin" / "python"), *sys.argv])
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"svg.hashsalt": "gradclip", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
                            "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK})
    args.out.mkdir(parents=True, exist_ok=True)
    records = [(args.record, read(args.record))] if args.record else filter(None, map(newest, ("cpu", "gpu")))
    for path, record in records:
        draw(pyplot, path, record, args.out, "png" if args.png else "svg")


if __name__ == "__main__":
    main()
