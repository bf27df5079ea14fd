"""reproduce.py - the paper's claims, run by the scripts' own command lines, tables and figures.

    python tests/reproduce.py --pool toy                       # all rows, seeds 3 4 5: hours
    python tests/reproduce.py --pool domains --packs PACKS --seeds 3 --only simsiam sdr
    python tests/reproduce.py --pool domains --packs PACKS --seeds 10 --try lr="--lr 0.5"
    python tests/reproduce.py --render                         # tables and figures from the lines

Pools: toy (drawn); domains (PACKS/domains and PACKS/tiny-imagenet: signs, sketches, cartoons,
hands, photographs); photographs (PACKS/tiny-imagenet, tasks PACKS/tin_tasks). A row is one run of
pretrain.py and of route.py on all tasks of the pool; ROWS lists them, in the order in which they
are run. All rows of a seed go on from its row `base`, SimSiam from scratch, and its clusters.

Currencies. What SDR is compared with is SimSiam, continued from the same `base` for
    epochs  as many images of the largest network as SDR's
    images  as many images as SDR forwards with gradient, through any network
    cost    as many images as take SDR's time; an SDR step costs 4.7 SimSiam steps (bench.py step)

Resumable: a row whose line stands in tests/results/claims.jsonl is not run again, an unfinished one
goes on from its last state in --work. --try writes to tests/results/tried.jsonl: settings are
chosen on seeds 10 and 11 and on the tasks of TUNING, which no claim counts. A change of the method
voids the lines of the commits before it: remove them.
"""
import argparse
import itertools
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sdrnet                                          # after the lines that say where it is
import toy

# ------------------------------------------------------------------------------------ what is run

OPTIONS = ("--width 16 --no-small-stem --image-size 32 --head 512 --batch-size 64 "
           "--weight-decay 5e-4 --blur 0")             # pretrain.py's toy recipe, for every pool
IMAGES = 1 + 4 / 2 * 7 / 8                             # a step's, in B: 4 halves in 7 of 8
COST = 1 + 3.7 * 7 / 8                                 # and what it costs, in SimSiam steps
CURRENCIES = {"simsiam": "equal epochs", "simsiam_images": "equal images",
              "simsiam_cost": "equal cost"}            # rows that SDR is compared with


class Pool(NamedTuple):
    """base, more: epochs of `base`, and of what goes on from it; lr: of rows from scratch, and of
    the others, SimSiam's best tried or level; kind_of: task -> its images' kind; tuning:
    tasks that no claim counts."""
    base: float
    more: float
    lr: tuple
    kind_of: dict
    tuning: tuple = ()


POOLS = {
    "toy": Pool(20, 10, (0.24, 0.96), {"figures": "figures", "lands": "lands", "signs": "signs",
                                       "weaves": "weaves"}),
    "domains": Pool(6, 12, (0.24, 0.24),
                    {"signs": "signs", "sketch": "sketch", "cartoon": "cartoon", "hands": "hands",
                     "tin_mammals": "photos", "tin_vehicles": "photos", "tin_food": "photos"},
                    ("sketch", "hands", "tin_food")),
    "photographs": Pool(5, 3, (0.24, 0.24),
                        {"tin_mammals": "nature", "tin_arthropods": "nature", "tin_food": "nature",
                         "tin_vehicles": "artefacts", "tin_clothes": "artefacts",
                         "tin_places": "artefacts"},
                        ("tin_arthropods", "tin_food")),
}


class Row(NamedTuple):
    """epochs: of Pool.base, of Pool.more; start: the row whose network it starts from; clusters:
    balanced, random (the same sizes), one (a single path for all images), or k; subset: a kind;
    backbone: the checkpoint that detects toy scenes; nothing else is trained then."""
    text: str
    epochs: tuple = (0, 1)
    clusters: str = None
    options: str = ""
    start: str = "base"
    subset: str = None
    backbone: str = None


