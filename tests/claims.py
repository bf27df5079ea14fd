"""claims.py - what the runs of reproduce.py say of the paper's nine claims: tables and figures.

    python tests/claims.py                             # of tests/results
    python tests/claims.py --results FOLDER

In:   <results>/claims.jsonl   a line a run: its row, seed, command, commit, and every score
Out:  <results>/claims.md      the claims with a verdict for each pool; then its rows, its tasks
      <results>/<pool>_*.png   a figure a claim, of what was measured; with matplotlib

Scores are kNN accuracies on test images in percent, detection's AP in percent by COCO's rule. A
mean counts the tasks that chose no settings, after a * all; a verdict says in how many seeds,
tasks, or cases (a task in a seed) a figure is above 0. ± is the standard deviation of these.
"""
import argparse
from pathlib import Path

import numpy as np

from reproduce import CURRENCIES, POOLS, RESULTS, ROWS, read_lines, rows_of

PARTS = ("sdr", "no_kd", "l2", "shared_heads", "no_phases", "literal", "random", "batches", "one",
         "narrow")
SIZES = ("k1", "k16", "k81", "k256")                   # of claim 8
# ------------------------------------------------------------------------------------ numbers


class Lines:
    """The lines of a pool, by row and seed, and what is computed of them."""

    def __init__(self, lines, pool):
        self.pool, self.rows = pool, {}
        self.lines = [line for line in lines if line["pool"] == pool]
        self.kind_of, self.tuning = POOLS[pool].kind_of, POOLS[pool].tuning
        self.counted = [task for task in self.kind_of if task not in self.tuning]
        for line in self.lines:
            self.rows.setdefault(line["row"], {})[line["seed"]] = line

    def scores(self, row, key="routed", tasks=None):
        """{seed: the mean of some tasks, or of those that count}. A network without sub-nets has
        `largest` alone, which is what stands for `routed` too."""
        found = {}
        for seed, line in sorted(self.rows.get(row, {}).items()):
            scores = line["tasks"]
            names = scores if "scenes" in scores else tasks or self.counted    # detection's
            found[seed] = float(np.mean([scores[t].get(key, scores[t]["largest"]) for t in names]))
        return found

    def gains(self, row, other, key="routed", tasks=None):
        """Points of a row over another's routed, or only, network in the seeds of both: a list."""
        ours, theirs = self.scores(row, key, tasks), self.scores(other, "routed", tasks)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def spread(values, sign="", digits=1):
    """"37.5 ± 1.6" of several, "37.5" of one, "" of none."""
    values = list(values)
    if not values:
        return ""
    text = f"{np.mean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def verdict(gains, of="seed"):
    """The mean, and what seeds, or tasks, say of "is above 0", in words; "" of none."""
    above = sum(gain > 0 for gain in gains)
    if not gains:
        return ""
    text = f"in {above} of {len(gains)} {of}s"
    if len(gains) == 1:
        text = f"{'above' if above else 'not above'}, one {of}"
    elif above in (0, len(gains)):
        text = f"{'holds' if above else 'does not hold'}, {above} of {len(gains)} {of}s"
    return f"{spread(gains, '+')}: {text}"


# ------------------------------------------------------------------------------------ tables

def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


