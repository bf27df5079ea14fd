"""route.py - "here is my task, which sub-net?": scores all sub-nets of an sdrnet.pt on a task and exports the best.

    python route.py                                              # the toy tasks with runs/toy/sdrnet.pt
    python route.py --out runs/photos --task pets/ --task cars/  # folders with train/ and test/, a folder per class
    python route.py --checkpoint sdrnet.pt --task aircraft --root /datasets --probe --simsiam simsiam.pt
    torchrun --nproc_per_node 8 route.py ... --task aircraft --task cars --task food

In the paper's terms (SDR, "deployment"): a k-nearest-neighbour classifier on frozen features scores every sub-net W_i.
Here the score that CHOOSES is leave-one-out on the task's training images: each is classified by the others (cosine,
votes weighted by exp(cos / 0.07)); test images only report. The g^4 sub-nets are run as a tree, each prefix of a path
once, sub-tree by sub-tree, so that features of at most g^2 sub-nets exist at a time.

    --search all       every sub-net on all training images
    --search halving   every sub-net on a quarter of them, the best eighth on half, the best quarter of those on all
    --search centroid  no labels: the images are assigned to clusters by the largest network; the largest share wins

    --budget-gflops LO HI   DATA (CVPR 2022), on a datanet.pt of pretrain.py --sizes: --samples random sizes whose FLOPs
                            lie in the window; the one whose embeddings of the task's unlabelled training images have
                            the highest mean cosine to the largest network's is chosen

In:  sdrnet.pt, tasks (--task NAME, repeatable): toy, toy:WORLD, a folder, or with --root one of aircraft caltech101
     cars cifar10 cifar100 dtd flowers food pets sun397 voc2007, each with its own split and metric
Out: <out>/<task>/scores.npy       float32 (g^4,) leave-one-out scores in percent (nan: not scored on all images)
                  test_scores.npy  float32 (g^4,) test scores, never used to choose
                  subnet.pt        the chosen sub-net, plain and dense (see sdrnet.py); subnet.pt2 with --export
                  result.json      chosen path, largest network, mean, best, each on train and test; the protocol
                  histogram.png    with matplotlib; cluster.png, what the chosen sub-net was trained on

Measured: 16 sub-nets of a ResNet-18 of width 16 at 32 px on 5,000 + 2,000 images: 24 s on one CPU core.
"""
import argparse
import functools
import itertools
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import sdrnet
from pretrain import (CORES, make_heads, Parser, Signals, Task, autocast, batches, common_options, contact_sheet, knn, load_array, open_images, open_tasks, plain_input,
                      rank, run, save_array, say, score, start, torchvision_listing)
from sdrnet import InputError, index_to_path, path_to_index, world_size


# ---------------------------------------------------------------------------- the eleven tasks of the paper

def named_task(name, root, download):
    """One of the eleven tasks by name, with its official split (train and validation joined) and metric."""
    from torchvision import datasets as D
    on = dict(root=root, download=download)
    split = lambda make, *parts: (lambda: [make(p) for p in parts])
    table = {                                          # name: training part, test part, metric
        "aircraft": (split(lambda p: D.FGVCAircraft(split=p, **on), "trainval"), split(lambda p: D.FGVCAircraft(split=p, **on), "test"), "mean-per-class"),
        "caltech101": (lambda: [caltech_part(root, download, True)], lambda: [caltech_part(root, download, False)], "mean-per-class"),
        "cars": (split(lambda p: D.StanfordCars(root, p), "train"), split(lambda p: D.StanfordCars(root, p), "test"), "top-1"),
        "cifar10": (lambda: [D.CIFAR10(train=True, **on)], lambda: [D.CIFAR10(train=False, **on)], "top-1"),
        "cifar100": (lambda: [D.CIFAR100(train=True, **on)], lambda: [D.CIFAR100(train=False, **on)], "top-1"),
        "dtd": (split(lambda p: D.DTD(split=p, **on), "train", "val"), split(lambda p: D.DTD(split=p, **on), "test"), "top-1"),
        "flowers": (split(lambda p: D.Flowers102(split=p, **on), "train", "val"), split(lambda p: D.Flowers102(split=p, **on), "test"), "mean-per-class"),
        "food": (split(lambda p: D.Food101(split=p, **on), "train"), split(lambda p: D.Food101(split=p, **on), "test"), "top-1"),
        "pets": (split(lambda p: D.OxfordIIITPet(split=p, **on), "trainval"), split(lambda p: D.OxfordIIITPet(split=p, **on), "test"), "mean-per-class"),
        "sun397": (lambda: [sun_part(root, download, "Training_01.txt")], lambda: [sun_part(root, download, "Testing_01.txt")], "top-1"),
        "voc2007": (lambda: [D.VOCDetection(year="2007", image_set="trainval", **on)], lambda: [D.VOCDetection(year="2007", image_set="test", **on)], "mAP"),
    }
    if name not in table:
        return None
    if not root:
        raise InputError(f"task {name}: name the folder it lies in with --root")
    train, test, metric = table[name]
    return Task(name, torchvision_listing(train, name), torchvision_listing(test, name), metric)