ROWS = {
    "base": Row("SimSiam, where all go on from", (1, 0), start=None),
    "simsiam": Row("SimSiam, equal epochs"),
    "sdr": Row("SDR", clusters="balanced"),
    "simsiam_images": Row("SimSiam, equal images", (0, IMAGES)),
    "simsiam_cost": Row("SimSiam, equal cost", (0, COST)),
    "no_kd": Row("SDR without SiamKD", clusters="balanced", options="--distill none"),
    "shared_heads": Row("SDR, one set of heads", clusters="balanced", options="--shared-heads"),
    "no_phases": Row("SDR without phases", clusters="balanced", options="--phases 0,0,0,0,1"),
    "random": Row("SDR, random clusters of the same sizes", clusters="random"),
    "one": Row("SDR, one path for all images (k = 1)", clusters="one"),
    "narrow": Row("SimSiam, the sub-net's width throughout, from scratch", (1, 1),
                  options="--width 12", start=None),
    "simsiam_third": Row("SimSiam on all, a third of the images", (0, 1 / 3)),
    "sdr_third": Row("SDR, a third of the epochs", (0, 1 / 3), clusters="balanced"),
    "l2": Row("SDR, L2 in SiamKD's place", clusters="balanced", options="--distill l2"),
    "literal": Row("SDR, phases read literally", clusters="balanced", options="--phases-literal"),
    "k81": Row("SDR, k = 81", clusters="81", options="--shared 0.4375"),
    "k256": Row("SDR, k = 256", clusters="256", options="--shared 0.5"),
    "k16": Row("SDR, k = 16, sub-nets of 5/8", clusters="balanced", options="--shared 0.25"),
    "scratch": Row("SDR from scratch", (1, 1), clusters="balanced", start=None),
    "scratch_no_phases": Row("SDR from scratch, without phases", (1, 1), clusters="balanced",
                             options="--phases 0,0,0,0,1", start=None),
    "base_byol": Row("BYOL, where its rows go on from", (1, 0), options="--objective byol",
                     start=None),
    "byol": Row("BYOL, equal epochs", options="--objective byol", start="base_byol"),
    "sdr_byol": Row("SDR over BYOL", clusters="balanced", options="--objective byol",
                    start="base_byol"),
}
DETECTION = {
    "detect_sdr": Row("detection by the sub-net of figures", backbone="sdr/figures/subnet.pt"),
    "detect_simsiam": Row("detection by SimSiam, equal epochs", backbone="simsiam/simsiam.pt"),
}


def rows_of(pool):
    """ROWS, and first the oracle: SimSiam on each kind of images alone, as many as on all."""
    rows = {"base": ROWS["base"], "simsiam_third": ROWS["simsiam_third"]}
    for kind in sorted(set(POOLS[pool].kind_of.values())):
        text = f"SimSiam on {kind} alone, a third of the images"
        rows[f"only_{kind}"] = Row(text, (0, 1 / 3), subset=kind)
    return rows | ROWS | (DETECTION if pool == "toy" else {})


# ------------------------------------------------------------------------------------ pools

class Job(NamedTuple):
    """A row on a seed of a pool; where: the folder of that pool and seed; options: beside the
    row's, of --try."""
    name: str
    row: Row
    pool: str
    seed: int
    where: Path
    packs: Path
    options: str = ""


def open_pool(job):
    """The folder of images, drawn or linked together if need be, and those of the tasks."""
    packs, where, kind_of = job.packs, job.where, POOLS[job.pool].kind_of
    if job.pool == "toy":
        if not (where / "toy/images").exists():
            toy.draw(where / "toy", job.seed)
        return where / "toy/images", [where / "toy/tasks" / name for name in kind_of]
    photographs = packs / "tiny-imagenet/images"
    tasks = [packs / "tin_tasks" / name for name in kind_of if name.startswith("tin_")]
    if job.pool == "photographs":
        return photographs, tasks
    images = where / "pool"
    (images / "photos").mkdir(parents=True, exist_ok=True)
    links = {images / folder.name: folder for folder in (packs / "domains/pool").iterdir()}
    for name in (packs / "domains/photos.txt").read_text().split():
        links[images / "photos" / os.path.basename(name)] = photographs / name
    for link, source in links.items():
        if not link.is_symlink():
            link.symlink_to(source)
    return images, tasks + list((packs / "domains/tasks").iterdir())