def claims(data):
    """{claim: what is measured and the verdict, "" where it is not measured} of a pool."""
    cells, tasks = {}, {task: data.kind_of[task] for task in data.counted}

    def claim(text, gains, of="seed"):
        cells[text] = verdict(gains, of)

    def both(text, row, other):
        claim(text, data.gains(row, other))
        if data.tuning and cells[text]:                # with the tasks that chose settings
            cells[text] += f"; * {verdict(data.gains(row, other, tasks=list(data.kind_of)))}"

    def each_task(row_of, against, tasks=tasks):
        gains = [data.gains(row_of(kind), against, tasks=[task]) for task, kind in tasks.items()]
        return [float(np.mean(values)) for values in gains if values]

    claim("1: a task's own kind alone teaches more than everything, at equal images",
          each_task("only_{}".format, "simsiam_third"), "task")
    alone = each_task("only_{}".format, "simsiam_third", data.kind_of)
    gained = each_task(lambda kind: "sdr", "simsiam_images", data.kind_of)
    cells["1: ... and what SDR gains on a task, at equal images: correlation over all tasks"] = (
        f"{np.corrcoef(alone, gained)[0, 1]:+.2f}" if len(alone) == len(gained) > 2 else "")
    for row, text in CURRENCIES.items():
        both(f"2: SDR over SimSiam, {text}", "sdr", row)
    claim("2: its largest network over SimSiam, equal epochs",
          data.gains("sdr", "simsiam", "largest"))
    for times in ("double", "long"):
        for row in (f"simsiam_{times}", f"simsiam_images_{times}"):
            claim(f"2: {ROWS[f'sdr_{times}'].text}, over {ROWS[row].text}",
                  data.gains(f"sdr_{times}", row))
    for row in ("byol", "byol_images"):
        both(f"2: {ROWS['sdr_byol'].text}, over {ROWS[row].text}", "sdr_byol", row)
    claim("3: on every task, equal epochs", each_task(lambda kind: "sdr", "simsiam"), "task")
    rows = ("sdr", "random", "sdr_long")
    for row in rows:
        stds = [np.mean([np.std(line["tasks"][task]["tests"], ddof=1) for task in tasks])
                for line in data.rows.get(row, {}).values()]
        cells[f"4: {ROWS[row].text}: std of the sub-nets' accuracies on a task"] = spread(stds)
    for row in rows:
        alike = [np.mean([line["tasks"][task].get("correlation", 0.0) for task in tasks])
                 for line in data.rows.get(row, {}).values()]
        claim(f"5: {ROWS[row].text}: leave-one-out and test scores of sub-nets, of different "
              "images, correlate, %", [100 * value for value in alike])
    for row in rows:
        routed, mean = data.scores(row), data.scores(row, "mean")
        claim(f"5: {ROWS[row].text}: the chosen sub-net over the mean of all",
              [routed[seed] - mean[seed] for seed in routed])
    shares = [line["clusters"][task] for line in data.rows.get("sdr", {}).values()
              for task in tasks]
    claim("5: the chosen cluster holds more of the task's kind than the pool, % points",
          [100 * (share.get("chosen", 0) - share["pool"]) for share in shares], "case")
    by_chance = sum(share["above"] for share in shares)
    cells["5: ... by chance in as many cases"] = f"{by_chance:.1f}" if shares else ""
    for row, text in (("sdr", "SDR's sub-net"), ("largest", "its largest network")):
        for other, currency in (("simsiam", "epochs"), ("images", "images")):
            claim(f"6: {text} detects better, equal {currency}, AP",
                  data.gains(f"detect_{row}", f"detect_{other}"))
    for row in PARTS[1:]:
        both(f"7: SDR over {ROWS[row].text}", "sdr", row)
    for row in SIZES[:-1]:
        claim(f"8: k = 256 over k = {row[1:]}", data.gains("k256", row))
    claim("9: from scratch, with phases over without", data.gains("scratch", "scratch_no_phases"))
    for row, text in (("scratch", "with"), ("scratch_no_phases", "without")):
        cells[f"9: the least std of a sub-net at the end, {text}"] = spread(
            (line["sub_std"] for line in data.rows.get(row, {}).values()), digits=2)
    return cells


def row_table(data):
    """Every row of a pool that was run."""
    body = []
    for name, row in rows_of(data.pool).items():
        if name not in data.rows:
            continue
        subnets = row.clusters is not None
        keys = ("routed", "largest", "mean", "best") if subnets else ("largest",)
        cells = [spread(data.scores(name, key).values()) for key in keys] + [""] * (4 - len(keys))
        for other in CURRENCIES:
            comparable = subnets and row.epochs == (0, 1) and row.start == "base"
            cells.append(spread(data.gains(name, other), "+") if comparable else "")
        lines = data.rows[name].values()
        images = [line["images"] / 1000 for line in lines if "images" in line]     # not detection's
        body.append([row.text, *cells, len(lines), f"{np.mean(images):,.0f}" if images else ""])
    return table(["row", "routed, or alone", "its largest", "mean sub-net", "best by test",
                  "over SimSiam, epochs", "... images", "... cost", "seeds", "1000 images"], body)