def caltech_part(root, download, train):
    """Caltech-101 has no official split; the usual one: 30 images of each class train, the rest test (seed 0)."""
    from torchvision.datasets import Caltech101
    if not download and not os.path.isdir(os.path.join(root, "caltech101")):       # torchvision would make the folder
        raise InputError(f"task caltech101: no folder {os.path.join(root, 'caltech101')}; is --root right?")
    whole, chosen = Caltech101(root, download=download), []
    for c in range(max(whole.y) + 1):
        members = np.random.default_rng([0, c]).permutation(np.flatnonzero(np.asarray(whole.y) == c))
        chosen += list(members[:30] if train else members[30:])
    return torch.utils.data.Subset(whole, sorted(int(i) for i in chosen))


def sun_part(root, download, listing):
    """SUN397's first official partition: its Training_01.txt and Testing_01.txt are expected in <root>/SUN397."""
    from torchvision.datasets import SUN397
    whole, file = SUN397(root, download=download), os.path.join(root, "SUN397", listing)
    if not os.path.isfile(file):
        raise InputError(f"task sun397: no {file}; unpack the official Partitions.zip into {os.path.join(root, 'SUN397')}")
    with open(file) as lines:
        wanted = {line.strip().lstrip("/") for line in lines if line.strip()}
    place = {os.path.relpath(f, os.path.join(root, "SUN397")): i for i, f in enumerate(whole._image_files)}
    missing = sorted(wanted - set(place))
    if missing:
        raise InputError(f"task sun397: {len(missing):,} of the {len(wanted):,} images of {listing} are missing, {missing[0]} first")
    return torch.utils.data.Subset(whole, [place[f] for f in sorted(wanted)])      # torchvision lists in the disk's order


# ---------------------------------------------------------------------------- scoring

class Pixels:
    """A task's images in memory, as sub-nets see them: train and test uint8 (N, 3, S, S), labels, metric.
    About `limit` of each part, the same share of every class."""

    def __init__(self, task, size, limit, workers):
        self.name, self.metric, self.classes = task.name, task.metric, task.train.classes
        for part in ("train", "test"):
            images = getattr(task, part)
            order = stratified(images.labels, limit)
            if len(order) < len(images):
                say(f"  {task.name}: {len(order):,} of {len(images):,} {part} images (--max-images), each class alike")
            pixels = torch.empty(len(order), 3, size, size, dtype=torch.uint8)
            for block, x in batches(images, size, workers=workers, mine=False, order=order):
                pixels[torch.from_numpy(block)] = x
                Signals.poll()
            setattr(self, part, pixels)
            setattr(self, f"{part}_labels", images.labels[order])


def stratified(labels, limit):
    """Indices of about `limit` images, sorted, every class cut by the same share, and at least one image of each."""
    if len(labels) <= limit:
        return np.arange(len(labels))
    key = labels if labels.dim() == 1 else labels.argmax(1)
    rng, chosen = np.random.default_rng(0), []
    for c in key.unique():
        members = rng.permutation(np.flatnonzero(key.numpy() == int(c)))
        chosen.append(members[:max(1, round(len(members) * limit / len(labels)))])
    return np.sort(np.concatenate(chosen))


@torch.no_grad()
def tree_features(net, pixels, indices, device, amp, batch=256):
    """{sub-net: features float32 (N, D)} for sub-nets `indices`, each prefix of a path computed once per batch."""
    table = {i: torch.empty(len(pixels), net.sub_features) for i in indices}
    for a in range(0, len(pixels), batch):
        with autocast(device, amp):
            for i, f in net.walk(plain_input(pixels[a:a + batch], device), indices):
                table[i][a:a + batch] = f.float().cpu()
        Signals.poll()
    return table


@torch.no_grad()
def plain_features(net, pixels, device, amp, batch=256):
    """Features float32 (N, D) of one network: a plain ResNet, or an SDRNet's largest."""
    parts = []
    for a in range(0, len(pixels), batch):
        with autocast(device, amp):
            parts.append(net(plain_input(pixels[a:a + batch], device)).float().cpu())
        Signals.poll()
    return torch.cat(parts)


