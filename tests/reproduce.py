"""reproduce.py - the runs behind the paper's claims, by the scripts' own command lines.

    python tests/reproduce.py --pool toy --results runs/mine   # all rows, seeds 3 4 5: hours
    python tests/reproduce.py --pool toy --results runs/mine --seeds 3 --only base simsiam sdr
    python tests/reproduce.py --pool domains --packs PACKS --try mine="--lr 0.5"
    python tests/claims.py --results runs/mine                 # tables and figures

Pools: toy (drawn); domains (PACKS/domains, /tiny-imagenet, /tin_tasks: signs, sketches, cartoons,
hands, photographs); photographs (PACKS/tiny-imagenet, /tin_tasks). A row is one run of pretrain.py
and of route.py on all tasks of the pool; ROWS lists them, in the order in which they are run. All
rows of a seed go on from its row `base`, SimSiam from scratch, and its clusters, with views and
orders of epochs that `base` has not seen (its seed and 100). Boxes: toy scenes, or PACKS/bccd.

Currencies. What SDR is compared with is SimSiam, continued from the same `base` for
    epochs  as many images of the largest network as SDR's
    images  as many images as SDR forwards with gradient, through any network
    cost    as many images as take SDR's time; here an SDR step costs 4.7 SimSiam steps, views too

Resumable: a row whose line stands in <results>/claims.jsonl is not run again, an unfinished one
goes on from its last state in --work, and its minutes are the last piece's. --try writes to
<results>/tried.jsonl, on seeds 10 and 11: no claim counts these. A change of the method voids the
lines of the commits before it: remove them, and their folders in --work.
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
import pretrain                                        # after the lines that say where it is
import route
import sdrnet
import toy

# ------------------------------------------------------------------------------------ what is run

OPTIONS = ("--width 16 --no-small-stem --image-size 32 --head 512 --batch-size 64 "
           "--weight-decay 5e-4 --blur 0")             # pretrain.py's toy recipe, for every pool
IMAGES = 1 + 4 / 2 * 7 / 8                             # a step's, in B: 4 halves in 7 of 8
COST = 1 + 3.7 * 7 / 8                                 # and what it costs, in SimSiam steps
THIRD = (0, 1 / 3)                                     # epochs of claim 1's rows
ONE = 15                                               # path (1, 1, 1, 1) of g = 2
BYOL = "--objective byol"
CURRENCIES = {"simsiam": "equal epochs", "simsiam_images": "equal images",
              "simsiam_cost": "equal cost"}            # rows that SDR is compared with


class Pool(NamedTuple):
    """base, more: epochs of `base`, and of what goes on from it; lr: of rows from scratch and of
    claim 1's, which are short; of SimSiam, of SDR, and of SimSiam for longer than that, each the
    best, or level with that, of those tried; kind_of: task -> its images' kind; tuning: tasks that
    no claim counts."""
    base: float
    more: float
    lr: tuple
    kind_of: dict
    tuning: tuple = ()


POOLS = {
    "toy": Pool(20, 10, (0.24, 0.96, 0.96, 0.48),
                {"figures": "figures", "lands": "lands", "signs": "signs", "weaves": "weaves"}),
    "domains": Pool(6, 12, (0.24, 0.24, 0.48, 0.24),
                    {"signs": "signs", "sketch": "sketch", "cartoon": "cartoon", "hands": "hands",
                     "tin_mammals": "photos", "tin_vehicles": "photos", "tin_food": "photos"},
                    ("sketch", "hands", "tin_food")),
    "photographs": Pool(5, 6, (0.24, 0.24, 0.48, 0.24),     # as of domains
                        {"tin_mammals": "nature", "tin_arthropods": "nature", "tin_food": "nature",
                         "tin_vehicles": "artefacts", "tin_clothes": "artefacts",
                         "tin_places": "artefacts"},
                        ("tin_arthropods", "tin_food")),
}


class Row(NamedTuple):
    """epochs: of Pool.base, of Pool.more; start: the row whose network it starts from; clusters:
    balanced, or these renumbered at random, random (the same sizes), one (all images on sub-net
    ONE), or k; subset: a kind; backbone: the checkpoint that detects, toy scenes or blood cells,
    and nothing else is trained."""
    text: str
    epochs: tuple = (0, 1)
    clusters: str = None
    options: str = ""
    start: str = "base"
    subset: str = None
    backbone: str = None


ROWS = {
    "base": Row("SimSiam, where all go on from", (1, 0), start=None),
    "pixels": Row("No network: the pixels, each image less its mean", (0, 0), start=None),
    "simsiam": Row("SimSiam, equal epochs"),
    "sdr": Row("SDR", clusters="balanced"),
    "simsiam_images": Row("SimSiam, equal images", (0, IMAGES)),
    "simsiam_cost": Row("SimSiam, equal cost", (0, COST)),
    "no_kd": Row("SDR without SiamKD", clusters="balanced", options="--distill none"),
    "shared_heads": Row("SDR, one set of heads", clusters="balanced", options="--shared-heads"),
    "no_phases": Row("SDR without phases", clusters="balanced", options="--phases 0,0,0,0,1"),
    "random": Row("SDR, random clusters of the same sizes", clusters="random"),
    "batches": Row("One network, batches by cluster", clusters="balanced",
                   options="--shared 0.875 --shared-heads --distill none"),    # 15/16 of W_0
    "one": Row("SDR, one sub-net for all images", clusters="one"),
    "base_narrow": Row("SimSiam of the sub-net's width, where the next goes on from", (1, 0),
                       options="--width 12", start=None),
    "narrow": Row("SimSiam of the sub-net's width, equal images", (0, IMAGES),
                  options="--width 12", start="base_narrow"),
    "simsiam_third": Row("SimSiam on all, a third of the images", THIRD),
    "l2": Row("SDR, L2 in SiamKD's place", clusters="balanced", options="--distill l2"),
    "literal": Row("SDR, phases read literally", clusters="renumbered",
                   options="--phases-literal"),        # in tree order it would train one corner
    "k1": Row("SDR, k = 1, its sub-net of 5/8", clusters="one", options="--shared 0.25"),
    "k16": Row("SDR, k = 16, sub-nets of 5/8", clusters="balanced", options="--shared 0.25"),
    "k81": Row("SDR, k = 81, sub-nets of 5/8", clusters="81", options="--shared 0.4375"),
    "k256": Row("SDR, k = 256, sub-nets of 5/8", clusters="256", options="--shared 0.5"),
    "scratch": Row("SDR from scratch", (1, 1), clusters="balanced", start=None),
    "scratch_no_phases": Row("SDR from scratch, without phases", (1, 1), clusters="balanced",
                             options="--phases 0,0,0,0,1", start=None),
    "base_byol": Row("BYOL, where its rows go on from", (1, 0), options=BYOL, start=None),
    "byol": Row("BYOL, equal epochs", options=BYOL, start="base_byol"),
    "byol_images": Row("BYOL, equal images", (0, IMAGES), options=BYOL, start="base_byol"),
    "sdr_byol": Row("SDR on BYOL", clusters="balanced", options=BYOL, start="base_byol"),
    "simsiam_half": Row("SimSiam, half of the epochs", (0, 1 / 2)),
    "sdr_half": Row("SDR, half of the epochs", (0, 1 / 2), clusters="balanced"),
    "simsiam_double": Row("SimSiam, twice the epochs", (0, 2)),
    "sdr_double": Row("SDR, twice the epochs", (0, 2), clusters="balanced"),
    "simsiam_images_double": Row("SimSiam, as many images as SDR of these", (0, 2 * IMAGES)),
    "simsiam_long": Row("SimSiam, four times the epochs", (0, 4)),
    # These want rates of their own: the best of those tried on toy images, seed 10.
    "sdr_long": Row("SDR, four times the epochs", (0, 4), clusters="balanced",
                    options="--lr 0.48"),
    "simsiam_images_long": Row("SimSiam, as many images as SDR of these", (0, 4 * IMAGES),
                               options="--lr 0.24"),
    "random_long": Row("SDR, random clusters, four times the epochs", (0, 4), clusters="random",
                       options="--lr 0.48"),
    "detect_largest": Row("detection: SDR's largest network", backbone="sdr/sdrnet.pt"),
    "detect_simsiam": Row("detection: SimSiam, equal epochs", backbone="simsiam/simsiam.pt"),
    "detect_images": Row("detection: SimSiam, equal images", backbone="simsiam_images/simsiam.pt"),
}
FIGURES = {"detect_sdr": Row("detection: the sub-net of figures",
                             backbone="sdr/figures/subnet.pt")}        # which toy scenes are of


def rows_of(pool):
    """ROWS, and first the oracle: SimSiam on each kind of images alone, as many as on all."""
    rows = {"base": ROWS["base"], "simsiam_third": ROWS["simsiam_third"]}
    for kind in sorted(set(POOLS[pool].kind_of.values())):
        text = f"SimSiam on {kind} alone, a third of the images"
        rows[f"only_{kind}"] = Row(text, THIRD, subset=kind)
    return rows | ROWS | (FIGURES if pool == "toy" else {})


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
    for name in ("tiny-imagenet", "tin_tasks", *["domains"] * (job.pool == "domains")):
        if not (packs / name).is_dir():
            raise sdrnet.InputError(f"no {packs / name}: name the folder of image packs by --packs")
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


def images_of(job, command):
    """Images that pretrain.py's command line forwards with gradient, through any network."""
    args, a_step = pretrain.build_parser().parse_args(command[1:]), 1
    if args.clusters:
        split = 1 - args.phases[0] / sum(args.phases)
        of_subnets = args.subnets * (args.sub_batch or args.batch_size // 2)
        a_step += split * of_subnets / args.batch_size
    return a_step * epochs_of(job) * len(kinds_of(job))


def save_clusters(job):
    """The path of a row's clusters.npy: that of `base`, or one made from it and saved."""
    path = job.where / job.name / "clusters.npy"
    clusters = np.load(job.where / "base/clusters.npy")
    if job.row.clusters == "random":
        np.save(path, np.random.default_rng([job.seed, 9]).permutation(clusters))
    elif job.row.clusters == "renumbered":
        number = np.random.default_rng([job.seed, 9]).permutation(clusters.max() + 1)
        np.save(path, number[clusters])
    elif job.row.clusters == "one":
        np.save(path, np.full_like(clusters, ONE))
    else:
        path = job.where / "base/clusters.npy"
    return path


def commands_of(job):
    """The scripts' command lines of a job, as lists."""
    row, base, target = job.row, job.where / "base", job.where / job.name
    images, tasks = open_pool(job)
    target.mkdir(parents=True, exist_ok=True)
    if row.backbone:
        boxes = ([job.where / "toy/VOCdevkit"] if job.pool == "toy" else
                 [job.packs / "bccd/VOCdevkit", "--iterations", 250, "--test-side", 192])
        return [["detect_voc.py", "--voc", *boxes, "--train", "2007:trainval", "--recipe", "quick",
                 "--backbone", job.where / row.backbone, "--out", target, "--seed", job.seed,
                 "--workers", 0]]
    commands, epochs = [], epochs_of(job)
    rate, simsiam, sdr, longer = POOLS[job.pool].lr
    if row.start is not None and row.epochs != THIRD:
        rate = sdr if row.clusters else longer if row.epochs[1] > 1 else simsiam
    network = "byol.pt" if "byol" in row.options else "simsiam.pt"
    seed = job.seed + 100 * (row.start is not None)    # not again what `base` has seen
    train = ["pretrain.py", "--data", images, "--out", target, "--seed", seed, "--workers", 0,
             *OPTIONS.split(), "--lr", rate, *row.options.split(), *job.options.split(),
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


def score_pixels(job):
    """Each task's kNN accuracy by its images' pixels, at the networks' size, less their mean."""
    size, tasks = pretrain.RECIPES["toy"]["image_size"], {}
    for folder in open_pool(job)[1]:
        task = route.open_task(str(folder), size)
        parts = [torch.stack([part[i] for i in range(len(part))]).flatten(1).float()
                 for part in (task.train, task.test)]
        parts = [x - x.mean(1, keepdim=True) for x in parts]           # (N, 3 size^2)
        tasks[task.name] = {"largest": route.knn_accuracy(*parts, task)[1],
                            "images": len(task.test)}
    return tasks


def run_job(job, commit):
    """Runs a job's commands, output to <where>/<name>/log.txt; returns its line, a dict."""
    if job.name == "pixels":
        return {"pool": job.pool, "seed": job.seed, "row": job.name, "commit": commit,
                "tasks": score_pixels(job)}
    target, began = job.where / job.name, time.time()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for command in commands_of(job):
        command = [str(part) for part in command]
        print(f"  {command[0]} -> {target}/log.txt", flush=True)
        if command[0] in ("pretrain.py", "detect_voc.py"):
            training = command
        with open(target / "log.txt", "a") as log:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            raise sdrnet.InputError(f"{' '.join(command)} ended with {code}: see {target}/log.txt")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    line = {"pool": job.pool, "seed": job.seed, "row": job.name, "commit": commit,
            "torch": str(torch.__version__), "machine": platform.platform(),
            "bf16": sdrnet.has_bf16("cpu"), "command": shorten(training, job),
            "minutes": (time.time() - began) / 60, "cpu_minutes": used / 60}
    if job.row.backbone:
        metrics = json.loads((target / "detection/metrics.json").read_text())
        return line | {"tasks": {"scenes": {"largest": metrics["result"]["coco"]["AP"]}}}
    only = ONE if job.row.clusters == "one" else None
    tasks = {task: read_result(target / task, only) for task in POOLS[job.pool].kind_of}
    line |= {"epochs": epochs_of(job), "images": images_of(job, training), "tasks": tasks}
    if job.row.clusters:
        line["clusters"] = describe_clusters(job, tasks)
        line["sub_std"] = read_lines(target / "sdrnet.log.jsonl")[-1]["sub_std"]
    return line


def shorten(command, job):
    """A command line without the folders of this machine."""
    return " ".join(command).replace(f"{job.where}/", "").replace(str(job.packs), "PACKS")


def read_result(folder, only=None):
    """A task's result.json, with what the scores of all sub-nets say: a flat dict of floats. only:
    the one sub-net that was trained, None for all."""
    result = json.loads((folder / "result.json").read_text())
    line = {"largest": result["largest"]["test"], "images": result["test_images"]}
    if "chosen" in result:
        scores, tests = np.load(folder / "scores.npy"), np.load(folder / "test_scores.npy")
        index, routed = result["chosen"]["index"], result["chosen"]["test"]
        if only is not None:
            index, routed = only, float(tests[only])
            scores, tests = scores[[only]], tests[[only]]
        line |= {"routed": routed, "index": index, "mean": float(tests.mean()),
                 "best": float(tests.max()), "tests": [round(float(test), 2) for test in tests]}
        if scores.std() > 0 and tests.std() > 0:
            line["correlation"] = float(np.corrcoef(scores, tests)[0, 1])
    return line


def describe_clusters(job, tasks):
    """For each task the share of images of its own kind: in the pool; in the cluster of its chosen
    sub-net; in the cluster of an image of that kind, the mean over these, `pure`. And the share of
    clusters that hold more of it than the pool does, `above`."""
    path = job.where / job.name / "clusters.npy"
    clusters = np.load(path if path.exists() else job.where / "base/clusters.npy")
    kinds = kinds_of(job)
    sizes = np.bincount(clusters, minlength=16)
    shares = {"sizes": sizes.tolist()}
    for task, kind in POOLS[job.pool].kind_of.items():
        members = clusters == tasks[task]["index"]
        own = np.bincount(clusters[kinds == kind], minlength=len(sizes))
        pool = float((kinds == kind).mean())
        shares[task] = {"pool": pool, "above": float((own > pool * sizes).mean()),
                        "pure": float((own / own.sum() * own / sizes.clip(1)).sum())}
        if members.any():
            shares[task]["chosen"] = float((kinds[members] == kind).mean())
    return shares


def read_lines(path):
    """The lines of a .jsonl, none where it is not there."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def run(args):
    """Rows outside, seeds inside: what is cut is the tail of ROWS."""
    args.results.mkdir(parents=True, exist_ok=True)
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
        like, *others = args.only or ["sdr"]
        if name in rows or others:
            raise sdrnet.InputError(f"--try {args.tried}: a name of its own is needed, no row's, "
                                    "and one row with --only that it is like")
        start = rows[like].start or like
        jobs = {start: (rows[start], ""), name: (rows[like], options)}
    for (name, (row, options)), seed in itertools.product(jobs.items(), args.seeds):
        key = {"pool": args.pool, "seed": seed, "row": name}
        if options:
            key["options"] = options
        if any(key.items() <= line.items() for line in read_lines(target)):
            continue
        if time.time() - began > 60 * args.budget_minutes:
            print(f"the budget is used; next is {key}: the same command goes on")
            return
        print(key, flush=True)
        where = args.work / args.pool / f"seed{seed}"
        needed = row.start or ("base" if row.clusters else None)
        if needed and not (where / needed / "images.txt").exists():
            raise sdrnet.InputError(f"row {name} goes on from {needed}, which is not in {where}: "
                                    f"run it first, --only {needed}, with --results of your own")
        line = run_job(Job(name, row, args.pool, seed, where, args.packs, options), commit)
        with open(target, "a") as file:
            file.write(json.dumps(key | line) + "\n")


# ------------------------------------------------------------------------------------ command

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--pool", choices=sorted(POOLS), default="toy", help="which images: toy")
    parser.add_argument("--seeds", type=int, nargs="+", help="3 4 5; with --try 10 11")
    parser.add_argument("--only", nargs="+", help="rows of the pool; default: all, in order")
    parser.add_argument("--tried", "--try", metavar="NAME=OPTIONS",
                        help="one setting: these options of pretrain.py on the row --only, or sdr")
    parser.add_argument("--packs", type=Path, default=Path("data"), help="image packs: data")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="runs/claims")
    parser.add_argument("--results", type=Path, default=RESULTS, help="tests/results")
    parser.add_argument("--budget-minutes", type=float, default=1e9, help="start no row after")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.seeds = args.seeds or ([10, 11] if args.tried else [3, 4, 5])
    args.work, args.packs = args.work.resolve(), args.packs.resolve()
    try:
        run(args)
    except sdrnet.InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