def task_table(data):
    """Each task: SimSiam in three currencies, its own kind alone, SDR, and where it was routed."""
    body = []
    for task, kind in data.kind_of.items():
        alone = [*CURRENCIES, "simsiam_third", f"only_{kind}"]
        cells = [spread(data.scores(row, tasks=[task]).values()) for row in alone]
        cells += [spread(data.scores("sdr", key, [task]).values()) for key in ("routed", "largest")]
        shares = [line["clusters"][task] for line in data.rows.get("sdr", {}).values()]
        own, pure = ([100 * share.get(key, 0) for share in shares] for key in ("chosen", "pure"))
        body.append([task + " *" * (task in data.tuning), *cells,
                     *(spread(data.gains("sdr", row, tasks=[task]), "+")
                       for row in ("simsiam", "random")), spread(own), spread(pure)])
    return table(["task", *(f"SimSiam, {text}" for text in CURRENCIES.values()),
                  "... a third", "a third, on its kind alone", "SDR routed", "its largest",
                  "gain, equal epochs", "... over random clusters",
                  "own kind in the chosen cluster, %",
                  "... in clusters of that kind's images, %"], body)


# ------------------------------------------------------------------------------------ figures

def plot_gains(axes, data, against, rows):
    """Points of rows over another row, on each task; hatched what saw the task's own kind alone."""
    shown = [row for row in rows if data.gains(row, against)]
    width = 0.8 / max(1, len(shown))
    for i, row in enumerate(shown):
        gains = [np.mean(data.gains(row, against, tasks=[task])) for task in data.kind_of]
        hatch = ["///" * (row == f"only_{kind}") for kind in data.kind_of.values()]
        colours = {"color": str(0.95 - 0.7 * i / len(shown)), "edgecolor": "black"}
        axes.bar(np.arange(len(gains)) + (i + 0.5) * width - 0.4, gains, width, hatch=hatch,
                 **colours)
        axes.bar(0, 0, **colours, label=rows_of(data.pool)[row].text)  # a key without a hatch
    if shown:
        axes.axhline(0, color="black", linewidth=0.8)
    name_tasks(axes, data)
    axes.set_ylabel(f"points of kNN accuracy over\n{ROWS[against].text}")


def plot_subnets(axes, data):
    """All sub-nets of SDR's first seed on each task, the one that was chosen, and SimSiam."""
    marks = {"SDR, routed": ("*", "routed", "sdr"), "its largest network": ("_", "largest", "sdr"),
             "SimSiam, equal epochs": ("x", "largest", "simsiam"),
             "SimSiam, equal images": ("+", "largest", "simsiam_images")}
    for seed, line in sorted(data.rows.get("sdr", {}).items())[:1]:
        for i, task in enumerate(data.kind_of):
            tests = line["tasks"][task]["tests"]
            axes.scatter(np.linspace(i - 0.2, i + 0.2, len(tests)), tests, s=14, color="0.6",
                         label="a sub-net" if i == 0 else None)
            for text, (marker, key, row) in marks.items():
                score = data.scores(row, key, [task]).get(seed, np.nan)
                axes.scatter(i, score, s=110, marker=marker, color="black",
                             label=text if i == 0 else None)
        axes.set_ylabel(f"kNN accuracy on test images, %, seed {seed}")
    name_tasks(axes, data)


def plot_purity(axes, data, rows):
    """SDR's points over another row on each task, by how pure its kind's clusters are: a mark a
    seed. rows: that row alone."""
    sdr, other = (data.rows.get(row, {}) for row in ("sdr", *rows))
    for task, marker in zip(data.kind_of, "os^vDPX"):
        x = [100 * line["clusters"][task].get("pure", np.nan) for seed, line in sorted(sdr.items())
             if seed in other]
        axes.scatter(x, data.gains("sdr", *rows, tasks=[task]), s=40, marker=marker,
                     label=task + " *" * (task in data.tuning))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("images of the task's kind in the clusters of these, %")
    axes.set_ylabel(f"points of kNN accuracy over\n{ROWS[rows[0]].text}")