def loo_score(features, task, rows=slice(None), k=20):
    """Leave-one-out kNN percent of training features (N, D), in the task's metric."""
    labels = task.train_labels[rows]
    return score(knn(features, labels, None, len(task.classes), k, leave_one_out=True), labels, task.metric)


def test_score(train, test, task, k=20):
    return score(knn(train, task.train_labels, test, len(task.classes), k), task.test_labels, task.metric)


def subtrees(indices, groups):
    """Sub-nets grouped by the first two digits of their path: at most g^2 in a group."""
    table = {}
    for i in indices:
        table.setdefault(int(i) // groups ** 2, []).append(int(i))
    return list(table.values())


def search_all(net, task, device, amp, k, indices=None, tests=True):
    """Leave-one-out and test scores of sub-nets (default: all), float32 (g^4,), nan where not asked for.
    Sub-trees are shared out over the processes."""
    count = net.groups ** 4
    table, began = np.zeros((2, count)), time.time()
    groups = subtrees(range(count) if indices is None else indices, net.groups)
    for n, members in enumerate(groups):
        if n % world_size() != rank():
            continue
        train = tree_features(net, task.train, members, device, amp)
        test = tree_features(net, task.test, members, device, amp) if tests else None
        for i in members:
            table[0, i] = loo_score(train[i], task, k=k)
            table[1, i] = test_score(train[i], test[i], task, k) if tests else 0
        say(f"\r  {task.name}: sub-tree {n + 1} of {len(groups)}, {time.time() - began:.0f} s", end="" if n + 1 < len(groups) else "\n")
    table = add_up(table, device)
    if indices is not None:
        skipped = np.setdiff1d(np.arange(count), indices)
        table[:, skipped] = np.nan
    return table[0], table[1] if tests else np.full(count, np.nan)


def add_up(table, device):
    """The sum over processes of an array that is zero where another process did the work."""
    if world_size() == 1:
        return table
    tensor = torch.from_numpy(table).to(device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


ROUNDS = ((1 / 4, 1.0), (1 / 2, 1 / 8), (1.0, 1 / 32))  # (share of the training images, share of the sub-nets)


def search_halving(net, task, device, amp, k, rounds=ROUNDS):
    """Scores all sub-nets on a part of the training images, the better ones on more, reusing features.

    Returns (scores (g^4,): nan but for the last round's, which saw everything; share of image passes done)."""
    count, n = net.groups ** 4, len(task.train)
    order = np.random.default_rng(0).permutation(n)
    order = order[np.argsort([spread_rank(order, task.train_labels)[i] for i in range(n)], kind="stable")]
    alive, features, passes, before = list(range(count)), {}, 0, 0
    for share, kept in rounds:
        upto = n if share == 1.0 else min(n, max(math.ceil(share * n), 2 * len(task.classes), 2))
        new = order[before:upto]
        scores = np.zeros(count)
        for j, members in enumerate(subtrees(alive, net.groups)):
            if j % world_size() != rank():
                continue
            if len(new):
                for i, f in tree_features(net, task.train[torch.from_numpy(new)], members, device, amp).items():
                    features[i] = torch.cat([features[i], f]) if i in features else f
            for i in members:
                if len(features[i]) < upto:            # another process had it in the last round
                    features[i] = tree_features(net, task.train[torch.from_numpy(order[:upto])], [i], device, amp)[i]
                scores[i] = loo_score(features[i], task, torch.from_numpy(order[:upto]), k)
        passes += len(alive) * len(new)
        scores, before = add_up(scores, device), upto
        ranked = sorted(alive, key=lambda i: (-scores[i], i))
        say(f"  {task.name}: {len(alive)} sub-nets on {upto:,} images, best {scores[ranked[0]]:.2f} %, median {np.median(scores[alive]):.2f} %")
        following = [r for r in rounds if r[0] > share]
        if not following:
            break
        alive = ranked[:max(1, math.ceil(following[0][1] * count))]
        features = {i: features[i] for i in alive if i in features}
    result = np.full(count, np.nan)
    result[alive] = scores[alive]
    return result, passes / (count * n)


def spread_rank(order, labels):
    """For each position of `order`, its image's number within its class: sorting by it takes the classes in turn."""
    key, seen, ranks = (labels if labels.dim() == 1 else labels.argmax(1)).numpy(), {}, []
    for i in order:
        ranks.append(seen.get(key[i], 0))
        seen[key[i]] = ranks[-1] + 1
    return ranks


def search_centroid(net, content, task, device, amp):
    """Shares of the task's training images (no labels) whose cluster is each sub-net's, in percent, float32 (g^4,)."""
    f = F.normalize(F.normalize(plain_features(net, task.train, device, amp)) - content["feature_mean"])
    nearest = (f @ content["centroids"].T).argmax(1)
    return 100 * np.bincount(nearest.numpy(), minlength=net.groups ** 4) / len(nearest)


# ---------------------------------------------------------------------------- DATA: search over sizes

@functools.cache
def flops_of_sizes(net, size):
    """A function: size -> FLOPs of its extracted network on one image of size x size, by torch's counter (two per
    multiply-add; BatchNorm and ReLU are not counted).

    A stage costs what its width and that of the stage before make it: the networks of widths x, y, x, y (eighths)
    have every pair of them in every stage, and the counter counts each block."""
    from torch.utils.flop_counter import FlopCounterMode
    table, choices, config = {}, net.sizes(), net.config
    eighths = sorted({e for _, e in choices[0]})
    for x, y in itertools.product(eighths, repeat=2):
        widths = [config["width"] * 2 ** s * e // 8 for s, e in enumerate((x, y, x, y))]
        with torch.device("meta"):
            plain, image = sdrnet.ResNet(config["arch"], widths, config["width"], config["small_stem"]).eval(), torch.empty(1, 3, size, size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            plain(image)
        count = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
        for s, (before, own) in enumerate(((8, x), (x, y), (y, x), (x, y))):
            table[s, before, own] = np.cumsum([count[f"ResNet.layer{s + 1}.{i}"] for i in range(choices[s][-1][0])])
    stem = count["ResNet.conv1"]
    return lambda size: stem + sum(int(table[s, before, e][d - 1]) for s, (before, (d, e)) in enumerate(zip((8, *(e for _, e in size)), size)))


def sizes_in_window(net, size, low, high, samples, seed):
    """[(FLOPs, size)] of at most `samples` random sizes with low <= FLOPs <= high, fewest first. Raises InputError."""
    flops = flops_of_sizes(net, size)
    inside = [(f, s) for s in itertools.product(*net.sizes()) for f in [flops(s)] if low <= f <= high]
    if not inside:
        least, most = (flops(tuple(c[i] for c in net.sizes())) / 1e9 for i in (0, -1))
        raise InputError(f"--budget-gflops {low / 1e9:g} {high / 1e9:g}: no network has so many; they have {least:.4g} to {most:.4g} GFLOPs at {size} px")
    chosen = np.random.default_rng([seed, 5]).permutation(len(inside))[:samples]
    return sorted(inside[i] for i in chosen)


@torch.no_grad()
def measured(plain, pixels, device, batch=256):
    """A plain network whose BatchNorm statistics are those of these images: the average over batches."""
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None                     # torch's word for a plain average
    plain.to(device, memory_format=torch.channels_last).train()
    for part in np.array_split(np.random.default_rng(0).permutation(len(pixels)), math.ceil(len(pixels) / batch)):
        plain(plain_input(pixels[torch.from_numpy(part)], device))
        Signals.poll()
    return plain.eval()


def similarity(projector, f, f0, cut):
    """Mean cosine of the embeddings of the same images: features f (N, d) of a size and f0 (N, D) of the largest network,
    through the projector of the pre-training, normalised over these images; cut: the size's channels among the D."""
    with torch.no_grad():
        z, z0 = projector([f, f0], [cut, None], "collect")             # each process measures other sizes: no common statistics
    return F.cosine_similarity(z, z0).mean().item()


def search_sizes(net, content, task, args, device):
    """One task: samples sizes in the window, scores each without labels, prints the front, exports the best. Every
    network's statistics are measured on the task's training images. Returns result.json's content."""
    began, origin = time.time(), content["origin"]["config"]
    projector = make_heads(origin["objective"], net.features, origin["layers"], origin["head"])[0]
    projector.load_state_dict(content["heads"]["projector"])
    inside = sizes_in_window(net, content["config"]["image_size"], *(g * 1e9 for g in args.budget_gflops), args.samples, args.seed)

    def look(size):
        plain = measured(net.extract(size), task.train, device)
        train, test = (plain_features(plain, part, device, args.amp) for part in (task.train, task.test))
        return plain, train, loo_score(train, task, k=args.k), test_score(train, test, task, args.k)
    _, f0, *largest = look(None)
    table = np.zeros((len(inside), 3))                 # similarity, leave-one-out and test score of each
    for i, (_, size) in enumerate(inside):
        if i % world_size() == rank():
            _, f, *scores = look(size)
            table[i] = similarity(projector, f, f0, net.cut(net.features, size[-1])), *scores
            say(f"\r  {task.name}: size {i + 1} of {len(inside)}, {time.time() - began:.0f} s", end="")
    say()
    table = add_up(table, device)
    chosen, best = int(table[:, 0].argmax()), int(table[:, 2].argmax())
    about = lambda i: {"size": inside[i][1], "gflops": inside[i][0] / 1e9, "similarity": table[i, 0], "train": table[i, 1], "test": table[i, 2]}
    result = {"task": task.name, "metric": task.metric, "search": "sizes", "budget_gflops": args.budget_gflops, "chosen": about(chosen), "best": about(best),
              "largest": {"gflops": flops_of_sizes(net, content["config"]["image_size"])(tuple(c[-1] for c in net.sizes())) / 1e9, "train": largest[0], "test": largest[1]},
              "sampled": [about(i) for i in range(len(inside))], "gain": table[chosen, 2] - largest[1], "seconds": round(time.time() - began, 2)}
    say(f"  the front: {'GFLOPs':>10} {'similarity':>11} {'leave-one-out':>14} {'test':>8}   (depth, eighths) of each stage")
    for i in [i for i in range(len(inside)) if i == 0 or table[i, 0] > table[:i, 0].max()]:
        say(f"  {inside[i][0] / 1e9:21.4f} {table[i, 0]:11.4f} {table[i, 1]:14.2f} {table[i, 2]:8.2f}   {inside[i][1]}" + ("  <- chosen" if i == chosen else ""))
    say(f"  largest network {result['largest']['gflops']:5.4f} {1:11.4f} {largest[0]:14.2f} {largest[1]:8.2f}\n  best of the {len(inside)} sampled by test score: {table[best, 2]:.2f} %")
    if rank() == 0:
        write_subnet(look(inside[chosen][1])[0].cpu(), content, task, {"size": [list(pair) for pair in inside[chosen][1]]}, args)
        write_json(result, os.path.join(args.out, task.name, "result.json"))
    return result


# ---------------------------------------------------------------------------- linear probe

def logistic_fit(x, y, decay, start=None, tolerance=1e-4, iterations=1000):
    """Weights (D + 1, C) that minimise mean cross-entropy + decay/2 |W|^2 (the bias is free), by L-BFGS.

    x: (N, D) float32. y: int64 (N,) for the softmax, or 0/1 (N, C) for C independent logistic regressions.
    Ends when no gradient exceeds `tolerance` (scipy's pgtol, as in scikit-learn)."""
    from scipy.optimize import minimize
    n, d = x.shape
    c = y.shape[1] if y.dim() > 1 else int(y.max()) + 1
    target = y.float() if y.dim() > 1 else F.one_hot(y, c).float()

    def objective(flat):
        w = torch.from_numpy(flat).float().view(d + 1, c)
        logits = torch.addmm(w[d], x, w[:d])           # (N, C)
        if y.dim() > 1:
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / n
            error = (torch.sigmoid(logits) - target) / n
        else:
            logp = torch.log_softmax(logits, 1)
            loss = -(target * logp).sum() / n
            error = (logp.exp() - target) / n
        gradient = torch.cat([x.T @ error + decay * w[:d], error.sum(0, keepdim=True)])
        return loss.item() + decay / 2 * w[:d].pow(2).sum().item(), gradient.double().flatten().numpy()
    start = np.zeros((d + 1) * c) if start is None else start
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"gtol": tolerance, "ftol": 64 * np.finfo(float).eps, "maxiter": iterations, "maxls": 50})
    return found.x.reshape(d + 1, c)


def probe(train, test, task):
    """Linear probe: weight decay from a log grid by a stratified fifth of the training images held out, then refit on
    all. Features are scaled to unit mean square. Returns (test percent in the task's metric, weight decay)."""
    scale = train.pow(2).mean().sqrt().clamp(min=1e-12)
    x, z, y = train / scale, test / scale, task.train_labels
    held = torch.zeros(len(y), dtype=torch.bool)
    held[stratified(y, max(1, len(y) // 5))] = True
    if not (~held).any() or (y.dim() == 1 and len(y[~held].unique()) < len(y.unique())):
        held[:] = False                                # one image a class: nothing can be held out
    predict = lambda w, q: q @ torch.from_numpy(w[:-1]).float() + torch.from_numpy(w[-1]).float()
    grid, results, start = 10.0 ** np.arange(0, -7, -1.0), [], None
    classes = len(task.classes)
    full = y if y.dim() > 1 else torch.cat([y, torch.tensor([classes - 1])])[:-1]
    for decay in grid if held.any() else []:
        w = logistic_fit(x[~held], full[~held], decay, start, 1e-3)
        start = w.flatten()
        results.append(score(predict(w, x[held]), y[held], task.metric))
    decay = grid[int(np.argmax(results))] if results else 1e-3
    return score(predict(logistic_fit(x, full, decay), z), task.test_labels, task.metric), float(decay)


# ---------------------------------------------------------------------------- what is shown and written

def histogram(scores, chosen, largest, width=48, bins=12):
    """A text histogram of the scores, with the chosen sub-net's and the largest network's bins marked."""
    values = scores[np.isfinite(scores)]
    low, high = min(values.min(), largest), max(values.max(), largest)
    edges = np.linspace(low, high + 1e-9, bins + 1)
    counts = np.histogram(values, edges)[0]
    place = lambda v: min(bins - 1, int(np.searchsorted(edges, v, side="right")) - 1)
    return "\n".join(f"  {edges[b]:6.2f} % |{'#' * math.ceil(width * n / counts.max()):<{width}} {n:4d}"
                     + ("  <- chosen" if b == place(scores[chosen]) else "") + ("  <- largest network" if b == place(largest) else "") for b, n in enumerate(counts))


def picture(scores, chosen, largest, title, path):
    """The histogram as PNG, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        say("  (no histogram.png: matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.hist(scores[np.isfinite(scores)], bins=24, color="#4477aa")
    axes.axvline(scores[chosen], color="#cc3311", label=f"chosen sub-net {chosen}")
    axes.axvline(largest, color="black", linestyle="--", label="largest network")
    axes.set(title=title.replace("$", r"\$"), xlabel="leave-one-out kNN on the training images, %", ylabel="sub-nets")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def export(plain, size, path):
    """A torch.export file: loads with torch.export.load(path).module() where no class of ours exists."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(plain.float(), (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path + ".tmp.pt2")
    os.replace(path + ".tmp.pt2", path)


def route(net, content, task, others, args, device):
    """One task: search, report, files. others: {name: plain network} to compare with. Returns result.json's content."""
    k, began = args.k, time.time()
    if k > len(task.train) - 1:
        say(f"  {task.name}: {len(task.train)} training images, so k shrinks from {k} to {len(task.train) - 1}")
    base = {name: [plain_features(other, part, device, args.amp) for part in (task.train, task.test)] for name, other in others.items()}
    compared = {name: {"train": loo_score(f[0], task, k=k), "test": test_score(*f, task, k)} for name, f in base.items()}
    extra = {}
    if args.search == "all":
        scores, tests = search_all(net, task, device, args.amp, k)
        choice = scores
    elif args.search == "halving":
        scores, extra["passes"] = search_halving(net, task, device, args.amp, k)
        choice = scores
        say(f"  halving did {100 * extra['passes']:.0f} % of the {net.groups ** 4} x {len(task.train)} image passes that scoring everything takes")
    else:
        choice = search_centroid(net, content, task, device, args.amp)
        extra["share_of_images"] = float(choice.max())
        say(f"  {choice.max():.0f} % of the images, more than of any other, belong to cluster {int(choice.argmax())}")
    chosen = int(np.nanargmax(choice))                 # ties: the lowest index
    if args.search != "all":
        known, tests = search_all(net, task, device, args.amp, k, [chosen])
        scores = known if args.search == "centroid" else scores
    path = index_to_path(chosen, net.groups)
    finite = np.isfinite(scores)
    result = {"task": task.name, "metric": task.metric, "search": args.search, "k": min(k, len(task.train) - 1), "temperature": 0.07,
              "train_images": len(task.train), "test_images": len(task.test), "classes": len(task.classes), "chosen": {
                  "index": chosen, "path": list(path), "train": float(scores[chosen]), "test": float(tests[chosen])},
              **compared, "mean": {"train": float(scores[finite].mean()), "test": float(np.nanmean(tests))},
              "best": {"index": int(np.nanargmax(tests)), "train": float(np.nanmax(scores)), "test": float(np.nanmax(tests))},
              "gain": float(tests[chosen] - compared["largest"]["test"]), "seconds": round(time.time() - began, 2), **extra}
    if args.probe:
        pair = [tree_features(net, part, [chosen], device, args.amp)[chosen] for part in (task.train, task.test)]
        for name, (train, test) in {"chosen": pair, **base}.items():
            result[name]["probe"], result[name]["probe_decay"] = probe(train, test, task)
    report(result, scores, tests, net)
    if rank() == 0:
        write(net, content, task, result, scores, tests, args)
    return result


def report(result, scores, tests, net):
    """A ranked table, the histogram, the gain."""
    ranked = [i for i in np.argsort(-np.nan_to_num(scores, nan=-1), kind="stable") if np.isfinite(scores[i])]
    say(f"  {'rank':>4} {'sub-net':>8} {'path':>12} {'leave-one-out':>14} {'test':>8}   ({result['metric']}, %)")
    for n, i in list(enumerate(ranked, 1))[:5]:
        say(f"  {n:4d} {i:8d} {str(index_to_path(i, net.groups)):>12} {scores[i]:14.2f} {tests[i]:8.2f}" + ("  <- chosen" if i == result["chosen"]["index"] else ""))
    for name in [n for n in result if isinstance(result[n], dict) and n not in ("chosen", "best")]:
        say(f"  {'':4} {name:>21} {result[name]['train']:14.2f} {result[name]['test']:8.2f}")
    if len(ranked) > 1:
        say(histogram(scores, result["chosen"]["index"], result["largest"]["train"]))
    if "probe" in result["chosen"]:
        say("  linear probe: " + ", ".join(f"{n} {result[n]['probe']:.2f} %" for n in result if isinstance(result[n], dict) and "probe" in result[n]))
    say(f"  {result['task']}: sub-net {result['chosen']['index']} {result['chosen']['test']:.2f} % on test, {result['gain']:+.2f} over the largest network; {result['seconds']:.0f} s")


def write(net, content, task, result, scores, tests, args):
    """The task's folder of files."""
    path = lambda name: os.path.join(args.out, task.name, name)
    write_subnet(net.extract(result["chosen"]["path"]).cpu(), content, task, {"index": result["chosen"]["index"]}, args)
    save_array(path("scores.npy"), scores.astype(np.float32))
    save_array(path("test_scores.npy"), tests.astype(np.float32))
    if np.isfinite(scores).sum() > 1:
        picture(scores, result["chosen"]["index"], result["largest"]["train"], f"{task.name}: {len(scores)} sub-nets", path("histogram.png"))
    if args.clusters_shown is not None:
        images, clusters = args.clusters_shown
        members = np.flatnonzero(clusters == result["chosen"]["index"])
        members = np.random.default_rng(0).permutation(members)[:48]
        contact_sheet(images, [members[a:a + 12] for a in range(0, len(members), 12)], path("cluster.png"))
    write_json(result, path("result.json"))


def write_subnet(plain, content, task, which, args):
    """subnet.pt of a plain network, and subnet.pt2 with --export, in the task's folder."""
    path = lambda name: os.path.join(args.out, task.name, name)
    os.makedirs(path(""), exist_ok=True)
    out = sdrnet.checkpoint(plain, "subnet", origin={"checkpoint": args.checkpoint, "task": task.name, **which})
    out["config"]["image_size"] = content["config"]["image_size"]
    sdrnet.save(path("subnet.pt"), out)
    if args.export:
        export(plain, content["config"]["image_size"], path("subnet.pt2"))


def write_json(result, path):
    with open(path + ".tmp", "w") as file:
        json.dump(result, file, indent=1)
    os.replace(path + ".tmp", path)


def summary(results, names):
    """One table of all tasks: test percent and the gain of the routed sub-net, with the average, as in the paper."""
    columns = ["chosen"] + names
    measures = ["test"] + (["probe"] if "probe" in results[0]["chosen"] else [])
    for measure in measures:
        say(f"\n{'kNN' if measure == 'test' else 'linear probe'} on test images, %")
        say(f"  {'task':<16} {'metric':<15}" + "".join(f"{('routed' if c == 'chosen' else c):>10}" for c in columns) + f"{'gain':>8}")
        rows = [[r[c][measure] for c in columns] for r in results]
        for r, row in zip(results, rows):
            say(f"  {r['task']:<16} {r['metric']:<15}" + "".join(f"{v:10.2f}" for v in row) + f"{row[0] - row[1]:+8.2f}")
        mean = np.mean(rows, 0)
        say(f"  {'average':<16} {'':<15}" + "".join(f"{v:10.2f}" for v in mean) + f"{mean[0] - mean[1]:+8.2f}")


def parse(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--checkpoint", help="sdrnet.pt, or datanet.pt with --budget-gflops; default: the one in --out")
    group.add_argument("--task", action="append", help="toy, toy:WORLD, a folder, or one of the eleven by name; repeatable; default toy")
    group.add_argument("--root", help="where torchvision's data sets lie")
    group.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    group.add_argument("--simsiam", help="a simsiam.pt to compare with; default: the one in --out, if any; none")
    group.add_argument("--data", help="the pre-training images, to show the chosen cluster; default: toy where the checkpoint is of toy")
    group.add_argument("--clusters", help="clusters.npy, likewise; default: the one in --out")
    group = parser.add_argument_group("how")
    group.add_argument("--search", choices=("all", "halving", "centroid"), default="all")
    group.add_argument("--budget-gflops", type=float, nargs=2, metavar=("LO", "HI"), help="search sizes instead: DATA, see above")
    group.add_argument("--samples", type=int, default=40, help="sizes that --budget-gflops scores")
    group.add_argument("--k", type=int, default=20, help="neighbours that vote")
    group.add_argument("--max-images", type=int, default=5000, help="of a task's train and of its test part, each class alike")
    group.add_argument("--probe", action="store_true", help="linear probe of the chosen sub-net, the largest network and SimSiam")
    group.add_argument("--export", action="store_true", help="write subnet.pt2 by torch.export")
    group.add_argument("--workers", type=int, default=min(8, CORES))
    common_options(parser)
    args = parser.parse_args(argv)
    if args.k < 1 or args.max_images < 2 or args.samples < 1:
        raise InputError("--k and --samples must be at least 1, --max-images at least 2")
    return args


def shown_clusters(args, content):
    """(images, clusters) behind the sub-nets, for pictures, where they are at hand; else None."""
    config = content.get("origin", {}).get("config", {})
    data, file = args.data or ("toy" if config.get("data") == "toy" else None), args.clusters or os.path.join(args.out, "clusters.npy")
    if data is None or not os.path.isfile(file):
        return None
    images = open_images(argparse.Namespace(data=data, root=args.root, download=False, subset=config.get("subset"), seed=config.get("seed", 0)))
    clusters = load_array(file, "i", 1)
    if len(clusters) != len(images):
        raise InputError(f"{file} has {len(clusters)} entries and --data {len(images)} images")
    return images, clusters


def main():
    args = parse()
    device = start(args)
    args.checkpoint = args.checkpoint or os.path.join(args.out, "datanet.pt" if args.budget_gflops else "sdrnet.pt")
    content = sdrnet.load(args.checkpoint, None if args.budget_gflops else ("sdrnet",))
    if args.budget_gflops and content["kind"] != "datanet":
        raise InputError(f"{args.checkpoint} was trained without sizes: pretrain.py --sizes 1,4 makes a datanet.pt to search")
    size = content["config"]["image_size"]
    net = sdrnet.network(content, args.checkpoint).to(device, memory_format=torch.channels_last)
    others = {"largest": net}
    simsiam = args.simsiam or os.path.join(args.out, "simsiam.pt")
    if args.simsiam != "none" and (args.simsiam or os.path.exists(simsiam)):
        others["simsiam"] = sdrnet.load_network(simsiam, ("simsiam",)).to(device, memory_format=torch.channels_last)
    tasks = []
    for name in args.task or ["toy"]:
        named = named_task(name, args.root, args.download)
        tasks += [named] if named else open_tasks([name], content.get("origin", {}).get("config", {}).get("seed", 0))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"two tasks are named {max(names, key=names.count)}, and each gets a folder of its name in --out: rename one")
    if args.budget_gflops:
        sizes_in_window(net, size, *(g * 1e9 for g in args.budget_gflops), 1, 0)       # a window without a network ends here
        say(f"{args.checkpoint}: sizes of {net.config['arch']} width {net.config['width']} within {args.budget_gflops} GFLOPs; {len(tasks)} task(s)")
        return summary([search_sizes(net, content, Pixels(task, size, args.max_images, args.workers), args, device) for task in tasks], ["largest"])
    args.clusters_shown = shown_clusters(args, content)
    say(f"{args.checkpoint}: {net.groups ** 4} sub-nets of {net.config['arch']} width {net.config['width']}; {len(tasks)} task(s), --search {args.search}")
    results = []
    for task in tasks:
        say(f"{task.name}: {len(task.train.classes)} classes, {len(task.train):,} training and {len(task.test):,} test images")
        results.append(route(net, content, Pixels(task, size, args.max_images, args.workers), others, args, device))
    summary(results, list(others))


if __name__ == "__main__":
    run(main, "route.py")