def kinds_of(job):
    """The kind of each of the pool's images, as `base` has listed them: (N,) str."""
    if job.pool == "toy":
        return np.array([world for world, _ in toy.pool_kinds(job.seed)])
    names = (job.where / "base/images.txt").read_text().splitlines()
    if job.pool == "domains":
        return np.array([name.split("/")[0] for name in names])
    nature = set((job.packs / "tiny-imagenet/half_nature.txt").read_text().split())
    return np.array(["nature" if name[:9] in nature else "artefacts" for name in names])


# ------------------------------------------------------------------------------------ running

def epochs_of(job):
    """Epochs of the whole pool that W_0, or the network alone, is trained for."""
    base, more = job.row.epochs
    return base * POOLS[job.pool].base + more * POOLS[job.pool].more


def images_of(job):
    """Images that are forwarded with gradient, through any network."""
    a_step = 1
    if job.row.clusters:
        a_step = 3 if "--phases 0,0,0,0,1" in job.row.options else IMAGES
    return a_step * epochs_of(job) * len(kinds_of(job))


def save_clusters(job):
    """The path of a row's clusters.npy: the base's, or of it made over and saved."""
    path = job.where / job.name / "clusters.npy"
    clusters = np.load(job.where / "base/clusters.npy")
    if job.row.clusters == "random":
        np.save(path, np.random.default_rng([job.seed, 9]).permutation(clusters))
    elif job.row.clusters == "one":
        np.save(path, np.full_like(clusters, 15))      # path (1, 1, 1, 1) of g = 2
    else:
        path = job.where / "base/clusters.npy"
    return path


def commands_of(job):
    """The scripts' command lines of a job, as lists."""
    row, base, target = job.row, job.where / "base", job.where / job.name
    images, tasks = open_pool(job)
    target.mkdir(parents=True, exist_ok=True)
    if row.backbone:
        return [["detect_voc.py", "--voc", job.where / "toy/VOCdevkit", "--train", "2007:trainval",
                 "--recipe", "quick", "--backbone", job.where / row.backbone, "--out", target,
                 "--seed", job.seed, "--workers", 0]]
    commands, epochs = [], epochs_of(job)
    network = "byol.pt" if "byol" in row.options else "simsiam.pt"
    train = ["pretrain.py", "--data", images, "--out", target, "--seed", job.seed, "--workers", 0,
             *OPTIONS.split(), "--lr", POOLS[job.pool].lr[bool(row.start)], *row.options.split(),
             *job.options.split(),
             "--init", job.where / row.start / network if row.start else "none"]
    if row.subset:
        kinds = kinds_of(job)
        members = np.flatnonzero(kinds == row.subset)
        np.save(target / "subset.npy", members)
        epochs *= len(kinds) / len(members)            # as many images
        train += ["--subset", target / "subset.npy"]
    if row.clusters:
        network, clusters = "sdrnet.pt", target / "clusters.npy"
        if row.clusters.isdecimal():
            commands += [["cluster.py", "--features", base / "features.npy", "--out", target,
                          "--k", row.clusters, "--seed", job.seed]]
        else:
            clusters = save_clusters(job)
        train += ["--clusters", clusters]
    commands += [[*train, "--epochs", f"{epochs:g}"]]
    if job.name == "base":
        commands += [["cluster.py", "--out", target, "--data", images, "--seed", job.seed]]
    named = [part for task in tasks for part in ("--task", task)]
    return commands + [["route.py", "--out", target, "--network", target / network, "--data",
                        images, "--workers", 0, "--max-train", 100000, *named]]