def name_tasks(axes, data):
    """Tasks along the bottom, those that chose settings with a star."""
    names = [task + " *" * (task in data.tuning) for task in data.kind_of]
    axes.set_xticks(range(len(names)), names)


def plot_rows(axes, data, rows):
    """A row a line: a dot a seed, a ring its largest network, a stroke the seeds' mean."""
    shown = [row for row in rows if row in data.rows][::-1]
    for y, row in enumerate(shown):
        scores = list(data.scores(row).values())
        if rows_of(data.pool)[row].clusters:
            largest = list(data.scores(row, "largest").values())
            axes.scatter(largest, [y - 0.2] * len(largest), s=30, facecolors="none",
                         edgecolors="black")
        axes.scatter(scores, [y] * len(scores), s=30, color="black")
        axes.plot([np.mean(scores)] * 2, [y - 0.3, y + 0.3], color="black")
    axes.set_yticks(range(len(shown)), [rows_of(data.pool)[row].text for row in shown])
    axes.set_xlabel("AP of detection, %" if "detect_simsiam" in rows else
                    "mean kNN accuracy of the tasks, %; dots: routed, or alone; rings: W_0 of SDR")


def figures(data, results):
    """Draws FIGURES of what was measured; one line where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: pip install matplotlib")
        return
    kinds = [row for row in rows_of(data.pool) if row.startswith("only_")]
    plots = {
        "1_transfer": (plot_gains, "simsiam_third", kinds),
        "2_gains": (plot_gains, "simsiam", ["simsiam_images", "simsiam_cost", "random", "sdr"]),
        "7_purity": (plot_purity, ["random"]),
        "3_subnets": (plot_subnets,),                  # and claims 4 and 5
        "6_detection": (plot_rows, ["detect_simsiam", "detect_images", "detect_largest",
                                    "detect_sdr"]),
        "7_parts": (plot_rows, [*PARTS, *CURRENCIES]),
        "8_clusters": (plot_rows, SIZES),
        "9_scratch": (plot_rows, ["scratch", "scratch_no_phases"]),
    }
    for times in ("_long", "_double"):
        longer = [row for row in ROWS if times in row]
        plots["2" + times] = (plot_rows, [*longer, "sdr", "random", *CURRENCIES])
    for name, (plot, *what) in plots.items():
        if (what[-1][0] if what else "sdr") not in data.rows:          # its first row
            continue
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        plot(axes, data, *what)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(results / f"{data.pool}_{name}.png", dpi=110)


# ------------------------------------------------------------------------------------ command

def render(results):
    """claims.md and the figures from claims.jsonl."""
    lines = read_lines(results / "claims.jsonl")
    pools = [data for data in (Lines(lines, pool) for pool in POOLS) if data.rows]
    columns = [claims(data) for data in pools]
    parts = ["# The claims, by tests/claims.py\n",
             "kNN accuracy on test images, %. Tasks with * chose settings: only means after a * "
             "count them. An empty cell was not measured.\n",
             table(["claim", *(data.pool for data in pools)],
                   [[text, *(column[text] for column in columns)] for text in columns[0]])]
    for data in pools:
        commits, seeds = ({line[key] for line in data.lines} for key in ("commit", "seed"))
        parts += [f"## {data.pool}\n",
                  f"Seeds {sorted(seeds)}; commits {', '.join(sorted(commits))}.\n",
                  row_table(data), task_table(data)]
        figures(data, results)
    (results / "claims.md").write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="tests/results")
    args = parser.parse_args()
    if not (args.results / "claims.jsonl").is_file():
        parser.error(f"{args.results}/claims.jsonl is not there: reproduce.py writes it, or name "
                     "another --results")
    render(args.results)


if __name__ == "__main__":
    main()
