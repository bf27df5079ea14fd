"""reproduce.py - the paper's nine claims in miniature, with the controls it lacks, and SDR beside its neighbours.

    python tests/reproduce.py                                    # toy images, seeds 0 1 2
    python tests/reproduce.py --data PACKS --seeds 0 1           # photographs; PACKS holds tiny-imagenet/, tin_tasks/, ...
    python tests/reproduce.py --only 2 7 --budget-minutes 60     # some claims; no run starts after an hour
    python tests/reproduce.py --only neighbours                  # SEPT, DATA, BYOL and SDR on equal terms
    python tests/reproduce.py --render                           # tables and figures from the lines alone

Every experiment is run through the scripts, by their command lines. A finished one is a line of
tests/results/<toy|real>.jsonl (what was run, images seen, seconds, every score, machine, versions); it is not run again,
and an interrupted one continues, so the whole can be spread over days. Several processes may share the work: give each
its own --seeds. Two invocations never run the same experiment if their seeds differ.

Protocol. A SimSiam run of each seed is the START of all others. From it, every variant sees the same number of images
(images forwarded with gradient through any network, each draw counted for each network). A sub-net is chosen by
leave-one-out kNN (k = 20) on a task's training images; all figures are kNN percent on its test images; gains are paired
per task. Real images: four tasks served for tuning, six are reported. The neighbours are compared on three of these, by
kNN and by linear probe; SEPT trains a network for each of them, so sees that many times the images.

Out: tests/results/<toy|real>.jsonl, .md (the tables), .tasks.png, .variants.png, .histogram.png; --readme puts the
tables into README.md between its markers.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import pretrain
import route
import sdrnet

# ---------------------------------------------------------------------------- what is run
# start, rest: SimSiam's epochs of the start, and of everything after it (what a variant's images add up to).
# sdr: the settings found best on the tuning tasks; each variant changes what its list says (later options win).

SCALES = {
    "toy": dict(
        data=[], network=["--width", "16"], start=40, rest=20, start_options=["--lr", "0.06", "--batch-size", "64"],
        rest_options=["--lr", "0.04", "--batch-size", "64"],
        sdr=["--lr", "0.04", "--batch-size", "64", "--sub-batch", "192", "--subnets", "2", "--shared", "0.75", "--shared-grad", "--distill", "none", "--phases", "0,0,0,0,1"]),
    "real": dict(
        data=["--data", "{packs}/tiny-imagenet/images"], network=["--width", "16", "--no-small-stem", "--image-size", "32", "--head", "512"], start=10, rest=6,
        start_options=["--lr", "0.06", "--batch-size", "64"], rest_options=["--lr", "0.04", "--batch-size", "64"],
        sdr=["--lr", "0.04", "--batch-size", "64", "--sub-batch", "192", "--subnets", "2", "--shared", "0.75", "--shared-grad", "--distill", "none", "--phases", "0,0,0,0,1"]),
}
VARIANTS = {                                           # name: (claims it serves, changed options)
    "SDR": ((2, 3, 4, 5, 6, 7, 8), []),
    "SDR, random clusters": ((2, 7), []),              # the same sizes: is it the semantics, or the best of many?
    "with phases": ((7, 9), ["--phases", "1,1,1,1,4"]),
    "with SiamKD": ((7,), ["--distill", "siamkd"]),
    "with L2 distillation": ((7,), ["--distill", "l2"]),
    "with phases and SiamKD": ((7, 9), ["--phases", "1,1,1,1,4", "--distill", "siamkd"]),
    "own groups only": ((7,), ["--no-shared-grad"]),
    "half-size shared groups": ((7,), ["--shared", "0.5"]),
    "81 sub-nets": ((8,), []),
    "256 sub-nets": ((8,), []),
}
CLUSTERS = {"81 sub-nets": 81, "256 sub-nets": 256}
TUNING = ("tin_mammals", "tin_vehicles", "tin_food", "clothing10")
REPORTED = ("tin_arthropods", "tin_clothes", "tin_places", "cifar10", "caltech101", "dtd10")
BUDGET = {"toy": 1024, "real": 8000}                   # K of SEPT and of the random subset
FINE, GENERIC = ("tin_arthropods", "tin_clothes", "tin_places"), ("cifar10", "caltech101", "dtd10")
TARGETS = {"toy": ("toy:shapes", "toy:weaves", "toy:lands"), "real": FINE}     # the neighbours' tasks


class Failed(Exception):
    pass


def script(name, *arguments, log):
    """Runs one of the scripts like a user, its output in a log; raises Failed with its last line."""
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, os.path.join(ROOT, name), *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = open(log, errors="replace").read().strip().splitlines() or ["no output"]
        raise Failed(f"{name} ended with status {code}: {lines[-1]} (see {log})")


class Experiments:
    """All runs of one seed. A run: name -> line of results; `want` runs it unless its line exists."""

    def __init__(self, args, seed):
        self.args, self.seed, self.kind = args, seed, "toy" if args.data == "toy" else "real"
        self.scale = SCALES[self.kind]
        self.data = [a.format(packs=args.data) for a in self.scale["data"]] + ["--seed", seed]
        self.common = ["--device", args.device]          # of every script
        self.work = os.path.join(args.out, self.kind, str(seed))
        os.makedirs(self.work, exist_ok=True)
        place = lambda names: [os.path.join(args.data, *(["tin_tasks"] if t.startswith("tin_") else []), t) for t in names]
        self.tasks = ["toy"] if self.kind == "toy" else place(TUNING + REPORTED)
        self.targets = TARGETS["toy"] if self.kind == "toy" else place(TARGETS["real"])

    def folder(self, name):
        path = os.path.join(self.work, re.sub(r"\W+", "_", name))
        os.makedirs(path, exist_ok=True)
        return path

    def shown(self, *words):
        """A command without this machine's folders."""
        return " ".join(map(str, words)).replace(self.args.out, "OUT").replace(self.args.data, "PACKS" if self.kind == "real" else "toy")

    def pretrain(self, name, *options):
        """Trains into the run's folder; returns the checkpoint and what it says of its origin."""
        folder = self.folder(name)
        options = [*self.data, *self.scale["network"], *options, "--out", folder, *self.common]
        script("pretrain.py", *options, log=os.path.join(folder, "log"))
        path = os.path.join(folder, "sdrnet.pt" if "--clusters" in options else "datanet.pt" if "--sizes" in options else "byol.pt" if "byol" in options else "simsiam.pt")
        origin = sdrnet.load(path)["origin"]
        return path, {"command": self.shown("pretrain.py", *options), "images_seen": origin["images_seen"], "seconds": round(origin["seconds"], 1)}

    def start(self):
        return self.pretrain("start", "--epochs", self.scale["start"], *self.scale["start_options"])

    def features(self, path, task):
        """Of a network file: a task's training and test features, and its GFLOPs an image."""
        device = torch.device("cuda" if self.args.device != "cpu" and torch.cuda.is_available() else "cpu")
        content = sdrnet.load(path)
        net, size = sdrnet.network(content, path).eval(), content["config"]["image_size"]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, size, size))
        net.to(device, memory_format=torch.channels_last)
        return [pretrain.embed(net, part.pack(), size=size, device=device, workers=0) for part in (task.train, task.test)], counter.get_total_flops() / 1e9

    def score_plain(self, path):
        """{task: kNN percent on test images} of a simsiam.pt."""
        return {task.name: {"simsiam": pretrain.knn_score(*self.features(path, task)[0], task)} for task in pretrain.open_tasks(self.tasks, self.seed)}

    def judged(self, network):
        """{task: kNN and linear probe, percent on test images, and GFLOPs} of network(task), a checkpoint for each target."""
        scores = {}
        for task in pretrain.open_tasks(self.targets, self.seed):
            (train, test), gflops = self.features(network(task.name), task)
            scores[task.name] = {"knn": pretrain.knn_score(train, test, task), "probe": route.probe(train, test, task)[0], "gflops": gflops}
        return scores

    def simsiam(self, name, *options, epochs=None, start=True):
        path, line = self.rest(name, *options, epochs=epochs, start=start)
        return {**line, "tasks": self.score_plain(path)}

    def rest(self, name, *options, epochs=None, start=True):
        """One network trained after the start, from it unless the options say from where."""
        begin = ["--init", self.start()[0]] if start else []
        return self.pretrain(name, "--epochs", epochs or self.scale["rest"], *self.scale["rest_options"], *begin, *options)

    def clusters(self, k, shuffled=False):
        """clusters.npy of the start's features; shuffled: the same sizes, at random."""
        folder, path = self.folder(f"clusters {k}"), None
        if not os.path.exists(os.path.join(folder, "clusters.npy")):
            script("cluster.py", *self.data, "--checkpoint", self.start()[0], "--k", k, "--out", folder, *self.common, log=os.path.join(folder, "log"))
        path = os.path.join(folder, "clusters.npy")
        if not shuffled:
            return path
        other = self.folder(f"random clusters {k}")
        np.save(os.path.join(other, "clusters.npy"), np.random.default_rng(self.seed).permutation(np.load(path)))
        with open(os.path.join(folder, "clusters.json")) as a, open(os.path.join(other, "clusters.json"), "w") as b:
            b.write(a.read())
        return os.path.join(other, "clusters.npy")

    def sdr(self, name, changes):
        k = CLUSTERS.get(name, 16)
        clusters = self.clusters(k, shuffled="random" in name)
        options = self.scale["sdr"] + changes
        value = lambda key: options[len(options) - 1 - options[::-1].index(key) + 1]
        phases = [float(p) for p in value("--phases").split(",")]
        sub = (1 - phases[0] / sum(phases)) * int(value("--sub-batch")) / int(value("--batch-size"))      # sub-nets' images per image of W_0
        epochs = round(self.scale["rest"] / (1 + sub), 4)
        path, line = self.pretrain(name, "--init", self.start()[0], "--clusters", clusters, "--epochs", epochs, *options)
        folder = os.path.dirname(path)
        script("route.py", "--out", folder, *self.common, "--seed", self.seed, *(a for t in self.tasks for a in ("--task", t)), log=os.path.join(folder, "route.log"))
        tasks, assigned = {}, np.load(clusters)
        for task in [e.name for e in os.scandir(folder) if e.is_dir()]:
            result = json.load(open(os.path.join(folder, task, "result.json")))
            tests = np.load(os.path.join(folder, task, "test_scores.npy"))
            tasks[task] = {"routed": result["chosen"]["test"], "largest": result["largest"]["test"], "chance": float(tests.mean()), "best": float(tests.max()),
                           "chosen": result["chosen"]["index"], "scores": [round(float(t), 2) for t in tests]}
            tasks[task]["match"] = self.match(task, assigned == result["chosen"]["index"])
        with open(os.path.join(folder, "sdrnet.log.jsonl")) as file:
            lows = [line["std_sub"] for line in map(json.loads, file) if "std_sub" in line]
        return {**line, "tasks": tasks, "lowest_std": min(lows), "last_std": float(np.mean(lows[-len(lows) // 10:]))}

    def match(self, task, members):
        """[share of the chosen cluster's images that are of the task's kind, the same of all images], for toy images."""
        if self.kind != "toy":
            return None
        world = np.arange(len(members)) % 4 == pretrain.TOY_WORLDS.index(task.removeprefix("toy-"))
        return [float(world[members].mean()), float(world.mean())]

    def half(self, which):
        """SimSiam continued on one half of the classes: worlds 0 and 1 or 2 and 3; nature or artefacts."""
        if self.kind == "toy":
            count = pretrain.TOY_IMAGES
            chosen = np.flatnonzero(np.isin(np.arange(count) % 4, [[0, 1], [2, 3]][which]))
        else:
            pool = os.path.join(self.args.data, "tiny-imagenet")
            kinds = set(open(os.path.join(pool, ("half_nature.txt", "half_artefacts.txt")[which])).read().split())
            listing = pretrain.folder_listing(os.path.join(pool, "images"))
            chosen = np.array([i for i, name in enumerate(listing.names) if os.path.relpath(name, os.path.join(pool, "images")).split(os.sep)[0] in kinds])
            count = len(listing)
        path = os.path.join(self.work, f"half{which}.npy")
        np.save(path, chosen)
        return self.simsiam(f"half {'AB'[which]}", "--subset", path, epochs=round(self.scale["rest"] * count / len(chosen), 4))

    def narrow(self):
        """A network of the sub-nets' width, trained alone on everything, on the start's images and the rest."""
        net = sdrnet.load_network(os.path.join(self.folder("SDR"), "sdrnet.pt"))
        width = round(net.config["width"] * net.sub_features / net.features)
        start, _ = self.pretrain("narrow start", "--epochs", self.scale["start"], *self.scale["start_options"], "--width", width)
        return self.simsiam("narrow", "--width", width, "--init", start, start=False)

    def subset(self, name, *options):
        """SimSiam continued on K of the images, on as many draws as on all of them."""
        return self.rest(name, *options, epochs=round(self.scale["rest"] * self.pool / BUDGET[self.kind], 4))

    @property
    def pool(self):
        """How many images there are to learn from."""
        return sdrnet.load(self.start()[0])["origin"]["images_seen"] // self.scale["start"]

    def alone(self, name, *options):
        """One network on all images: SimSiam or BYOL continued."""
        path, line = self.rest(name, *options)
        return {**line, "judged": self.judged(lambda task: path)}

    def random_subset(self):
        path = os.path.join(self.work, "random_subset.npy")
        np.save(path, np.sort(np.random.default_rng(self.seed).permutation(self.pool)[:BUDGET[self.kind]]))
        path, line = self.subset("random subset", "--subset", path)
        return {**line, "judged": self.judged(lambda task: path)}

    def sept(self):
        """For each target its own subset and its own network."""
        paths, lines, beside = {}, [], 0.0
        for target in self.targets:
            name, folder = os.path.basename(target).replace(":", "-"), self.folder(f"SEPT {os.path.basename(target)}")
            began = time.time()
            script("cluster.py", *self.data, "--checkpoint", self.start()[0], "--retrieve", target, "--budget", BUDGET[self.kind], "--drop-duplicates", "--out", folder, *self.common, log=os.path.join(folder, "log"))
            beside += time.time() - began
            paths[name], line = self.subset(os.path.basename(folder), "--subset", os.path.join(folder, "subset.npy"))
            lines.append(line)
        return {"command": lines[0]["command"], "images_seen": sum(line["images_seen"] for line in lines), "seconds": sum(line["seconds"] for line in lines), "beside": round(beside, 1),
                "judged": self.judged(paths.get)}

    def routed(self, name, changes):
        """SDR: the sub-net of each target, and the largest network."""
        line, folder = self.sdr(name, changes), self.folder(name)
        beside = sum(json.load(open(os.path.join(folder, task, "result.json")))["seconds"] for task in line["tasks"])
        return {**{k: line[k] for k in ("command", "images_seen", "seconds")}, "beside": round(beside * len(self.targets) / len(line["tasks"]), 1),
                "judged": self.judged(lambda task: os.path.join(folder, task, "subnet.pt")), "largest": self.judged(lambda task: os.path.join(folder, "sdrnet.pt"))}

    def data_sizes(self):
        """DATA: nested sizes (three networks see each batch); for each task the pick at half of the largest one's FLOPs."""
        path, line = self.rest("DATA", "--sizes", "1,4", epochs=round(self.scale["rest"] / 3, 4))
        net, folder, began = sdrnet.load_network(path), os.path.dirname(path), time.time()
        most = route.flops_of_sizes(net, sdrnet.load(path)["config"]["image_size"])(tuple(choices[-1] for choices in net.sizes())) / 1e9
        script("route.py", "--out", folder, "--checkpoint", path, "--budget-gflops", 0, most / 2, *self.common, "--seed", self.seed,
               *(a for t in self.tasks for a in ("--task", t)), log=os.path.join(folder, "route.log"))
        beside, search = time.time() - began, {}
        for task in pretrain.open_tasks(self.tasks, self.seed):
            result = json.load(open(os.path.join(folder, task.name, "sizes", "result.json")))
            search[task.name] = {"largest": result["largest"]["test"], "images": [len(task.train), len(task.test)],
                                 **{name: [s[k] for s in result["sampled"]] for name, k in (("similarities", "similarity"), ("trains", "train"), ("tests", "test"))}}
        return {**line, "beside": round(beside * len(self.targets) / len(search), 1), "judged": self.judged(lambda task: os.path.join(folder, task, "sizes", "subnet.pt")), "search": search}

    def detection(self, name):
        """Average precision on the toy scenes, from the sub-net routed for toy-shapes or from SimSiam continued."""
        folder = self.folder(f"detection {name}")
        source = ["--backbone", os.path.join(self.folder("SDR"), "toy-shapes", "subnet.pt")] if name == "routed" else ["--backbone", os.path.join(self.folder("SimSiam continued"), "simsiam.pt")]
        began = time.time()
        script("detect_voc.py", *source, "--out", folder, "--seed", self.seed, *self.common, log=os.path.join(folder, "log"))
        metrics = json.load(open(os.path.join(folder, "metrics.json")))
        return {"command": self.shown("detect_voc.py", *source), "seconds": round(time.time() - began, 1), "metrics": {"coco": {k: metrics["coco"][k] for k in ("AP", "AP50", "AP75")}}, "images_seen": 0}

    def plan(self):
        """[(name, claims, function)] in order of worth."""
        runs = [("SimSiam continued", (1, 2, 3, 6, 7, 8), lambda: self.simsiam("SimSiam continued"))]
        runs += [(name, claims, lambda name=name, changes=changes: self.sdr(name, changes)) for name, (claims, changes) in list(VARIANTS.items())[:2]]
        runs += [("narrow", (2, 8), self.narrow)]
        runs += [(f"half {'AB'[w]}", (1,), lambda w=w: self.half(w)) for w in (0, 1)]
        runs += [(name, claims, lambda name=name, changes=changes: self.sdr(name, changes)) for name, (claims, changes) in list(VARIANTS.items())[2:]]
        if self.kind == "toy":
            runs += [(f"detection {n}", (6,), lambda n=n: self.detection(n)) for n in ("routed", "SimSiam")]
        neighbours = {"SimSiam, all images": lambda: self.alone("SimSiam continued"), "SimSiam, random subset": self.random_subset, "SEPT": self.sept,
                      "SDR over SimSiam": lambda: self.routed("SDR", []), "DATA, half of the FLOPs": self.data_sizes,
                      "BYOL, all images": lambda: self.alone("BYOL continued", "--objective", "byol"), "SDR over BYOL": lambda: self.routed("SDR over BYOL", ["--objective", "byol"])}
        return runs + [(f"neighbours: {name}", ("neighbours",), function) for name, function in neighbours.items()]


def read(path):
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def machine(device):
    flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    cpu = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None
    return {"device": gpu or f"{cpu}, {torch.get_num_threads()} thread(s)", "torch": str(torch.__version__), "python": platform.python_version()}


def run_all(args, results):
    began = time.time()
    for seed in args.seeds:
        experiments = Experiments(args, seed)
        for name, claims, function in experiments.plan():
            if args.only and not set(args.only) & set(claims) or any(r["run"] == name and r["seed"] == seed for r in read(results)):
                continue
            if args.budget_minutes and time.time() - began > 60 * args.budget_minutes:
                print(f"{args.budget_minutes:g} minutes are over; the same command continues", flush=True)
                return
            print(f"{time.strftime('%H:%M:%S')} seed {seed}: {name} ...", flush=True)
            line = {"run": name, "seed": seed, **function(), **machine(args.device)}
            with open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
            print("  " + brief(line), flush=True)


def brief(line):
    if "judged" in line:
        return ", ".join(f"{task} kNN {v['knn']:.2f} probe {v['probe']:.2f}" for task, v in line["judged"].items())
    if "metrics" in line:
        return "AP {AP:.1f}, AP50 {AP50:.1f}".format(**ap(line))
    return ", ".join(f"{key} {mean_of(line, key):.2f}" for key in ("simsiam", "routed", "largest", "chance", "best") if key in next(iter(line["tasks"].values())))


def ap(line):
    """COCO's figures out of metrics.json: {AP, AP50, AP75}."""
    return line["metrics"]["coco"]


# ---------------------------------------------------------------------------- what it says

def mean_of(line, key, tasks=None):
    return float(np.mean([scores[key] for task, scores in line["tasks"].items() if tasks is None or task in tasks]))


class Findings:
    """The lines as figures: per seed, over the reported tasks."""

    def __init__(self, lines, kind):
        self.lines, self.kind = {(r["run"], r["seed"]): r for r in lines}, kind
        self.tasks = None if kind == "toy" else REPORTED

    def seeds(self, *runs):
        return sorted({s for _, s in self.lines if all((r, s) in self.lines for r in runs)})

    def figures(self, run, key, tasks=None):
        return np.array([mean_of(self.lines[run, s], key, tasks or self.tasks) for s in self.seeds(run)])

    def gains(self, run, key, base="SimSiam continued", base_key="simsiam", tasks=None):
        """Paired: one mean over tasks a seed."""
        return np.array([mean_of(self.lines[run, s], key, tasks or self.tasks) - mean_of(self.lines[base, s], base_key, tasks or self.tasks) for s in self.seeds(run, base)])

    def per_task(self, run="SDR", key="routed"):
        """{task: gains over SimSiam continued, one a seed}"""
        names = sorted(next(iter(self.lines[run, s]["tasks"] for s in self.seeds(run))))
        return {t: np.array([self.lines[run, s]["tasks"][t][key] - self.lines["SimSiam continued", s]["tasks"][t]["simsiam"] for s in self.seeds(run, "SimSiam continued")]) for t in names}


def pm(values, sign=False):
    values = np.atleast_1d(values)
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():{'+' if sign else ''}.2f}{spread}"


def claims(f):
    """[(number, claim, paper's figure, ours, verdict)]: what the lines at hand can say. A gain "holds" if it is positive in
    every seed."""
    rows, have = [], lambda *runs: bool(f.seeds(*runs))

    def say(n, claim, paper, ours, holds):
        share = np.mean(np.atleast_1d(holds))
        rows.append((n, claim, paper, ours, "holds" if share == 1 else "does not hold" if share == 0 else f"in {np.sum(holds)} of {np.size(holds)} seeds"))
    reported = lambda scores: [t for t in scores if f.tasks is None or t in f.tasks]
    if have("half A", "half B", "SimSiam continued"):
        wins = np.zeros(3)
        for s in f.seeds("half A", "half B", "SimSiam continued"):
            parts = [f.lines[r, s]["tasks"] for r in ("half A", "half B", "SimSiam continued")]
            for t in reported(parts[0]):
                wins[int(np.argmax([p[t]["simsiam"] for p in parts]))] += 1
        say(1, "each half of the images, and all of them, is best for some tasks", "5 of 11 prefer all", f"A wins {wins[0]:.0f}, B {wins[1]:.0f}, all {wins[2]:.0f} of {wins.sum():.0f} (tasks x seeds)", wins[2] < wins.sum())
    if have("SDR", "SimSiam continued"):
        gain, tasks = f.gains("SDR", "routed"), {t: g for t, g in f.per_task().items() if f.tasks is None or t in f.tasks}
        say(2, "SDR beats SimSiam on the average of the tasks", "+2.38", pm(gain, True), gain > 0)
        say(2, "... on every task", "11 of 11", f"{sum(g.mean() > 0 for g in tasks.values())} of {len(tasks)}", all(g.mean() > 0 for g in tasks.values()))
        controls = {"its own largest network": ("SDR", "largest"), "chance: the mean sub-net": ("SDR", "chance"), "random clusters": ("SDR, random clusters", "routed"), "the sub-net's width alone": ("narrow", "simsiam")}
        for name, (run, key) in controls.items():
            if have("SDR", run):
                gain = f.gains("SDR", "routed", run, key)
                say(2, f"... above the control: {name}", "not given", pm(gain, True), gain > 0)
        if f.kind == "real":
            fine, generic = f.gains("SDR", "routed", tasks=FINE), f.gains("SDR", "routed", tasks=GENERIC)
            say(3, "tasks of narrow kinds gain more than generic ones", "Aircraft, Cars, Flowers most", f"{pm(fine, True)} against {pm(generic, True)}", fine > generic)
        spreads = np.array([np.mean([np.ptp(v["scores"]) for v in f.lines["SDR", s]["tasks"].values()]) for s in f.seeds("SDR")])
        say(4, "sub-nets differ a lot on one task (best - worst, points)", "a wide histogram", pm(spreads), spreads > 5)
        if f.kind == "toy":
            shares = np.array([[v["match"] for v in f.lines["SDR", s]["tasks"].values()] for s in f.seeds("SDR")])
            say(5, "the chosen sub-net was trained on images of the task's kind", "by example", f"{pm(100 * shares[..., 0].mean(1))} % of them, of all images {100 * shares[..., 1].mean():.0f} %", shares[..., 0].mean(1) > 2 * shares[..., 1].mean(1))
    if have("detection routed", "detection SimSiam"):
        gain = np.array([ap(f.lines["detection routed", s])["AP"] - ap(f.lines["detection SimSiam", s])["AP"] for s in f.seeds("detection routed", "detection SimSiam")])
        say(6, "detection gains with the routed, smaller network (AP)", "+1.48", pm(gain, True), gain > 0)
    for name, text, paper in (("SDR, random clusters", "semantic clusters help", "not given"), ("with SiamKD", "SiamKD helps", "yes"), ("with phases", "phases help", "yes")):
        if have("SDR", name):
            gain = f.gains(name, "routed", "SDR", "routed") * (-1 if "random" in name else 1)
            say(7, text, paper, pm(gain, True), gain > 0)
    if have("with SiamKD", "with L2 distillation"):
        gain = f.gains("with SiamKD", "routed", "with L2 distillation", "routed")
        say(7, "SiamKD is better than L2", "yes", pm(gain, True), gain > 0)
    counts = [(n, r, k) for n, r, k in ((1, "narrow", "simsiam"), (16, "SDR", "routed"), (81, "81 sub-nets", "routed"), (256, "256 sub-nets", "routed")) if have(r)]
    if len(counts) > 2 and have(*(r for _, r, _ in counts)):
        common = f.seeds(*(r for _, r, _ in counts))
        means = [np.mean([mean_of(f.lines[r, s], k, f.tasks) for s in common]) for _, r, k in counts]
        say(8, "more sub-nets, better average", "yes", ", ".join(f"{n}: {m:.2f}" for (n, _, _), m in zip(counts, means)) + f" ({len(common)} seed(s))", all(a < b for a, b in zip(means, means[1:])))
    if have("SDR", "with phases"):
        low = [np.array([f.lines[r, s]["last_std"] for s in f.seeds(r)]) for r in ("SDR", "with phases")]
        say(9, "without phases it collapses (lowest std · √d of a sub-net in the last tenth; 0 is collapse)", "yes", f"without {pm(low[0])}, with {pm(low[1])}", low[0].mean() < 0.3 < low[1].mean())
    return rows


def tables(f, lines):
    """Markdown: claims, then every variant, then the neighbours."""
    out = ["| # | claim | paper | here (mean ± std over seeds) | |", "|---|---|---|---|---|"]
    out += [f"| {n} | {c} | {p} | {o} | {'**holds**' if v == 'holds' else v} |" for n, c, p, o, v in claims(f)]
    out += ["", "| variant, kNN % | routed or alone | largest network | mean sub-net | gain over SimSiam continued | seeds | images seen | seconds |", "|---|---|---|---|---|---|---|---|"]
    for run in dict.fromkeys(r["run"] for r in lines if "tasks" in r):
        seeds, plain = f.seeds(run), "simsiam" in next(iter(f.lines[run, f.seeds(run)[0]]["tasks"].values()))
        of = lambda key: pm(f.figures(run, key))
        cells = [of("simsiam"), "", ""] if plain else [of("routed"), of("largest"), of("chance")]
        gain = pm(f.gains(run, "simsiam" if plain else "routed"), True) if f.seeds(run, "SimSiam continued") and run != "SimSiam continued" else ""
        out.append(f"| {run} | {' | '.join(cells)} | {gain} | {len(seeds)} | {f.lines[run, seeds[0]]['images_seen']:,} | {np.mean([f.lines[run, s]['seconds'] for s in seeds]):.0f} |")
    per = {t: g for t, g in f.per_task().items()} if f.seeds("SDR", "SimSiam continued") else {}
    if per:
        out += ["", "| task | SimSiam continued | SDR, routed | gain |", "|---|---|---|---|"]
        for t, g in per.items():
            value = lambda run, key: pm(np.array([f.lines[run, s]["tasks"][t][key] for s in f.seeds("SDR", "SimSiam continued")]))
            out.append(f"| {t}{' (tuning)' if t in TUNING else ''} | {value('SimSiam continued', 'simsiam')} | {value('SDR', 'routed')} | {pm(g, True)} |")
    out += neighbours([r for r in lines if "judged" in r])
    where = sorted({f"{r['device']}, torch {r['torch']}" for r in lines})
    return "\n".join(out + ["", f"Machine: {'; '.join(where)}. {len(lines)} runs, {sum(r['seconds'] for r in lines) / 60:.0f} minutes of training. Images seen and seconds do not count "
                            "the start, which all variants share (narrow has its own)."])


def neighbours(lines):
    """Markdown: SDR beside SEPT, DATA and BYOL, every seed's mean; then DATA's search."""
    rows, names = {}, sorted({task for line in lines for task in line["judged"]})
    for line in lines:
        name = line["run"].removeprefix("neighbours: ")
        rows.setdefault(name, []).append((line, line["judged"]))
        if "largest" in line:
            rows.setdefault(f"{name}: its largest network", []).append((line, line["largest"]))
    if not rows:
        return []
    out = ["", f"| neighbours | {' | '.join(names)} | mean kNN | mean probe | images seen | seconds: training, beside | GFLOPs | seeds |", "|" + "---|" * (len(names) + 7)]
    for name, found in rows.items():
        mean = lambda key: pm(np.array([np.mean([judged[t][key] for t in names]) for _, judged in found]))
        cells = [f"{pm([judged[t]['knn'] for _, judged in found])} / {pm([judged[t]['probe'] for _, judged in found])}" for t in names]
        cost = [np.mean([line.get(key, 0) for line, _ in found]) for key in ("images_seen", "seconds", "beside")]
        gflops = np.mean([judged[t]["gflops"] for _, judged in found for t in names])
        out.append(f"| {name} | {' | '.join(cells)} | {mean('knn')} | {mean('probe')} | {cost[0]:,.0f} | {cost[1]:.0f}, {cost[2]:.0f} | {gflops:.4f} | {len(found)} |")
    out += ["", "Cells are kNN / linear probe, %. *Beside*: retrieving for the three tasks, routing or searching them."]
    found = [line["search"] for line in lines if "search" in line]
    if found:
        out += ["", f"| DATA's search at up to half of the FLOPs, points under the best of the {len(next(iter(found[0].values()))['tests'])} sizes sampled | by test images: chosen without labels | chosen by labels, training images | a random size "
                "| by all labelled images: chosen without labels | a random size | rank correlation of similarity and score |", "|---|---|---|---|---|---|---|"]
        rows = {task: np.array([under_best(search[task]) for search in found]) for task in sorted(found[0])}                # (seeds, 6)
        for task, values in [*rows.items(), ("mean", np.mean(list(rows.values()), 0))]:
            out.append(f"| {task} | {' | '.join(pm(column) for column in values.T)} |")
    return out


def under_best(found):
    """What a task's search found: points under the best size by test images, of the size chosen without labels, of that
    chosen by leave-one-out on the training images, of all on average; the first and the last of these by all labelled images (training
    ones by leave-one-out), whose noise is less; the rank correlation of similarity and that score."""
    similarity, train, test = (np.array(found[k]) for k in ("similarities", "trains", "tests"))
    both, ranks = np.average([train, test], axis=0, weights=found["images"]), lambda v: v.argsort().argsort()
    chosen = similarity.argmax()
    return [test.max() - test[chosen], test.max() - test[train.argmax()], test.max() - test.mean(), both.max() - both[chosen], both.max() - both.mean(),
            np.corrcoef(ranks(similarity), ranks(both))[0, 1]]


def figures(f, stem):
    """PNG files for a slide, with matplotlib if installed."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figures")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def bars(path, labels, values, title, xlabel):
        figure, axes = plt.subplots(figsize=(7, 0.45 * len(labels) + 1.4))
        place = np.arange(len(labels))[::-1]
        axes.barh(place, [v.mean() for v in values], xerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in values], color=["tab:blue" if v.mean() > 0 else "tab:red" for v in values], capsize=3)
        axes.set_yticks(place, labels)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(xlabel)
        axes.set_title(title)
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)
    if not f.seeds("SDR", "SimSiam continued"):
        return
    per = f.per_task()
    bars(f"{stem}.tasks.png", list(per), list(per.values()), "SDR, routed, against SimSiam on as many images", "gain in kNN accuracy, points")
    runs = [r for r in dict.fromkeys(r for r, _ in f.lines) if "tasks" in f.lines[r, f.seeds(r)[0]] and r != "SimSiam continued" and f.seeds(r, "SimSiam continued")]
    key = lambda r: "simsiam" if "simsiam" in next(iter(f.lines[r, f.seeds(r)[0]]["tasks"].values())) else "routed"
    bars(f"{stem}.variants.png", runs, [f.gains(r, key(r)) for r in runs], "every variant against SimSiam on as many images", "gain in kNN accuracy, mean of the tasks, points")
    line = f.lines["SDR", f.seeds("SDR")[0]]["tasks"]
    figure, many = plt.subplots(1, len(line), figsize=(2.6 * len(line), 2.8), sharey=True)
    for axes, (task, v) in zip(np.atleast_1d(many), sorted(line.items())):
        axes.hist(v["scores"], bins=12, color="lightgrey", edgecolor="grey")
        axes.axvline(v["routed"], color="tab:blue", label="routed")
        axes.axvline(v["largest"], color="tab:red", linestyle="--", label="largest network")
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("kNN, %")
    np.atleast_1d(many)[0].set_ylabel("sub-nets")
    np.atleast_1d(many)[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(f"{stem}.histogram.png", dpi=130)
    plt.close(figure)


def render(results, kind, readme):
    lines = read(results)
    if not lines:
        print(f"no line in {results} yet")
        return
    f, stem = Findings(lines, kind), os.path.splitext(results)[0]
    text = tables(f, lines)
    with open(f"{stem}.md", "w") as file:
        file.write(text + "\n")
    figures(f, stem)
    print(text)
    if readme:
        path, begin, end = os.path.join(ROOT, "README.md"), f"<!-- reproduce {kind} -->", f"<!-- end {kind} -->"
        old = open(path).read()
        if begin not in old or end not in old:
            raise Failed(f"README.md has no markers {begin} ... {end}")
        with open(path, "w") as file:
            file.write(old[:old.index(begin) + len(begin)] + "\n" + text + "\n" + old[old.index(end):])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="toy", help="toy, or the folder of the unpacked image packs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", type=lambda t: int(t) if t.isdigit() else t, nargs="+", choices=[*range(1, 10), "neighbours"], help="numbers of claims; neighbours")
    parser.add_argument("--budget-minutes", type=float, help="start no further run after this time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default=os.path.join(ROOT, "runs", "reproduce"), help="checkpoints and logs of the runs")
    parser.add_argument("--results", default=os.path.join(HERE, "results"), help="folder of the lines, tables and figures")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--readme", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    kind = "toy" if args.data == "toy" else "real"
    if kind == "real" and not args.render and not os.path.isdir(os.path.join(args.data, "tiny-imagenet", "images")):
        parser.error(f"--data {args.data}: no folder tiny-imagenet/images in it")
    os.makedirs(args.results, exist_ok=True)
    results = os.path.join(args.results, f"{kind}.jsonl")
    try:
        if not args.render:
            run_all(args, results)
        render(results, kind, args.readme)
    except Failed as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