def run_job(job, commit):
    """Runs a job's commands, output to <where>/<name>/log.txt; returns its line, a dict."""
    target, began = job.where / job.name, time.time()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for command in commands_of(job):
        command = [str(part) for part in command]
        print(f"  {command[0]} -> {target}/log.txt", flush=True)
        if command[0] in ("pretrain.py", "detect_voc.py"):
            training = " ".join(command).replace(f"{job.where}/", "")
        with open(target / "log.txt", "a") as log:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            raise sdrnet.InputError(f"{' '.join(command)} ended with {code}: see {target}/log.txt")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    line = {"pool": job.pool, "seed": job.seed, "row": job.name, "commit": commit,
            "torch": str(torch.__version__), "machine": platform.platform(), "command": training,
            "minutes": (time.time() - began) / 60, "cpu_minutes": used / 60}
    if job.row.backbone:
        metrics = json.loads((target / "detection/metrics.json").read_text())
        return line | {"tasks": {"scenes": {"largest": metrics["result"]["coco"]["AP"]}}}
    tasks = {task: read_result(target / task) for task in POOLS[job.pool].kind_of}
    line |= {"epochs": epochs_of(job), "images": images_of(job), "tasks": tasks}
    if job.row.clusters:
        line["clusters"] = describe_clusters(job, tasks)
        line["least_sub_std"] = min(log.get("sub_std", 9.0)
                                    for log in read_lines(target / "sdrnet.log.jsonl"))
    return line


def read_result(folder):
    """A task's result.json, with what the scores of all sub-nets say: a flat dict of floats."""
    result = json.loads((folder / "result.json").read_text())
    line = {"largest": result["largest"]["test"], "images": result["test_images"]}
    if "chosen" in result:
        scores, tests = np.load(folder / "scores.npy"), np.load(folder / "test_scores.npy")
        line |= {"routed": result["chosen"]["test"], "index": result["chosen"]["index"],
                 "mean": result["mean"]["test"], "best": result["best_by_test"]["test"],
                 "tests": [round(float(test), 2) for test in tests]}
        if scores.std() > 0 and tests.std() > 0:
            line["correlation"] = float(np.corrcoef(scores, tests)[0, 1])
    return line


def describe_clusters(job, tasks):
    """For each task the share of its chosen sub-net's images that are of the task's own kind."""
    own = job.where / job.name / "clusters.npy"
    clusters = np.load(own if own.exists() else job.where / "base/clusters.npy")
    kinds = kinds_of(job)
    shares = {"sizes": np.bincount(clusters, minlength=16).tolist()}
    for task, kind in POOLS[job.pool].kind_of.items():
        members = clusters == tasks[task]["index"]
        shares[task] = {"pool": float((kinds == kind).mean())}
        if members.any():
            shares[task]["chosen"] = float((kinds[members] == kind).mean())
    return shares


def read_lines(path):
    """The lines of a .jsonl, none where it is not there."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run(args):
    """Rows outside, seeds inside: what is cut is the tail of ROWS."""
    status = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True)
    commit, began, rows = status.stdout.strip() or "unknown", time.time(), rows_of(args.pool)
    for name in args.only or ():
        if name not in rows:
            raise sdrnet.InputError(f"--only {name}: the rows are {' '.join(rows)}")
    target = args.results / ("tried.jsonl" if args.tried else "claims.jsonl")
    jobs = {name: (row, "") for name, row in rows.items() if name in (args.only or rows)}
    if args.tried:
        name, _, options = args.tried.partition("=")
        if name in rows:
            raise sdrnet.InputError(f"--try {args.tried}: {name} is a row's name, take another")
        jobs = {"base": (rows["base"], ""), name: (rows[(args.only or ["sdr"])[0]], options)}
    for (name, (row, options)), seed in itertools.product(jobs.items(), args.seeds):
        key = {"pool": args.pool, "seed": seed, "row": name}
        if any(key.items() <= line.items() for line in read_lines(target)):
            continue
        if time.time() - began > 60 * args.budget_minutes:
            print(f"the budget is used; next is {key}: the same command goes on")
            return
        print(key, flush=True)
        where = args.work / args.pool / f"seed{seed}"
        line = run_job(Job(name, row, args.pool, seed, where, args.packs, options), commit)
        with open(target, "a") as file:
            file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------ what came out

class Lines:
    """The lines of a pool, by row and seed, and what is computed of them."""

    def __init__(self, lines, pool):
        self.pool, self.tuning = pool, POOLS[pool].tuning
        self.rows = {}
        for line in lines:
            if line["pool"] == pool:
                self.rows.setdefault(line["row"], {})[line["seed"]] = line

    def scores(self, row, key="routed", task=None):
        """{seed: percent on test images}, of a task or the mean of those that claims count. A
        network without sub-nets has `largest` alone, which is what stands for `routed` too."""
        found = {}
        for seed, line in sorted(self.rows.get(row, {}).items()):
            names = [task] if task else [t for t in line["tasks"] if t not in self.tuning]
            values = [line["tasks"][t].get(key, line["tasks"][t]["largest"]) for t in names]
            found[seed] = float(np.mean(values))
        return found

    def gains(self, row, other, key="routed", task=None):
        """Points of a row over another in the seeds that both have: a list."""
        ours, theirs = self.scores(row, key, task), self.scores(other, "routed", task)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def spread(values, sign=""):
    """"37.5 ± 1.6" of several, "37.5" of one, "" of none."""
    values = list(values)
    if not values:
        return ""
    text = f"{np.mean(values):{sign}.1f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.1f}"


def verdict(gains, of="seed"):
    """What seeds, or tasks, say of "is above": in words."""
    above = sum(gain > 0 for gain in gains)
    if not gains:
        return "not measured"
    if len(gains) == 1:
        return f"{'above' if above else 'below'}, in the one {of}"
    word = "in"
    if above in (0, len(gains)):
        word = "holds," if above else "does not hold,"
    return f"{word} {above} of {len(gains)} {of}s"


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


def core_table(data):
    """Every row of a pool that was run."""
    body = []
    for name, row in rows_of(data.pool).items():
        if name not in data.rows:
            continue
        lines, subnets = data.rows[name].values(), row.clusters is not None
        keys = ("routed", "largest", "mean", "best") if subnets else ("largest",)
        cells = [spread(data.scores(name, key).values()) for key in keys] + [""] * (4 - len(keys))
        comparable = subnets and row.epochs == (0, 1)
        other = [spread(data.gains(name, against), "+") for against in CURRENCIES if comparable]
        images = np.mean([line.get("images", 0) for line in lines]) / 1000
        cost = images * COST / IMAGES if subnets else images
        body.append([row.text, *cells, *(other or ["", "", ""]), len(lines), f"{images:,.0f}",
                     f"{cost:,.0f}"])
    return table(["row", "routed, or alone", "its largest", "mean sub-net", "best by test",
                  "- SimSiam, epochs", "images", "cost", "seeds", "1000 images", "cost"], body)


def task_table(data):
    """Each task: SimSiam in three currencies, its own kind alone, SDR, and where it was routed."""
    body = []
    for task, kind in POOLS[data.pool].kind_of.items():
        cells = [spread(data.scores(row, task=task).values()) for row in CURRENCIES]
        cells += [spread(data.scores(row, task=task).values())
                  for row in ("simsiam_third", f"only_{kind}")]
        cells += [spread(data.scores("sdr", key, task).values()) for key in ("routed", "largest")]
        shares = [line["clusters"][task] for line in data.rows.get("sdr", {}).values()]
        own = [100 * share.get("chosen", 0) for share in shares]
        body.append([task + " *" * (task in data.tuning), *cells,
                     spread(data.gains("sdr", "simsiam", task=task), "+"), spread(own)])
    return table(["task", *(f"SimSiam, {text}" for text in CURRENCIES.values()),
                  "... a third", "a third, on its kind alone", "SDR routed", "its largest",
                  "gain, equal epochs", "own kind in its cluster, %"], body)


def claims(data):
    """[(claim, what is measured, verdict), ...] of a pool."""
    kinds = {t: kind for t, kind in POOLS[data.pool].kind_of.items() if t not in data.tuning}
    runs = [(line["tasks"][t], line["clusters"][t])
            for line in data.rows.get("sdr", {}).values() for t in kinds]
    rows = []

    def claim(text, gains, of="seed"):
        rows.append((text, spread(gains, "+"), verdict(gains, of)))

    def each_task(row_of, against):
        gains = [data.gains(row_of(kind), against, task=t) for t, kind in kinds.items()]
        return [float(np.mean(values)) for values in gains if values]
    claim("1: a task's own kind alone teaches more than everything, at equal images",
          each_task("only_{}".format, "simsiam_third"), "task")
    for row, text in CURRENCIES.items():
        claim(f"2: SDR over SimSiam, {text}", data.gains("sdr", row))
    claim("2: its largest network over SimSiam, equal epochs",
          data.gains("sdr", "simsiam", "largest"))
    claim("3: on every task, equal epochs", each_task(lambda kind: "sdr", "simsiam"), "task")
    noise = [(one["mean"] * (100 - one["mean"]) / one["images"]) ** 0.5 for one, _ in runs]
    agree = spread(one.get("correlation", 0.0) * 100 for one, _ in runs)
    claim("4: sub-nets differ on a task: std of test scores, above noise; correlation of "
          f"leave-one-out and test scores, %: {agree}",
          [np.std(one["tests"]) - by_chance for (one, _), by_chance in zip(runs, noise)], "task")
    claim("5: the chosen cluster holds more of the task's kind than the pool, % points",
          [100 * (share.get("chosen", 0) - share["pool"]) for _, share in runs], "task")
    claim("6: SDR's sub-net detects better, AP", data.gains("detect_sdr", "detect_simsiam"))
    for row in ("no_kd", "l2", "shared_heads", "no_phases", "random", "one", "narrow"):
        claim(f"7: SDR over {ROWS[row].text}", data.gains("sdr", row))
    for row, text in (("one", "1"), ("k16", "16"), ("k81", "81")):
        claim(f"8: k = 256 over k = {text}", data.gains("k256", row))
    least = [line["least_sub_std"] for row in ("scratch", "scratch_no_phases")
             for line in data.rows.get(row, {}).values()]
    claim(f"9: from scratch, phases over none; least std {' '.join(f'{x:.2f}' for x in least)}",
          data.gains("scratch", "scratch_no_phases"))
    return rows


def bars(axes, data, against, rows):
    """Points of rows over another row, on each task; hatched what saw the task's own kind alone."""
    shown = [row for row in rows if data.gains(row, against)]
    kind_of, width = POOLS[data.pool].kind_of, 0.8 / max(1, len(shown))
    for i, row in enumerate(shown):
        gains = [np.mean(data.gains(row, against, task=task)) for task in kind_of]
        hatch = ["///" * (row == f"only_{kind}") for kind in kind_of.values()]
        colours = {"color": str(0.95 - 0.7 * i / len(shown)), "edgecolor": "black"}
        axes.bar(np.arange(len(gains)) + (i + 0.5) * width - 0.4, gains, width, hatch=hatch,
                 **colours)
        axes.bar(0, 0, **colours, label=rows_of(data.pool)[row].text)  # a key without a hatch
    if shown:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(f"points of kNN accuracy over\n{ROWS[against].text}")


def dots(axes, data):
    """All sub-nets of SDR's first seed on each task, the one that was chosen, and SimSiam."""
    marks = {"SDR, routed": ("*", "routed", "sdr"), "its largest network": ("_", "largest", "sdr"),
             "SimSiam, equal epochs": ("x", "largest", "simsiam"),
             "SimSiam, equal images": ("+", "largest", "simsiam_images")}
    for seed, line in sorted(data.rows.get("sdr", {}).items())[:1]:
        for i, task in enumerate(POOLS[data.pool].kind_of):
            tests = line["tasks"][task]["tests"]
            axes.scatter(np.linspace(i - 0.2, i + 0.2, len(tests)), tests, s=14, color="0.6",
                         label="a sub-net" if i == 0 else None)
            for text, (marker, key, row) in marks.items():
                score = data.scores(row, key, task).get(seed, np.nan)
                axes.scatter(i, score, s=110, marker=marker, color="black",
                             label=text if i == 0 else None)
        axes.set_ylabel(f"kNN accuracy on test images, %, seed {seed}")


def figures(data, results):
    """<pool>_transfer.png (claim 1), _gains.png (2, 7) and _subnets.png (3 to 5), of what was
    measured; one line where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figures: pip install matplotlib")
        return
    alone = [row for row in rows_of(data.pool) if row.startswith("only_")]
    controls = ["simsiam_images", "simsiam_cost", "random", "no_kd", "shared_heads", "no_phases"]
    plots = {"transfer": (bars, "simsiam_third", alone),
             "gains": (bars, "simsiam", [*controls, "sdr"]), "subnets": (dots,)}
    tasks = [task + " *" * (task in data.tuning) for task in POOLS[data.pool].kind_of]
    for name, (plot, *what) in plots.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        plot(axes, data, *what)
        if axes.has_data():
            axes.set_xticks(range(len(tasks)), tasks)
            figure.legend(loc="outside lower center", ncols=2)
            figure.savefig(results / f"{data.pool}_{name}.png", dpi=110)


def render(results):
    """claims.md and the figures from claims.jsonl."""
    lines, parts = read_lines(results / "claims.jsonl"), []
    for pool in POOLS:
        data = Lines(lines, pool)
        if not data.rows:
            continue
        commits = sorted({line["commit"] for line in lines if line["pool"] == pool})
        seeds = sorted({line["seed"] for line in lines if line["pool"] == pool})
        parts += [f"## {pool}\n", f"Seeds {seeds}; commits {', '.join(commits)}; kNN accuracy on "
                  "test images, %; tasks with * chose settings, and no mean counts them.\n",
                  table(["claim", "measured", "verdict"], claims(data)), core_table(data),
                  task_table(data)]
        figures(data, results)
    (results / "claims.md").write_text("# The claims, by tests/reproduce.py\n\n" + "\n".join(parts))


# ------------------------------------------------------------------------------------ command

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--pool", choices=sorted(POOLS), default="toy", help="which images: toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="3 4 5")
    parser.add_argument("--only", nargs="+", help="rows of the pool; default: all, in order")
    parser.add_argument("--tried", "--try", metavar="NAME=OPTIONS",
                        help="one setting: these options of pretrain.py on the row --only, or sdr")
    parser.add_argument("--packs", type=Path, default=Path("data"), help="image packs: data")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="runs/claims")
    parser.add_argument("--render", action="store_true", help="run nothing: tables and figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="tests/results")
    parser.add_argument("--budget-minutes", type=float, default=1e9,
                        help="start no row after so long")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.work, args.packs = args.work.resolve(), args.packs.resolve()
    try:
        if not args.render:
            run(args)
    except sdrnet.InputError as error:
        parser.error(str(error))
    render(args.results)


if __name__ == "__main__":
    main()
