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
    --search halving   every sub-net on an eighth of them, then the better half on twice as many, until they see all
    --search centroid  no labels: the images are assigned to clusters by the largest network; the largest share wins

    --budget-gflops LO HI   DATA (CVPR 2022), on a datanet.pt of pretrain.py --sizes: --samples random sizes whose FLOPs
                            lie in the window; the one whose embeddings of the task's unlabelled training images have
                            the highest mean cosine to the largest network's is chosen

In:  sdrnet.pt, tasks (--task NAME, repeatable): toy, toy:WORLD, a folder, or with --root one of aircraft caltech101
     cars cifar10 cifar100 dtd flowers food pets sun397 voc2007, each with its own split and metric
Out: <out>/<task>/scores.npy       float32 (g^4,) leave-one-out scores in percent (nan: not scored on all images)
                  test_scores.npy  float32 (g^4,) test scores, never used to choose
                  subnet.pt        the chosen sub-net, plain and dense (see sdrnet.py); subnet.pt2 with --export
                  result.json      chosen path, largest network, mean and best of all, each on train and test; the protocol
                  histogram.png    with matplotlib; cluster.png, what the chosen sub-net was trained on
     <out>/gain.png                with matplotlib: each task's gain over the largest network
     with --budget-gflops          <out>/<task>/sizes/subnet.pt and result.json, <out>/gain_sizes.png

Measured: 16 sub-nets of a ResNet-18 of width 16 at 32 px on 5,000 + 2,000 images: 24 s on one CPU core.
"""
import argparse
import functools
import hashlib
import itertools
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import sdrnet
from pretrain import (CORES, Images, Parser, Signals, Task, autocast, batches, common_options, contact_sheet, embed, knn, knn_score, load_clusters, make_heads, number, open_images,
                      open_tasks, plain_input, rank, run, save_array, save_json, say, score, start, tell, torchvision_listing)
from sdrnet import InputError, index_to_path, world_size


# ---------------------------------------------------------------------------- the eleven tasks of the paper

def named_task(name, root, download):
    """One of the eleven tasks by name, with its official split (train and validation joined) and metric."""
    from torchvision import datasets as D
    on = dict(root=root, download=download)
    table = {                                          # name: one part, those of training, those of test, metric
        "aircraft": (lambda p: D.FGVCAircraft(split=p, **on), ["trainval"], ["test"], "mean-per-class"),
        "caltech101": (lambda p: caltech_part(root, download, p), [True], [False], "mean-per-class"),
        "cars": (lambda p: D.StanfordCars(root, p), ["train"], ["test"], "top-1"),
        "cifar10": (lambda p: D.CIFAR10(train=p, **on), [True], [False], "top-1"),
        "cifar100": (lambda p: D.CIFAR100(train=p, **on), [True], [False], "top-1"),
        "dtd": (lambda p: D.DTD(split=p, **on), ["train", "val"], ["test"], "top-1"),
        "flowers": (lambda p: D.Flowers102(split=p, **on), ["train", "val"], ["test"], "mean-per-class"),
        "food": (lambda p: D.Food101(split=p, **on), ["train"], ["test"], "top-1"),
        "pets": (lambda p: D.OxfordIIITPet(split=p, **on), ["trainval"], ["test"], "mean-per-class"),
        "sun397": (lambda p: sun_part(root, download, p), ["Training_01.txt"], ["Testing_01.txt"], "top-1"),
        "voc2007": (lambda p: D.VOCDetection(year="2007", image_set=p, **on), ["trainval"], ["test"], "mAP"),
    }
    if name not in table:
        return None
    if not root:
        raise InputError(f"task {name}: name the folder it lies in with --root")
    make, *parts, metric = table[name]
    return Task(name, *(torchvision_listing(lambda: [make(p) for p in names], name) for names in parts), metric)


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

def decoded(task, size, limit, workers):
    """A task as the sub-nets see it: uint8 (N, 3, S, S) in memory, of each part about `limit` images, every class alike."""
    parts = []
    for part in ("train", "test"):
        images = getattr(task, part)
        order = stratified(images.labels, limit)
        if len(order) < len(images):
            say(f"  {task.name}: {len(order):,} of {len(images):,} {part} images (--max-images), each class alike")
        packed = torch.empty(len(order), 3, size, size, dtype=torch.uint8)
        for block, x in batches(images, size, workers=workers, mine=False, order=order):
            packed[torch.from_numpy(block)] = x
            Signals.poll()
        parts.append(Images([images.names[i] for i in order], None, images.labels[order], images.classes, packed))
    return Task(task.name, *parts, task.metric)


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


def loo_score(features, task, k=20):
    """Leave-one-out kNN percent of training features (N, D), in the task's metric."""
    return score(knn(features, task.train.labels, None, len(task.train.classes), k, leave_one_out=True), task.train.labels, task.metric)


def loo_votes(features, labels, classes, k=20):
    """Percent of the leave-one-out votes that go to the right classes. It ranks sub-nets on few images, where right or
    wrong is too coarse: halving by it finds a sub-net within a point of the best more often."""
    right = labels if labels.dim() > 1 else F.one_hot(labels, classes)
    return 100 * float((knn(features, labels, None, classes, k, leave_one_out=True) * right).sum() / right.sum())


def own_subtrees(indices, groups):
    """This process's share of sub-nets, grouped by the first two digits of their path: at most g^2 in a group. A sub-tree
    stays with its process, so that halving finds the features of the round before."""
    table = {}
    for i in indices:
        table.setdefault(int(i) // groups ** 2, []).append(int(i))
    return [members for prefix, members in table.items() if prefix % world_size() == rank()]


def search_all(net, task, device, amp, k, indices=None, tests=True):
    """Leave-one-out and test scores of sub-nets (default: all), float64 (2, g^4), nan where not asked for.
    Sub-trees are shared out over the processes."""
    count, began = net.groups ** 4, time.time()
    indices, table = np.arange(count) if indices is None else np.asarray(indices), np.zeros((2, count))
    own, shown = own_subtrees(indices, net.groups), began
    for n, members in enumerate(own, 1):
        train = tree_features(net, task.train.packed, members, device, amp)
        test = tree_features(net, task.test.packed, members, device, amp) if tests else {}
        for i in members:
            table[:, i] = loo_score(train[i], task, k), knn_score(train[i], test[i], task, k) if tests else np.nan
        shown = tell(f"  {task.name}: sub-tree {n} of {len(own)}, {time.time() - began:.0f} s", shown, shown > began and n == len(own))
    table = add_up(table, device)
    table[:, np.setdiff1d(np.arange(count), indices)] = np.nan
    return table


def add_up(table, device):
    """The sum over processes of an array that is zero where another process did the work."""
    return sdrnet.add_up(torch.from_numpy(table).to(device)).cpu().numpy()


def search_halving(net, task, device, amp, k, shares=(1 / 8, 1 / 4, 1 / 2, 1), keep=8, fewest=100):
    """All sub-nets on the first share of the training images, then each round the better half, but at least `keep`, on
    twice as many, with the features of the round before. No round sees fewer than about `fewest`: on 50 of a task's 400 the
    choice was up to 4.75 points behind the best (16 sub-nets, toy images), on 100 it was the best in 11 of 12 tasks.

    Returns (leave-one-out scores float64 (g^4,): nan but for those that saw everything; share of image passes done)."""
    count, images, classes = net.groups ** 4, task.train, len(task.train.classes)
    alive, features, passes, rows = list(range(count)), {}, 0, np.arange(0)
    for share in shares:
        wanted = stratified(images.labels, max(math.ceil(share * len(images)), 2 * classes, fewest))
        if len(wanted) == len(rows):
            continue
        new, scores, done = np.setdiff1d(wanted, rows), np.zeros(count), []        # a smaller part lies in the larger
        rows, passes = np.concatenate([rows, new]), passes + len(alive) * len(new)
        complete, after = len(rows) == len(images), max(keep, len(alive) // 2)
        for members in own_subtrees(alive, net.groups):
            for i, f in tree_features(net, images.packed[new], members, device, amp).items():
                features[i] = torch.cat([features[i], f]) if i in features else f
                scores[i] = loo_score(features[i][np.argsort(rows)], task, k) if complete else loo_votes(features[i], images.labels[rows], classes, k)
            done += members
            for i in sorted(done, key=lambda i: -scores[i])[after:]:               # what is out needs no memory
                features.pop(i, None)
        scores = add_up(scores, device)
        alive.sort(key=lambda i: (-scores[i], i))
        say(f"  {task.name}: {len(alive)} sub-nets on {len(rows):,} images, {'score' if complete else 'votes for the right class'}: best {scores[alive[0]]:.2f} %, median {np.median(scores[alive]):.2f} %")
        if complete:
            break
        alive = sorted(alive[:after])
    return np.where(np.isin(np.arange(count), alive), scores, np.nan), passes / (count * len(images))


def search_centroid(features, content):
    """Percent of images in the cluster of each sub-net, float64 (g^4,), from the largest network's features (N, D): no labels."""
    if content["feature_mean"].shape != features.shape[1:] or content["centroids"].shape[1:] != features.shape[1:]:
        raise InputError(f"{content.path}: its centroids are not those of this network")
    f = F.normalize(F.normalize(features) - content["feature_mean"])
    return 100 * np.bincount((f @ content["centroids"].T).argmax(1), minlength=len(content["centroids"])) / len(f)


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


def measured(plain, pixels, device, batch=256):
    """A plain network whose BatchNorm statistics are those of these images: the average over batches."""
    parts = np.array_split(np.random.default_rng(0).permutation(len(pixels)), math.ceil(len(pixels) / batch))
    update_bn((Signals.poll() or plain_input(pixels[torch.from_numpy(part)], device) for part in parts), plain.to(device, memory_format=torch.channels_last))
    return plain.eval()


@torch.no_grad()
def plain_features(net, pixels, device, amp, batch=256):
    """Features float32 (N, D) of a plain network, all on this process (`embed` would share the images out)."""
    parts = []
    for part in pixels.split(batch):
        with autocast(device, amp):
            parts.append(net(plain_input(part, device)).float().cpu())
        Signals.poll()
    return torch.cat(parts)


def similarity(projector, f, f0, cut):
    """Mean cosine of the embeddings of the same images: features f (N, d) of a size and f0 (N, D) of the largest network,
    through the projector of the pre-training, normalised over these images; cut: the size's channels among the D."""
    with torch.no_grad():
        z, z0 = projector(f[:, None], cut, "collect")[:, 0], projector(f0, None, "collect")    # each process measures other sizes: no common statistics
    return F.cosine_similarity(z, z0).mean().item()


def search_sizes(net, content, task, args, device):
    """One task: samples sizes in the window, scores each without labels, prints the front, exports the best. Every
    network's statistics are measured on the task's training images. Returns result.json's content."""
    began, origin = time.time(), content["origin"]["config"]
    projector = make_heads(origin["objective"], net.features, origin["layers"], origin["head"])[0]
    projector.load_state_dict(content["heads"]["projector"])
    inside = sizes_in_window(net, content["config"]["image_size"], *(g * 1e9 for g in args.budget_gflops), args.samples, args.seed)

    def look(size):
        plain = measured(net.extract(size), task.train.packed, device)
        pair = [plain_features(plain, part.packed, device, args.amp) for part in (task.train, task.test)]
        return plain, pair, loo_score(pair[0], task, args.k), knn_score(*pair, task, args.k)
    _, whole, *largest = look(None)
    table, shown = np.zeros((len(inside), 3)), began   # similarity, leave-one-out and test score of each
    for i, (_, size) in enumerate(inside):
        if i % world_size() == rank():
            _, pair, *scores = look(size)
            table[i] = similarity(projector, pair[0], whole[0], net.cut(net.features, [size[-1]])), *scores
            shown = tell(f"  {task.name}: size {i + 1} of {len(inside)}, {time.time() - began:.0f} s", shown, i + world_size() >= len(inside))
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
        plain, pair, *_ = look(inside[chosen][1])
        if args.probe:
            for name, features in (("chosen", pair), ("largest", whole)):
                result[name]["probe"], result[name]["probe_decay"] = probe(*features, task)
        folder = os.path.join(args.out, task.name, "sizes")             # beside what sub-nets gave
        write_subnet(plain.cpu(), content, folder, task.name, {"size": [list(stage) for stage in inside[chosen][1]]}, args)
        save_json(os.path.join(folder, "result.json"), result)
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

    def objective(flat):                               # with its gradient: autograd makes it a fifth slower
        Signals.poll()
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
    x, z, y = train / scale, test / scale, task.train.labels
    held = torch.zeros(len(y), dtype=torch.bool)
    held[stratified(y, max(1, len(y) // 5))] = True
    if not (~held).any() or (y.dim() == 1 and len(y[~held].unique()) < len(y.unique())):
        held[:] = False                                # one image a class: nothing can be held out
    predict = lambda w, q: q @ torch.from_numpy(w[:-1]).float() + torch.from_numpy(w[-1]).float()
    grid, results, start = 10.0 ** np.arange(0, -7, -1.0), [], None
    for decay in grid if held.any() else []:
        w = logistic_fit(x[~held], y[~held], decay, start, 1e-3)
        start = w.flatten()
        results.append(score(predict(w, x[held]), y[held], task.metric))
    decay = grid[int(np.argmax(results))] if results else 1e-3
    return score(predict(logistic_fit(x, y, decay), z), task.test.labels, task.metric), float(decay)


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


def png(path, draw):
    """A picture by matplotlib, drawn by draw(axes), if that is installed."""
    try:
        import matplotlib
    except ImportError:
        say(f"  (no {os.path.basename(path)}: matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 3.5))
    draw(axes)
    axes.legend()
    with sdrnet.whole(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_histogram(axes, result, scores):
    axes.hist(scores[np.isfinite(scores)], bins=24, color="#4477aa")
    axes.axvline(result["chosen"]["train"], color="#cc3311", label=f"chosen sub-net {result['chosen']['index']}")
    axes.axvline(result["largest"]["train"], color="black", linestyle="--", label="largest network")
    axes.set(title=f"{result['task']}: {len(scores)} sub-nets".replace("$", r"\$"), xlabel=f"leave-one-out kNN on the training images, {result['metric']}, %", ylabel="sub-nets")


def draw_gains(axes, results, gains):
    for n, (measure, values) in enumerate(gains.items()):
        axes.barh(np.arange(len(results)) + 0.4 * n, values, 0.4, label=measure)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(np.arange(len(results)) + 0.2 * (len(gains) - 1), [r["task"].replace("$", r"\$") for r in results])
    axes.invert_yaxis()
    axes.set(title="routed sub-net, over the largest network", xlabel="points on the test images")


def export(plain, size, path):
    """A torch.export file: loads with torch.export.load(path).module() where no class of ours exists."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(plain.float(), (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    with sdrnet.whole(path) as file:
        torch.export.save(program, file)


def route(net, content, task, others, args, device):
    """One task: search, report, files. others: {name: network} to compare with. Returns result.json's content."""
    k, began = min(args.k, len(task.train) - 1), time.time()
    if k < args.k:
        say(f"  {task.name}: {len(task.train)} training images, so k shrinks from {args.k} to {k}")
    base = {name: [embed(other, part, size=part.packed.shape[-1], device=device, amp=args.amp) for part in (task.train, task.test)] for name, other in others.items()}
    search, extra = time.time(), {}
    if args.search == "all":
        choice, tests = scores, tests = search_all(net, task, device, args.amp, k)
    elif args.search == "halving":
        choice, extra["passes"] = search_halving(net, task, device, args.amp, k)
        say(f"  halving did {100 * extra['passes']:.0f} % of the {net.groups ** 4} x {len(task.train)} image passes that scoring everything takes")
    else:
        choice = search_centroid(base["largest"][0], content)
        extra["share_of_images"] = float(choice.max())
        say(f"  {choice.max():.0f} % of the images, more than of any other, belong to cluster {int(choice.argmax())}")
    extra["search_seconds"] = round(time.time() - search, 2)
    chosen = int(np.nanargmax(choice))                 # ties: the lowest index
    if args.search != "all":                           # of the chosen one alone what is to be reported
        scores, tests = search_all(net, task, device, args.amp, k, [chosen])
        scores = choice if args.search == "halving" else scores
    result = {"task": task.name, "metric": task.metric, "search": args.search, "k": k, "temperature": 0.07,
              "train_images": len(task.train), "test_images": len(task.test), "classes": len(task.train.classes), "scored": int(np.isfinite(scores).sum()), "chosen": {
                  "index": chosen, "path": list(index_to_path(chosen, net.groups)), "train": float(scores[chosen]), "test": float(tests[chosen])},
              **{name: {"train": loo_score(f[0], task, k), "test": knn_score(*f, task, k)} for name, f in base.items()}}
    if args.search == "all":
        result["mean"], best = {"train": float(scores.mean()), "test": float(tests.mean())}, int(tests.argmax())
        result["best"] = {"index": best, "train": float(scores[best]), "test": float(tests[best])}
    if args.probe:
        pair = [tree_features(net, part.packed, [chosen], device, args.amp)[chosen] for part in (task.train, task.test)]
        for name, (train, test) in {"chosen": pair, **base}.items():
            result[name]["probe"], result[name]["probe_decay"] = probe(train, test, task)
    result |= {"gain": result["chosen"]["test"] - result["largest"]["test"], "seconds": round(time.time() - began, 2), **extra}
    report(result, scores, tests, net)
    if rank() == 0:
        write(net, content, result, scores, tests, args)
    return result


def report(result, scores, tests, net):
    """A ranked table, the histogram, the gain."""
    ranked, chosen = [i for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])], result["chosen"]["index"]
    say(f"  {'rank':>4} {'sub-net':>8} {'path':>12} {'leave-one-out':>14} {'test':>8}   ({result['metric']}, %)")
    for n, i in list(enumerate(ranked, 1))[:5]:
        test = f"{tests[i]:8.2f}" if np.isfinite(tests[i]) else f"{'':8}"
        say(f"  {n:4d} {i:8d} {str(index_to_path(i, net.groups)):>12} {scores[i]:14.2f} {test}" + ("  <- chosen" if i == chosen else ""))
    for name in [n for n in ("largest", "simsiam", "mean") if n in result]:
        say(f"  {'':4} {name:>21} {result[name]['train']:14.2f} {result[name]['test']:8.2f}")
    if len(ranked) > 1:
        say(histogram(scores, chosen, result["largest"]["train"]))
    if "probe" in result["chosen"]:
        say("  linear probe: " + ", ".join(f"{n} {result[n]['probe']:.2f} %" for n in ("chosen", "largest", "simsiam") if n in result))
    say(f"  {result['task']}: sub-net {chosen} {result['chosen']['test']:.2f} % on test, {result['gain']:+.2f} over the largest network; {result['seconds']:.0f} s")


def write(net, content, result, scores, tests, args):
    """The task's folder of files."""
    path = lambda name: os.path.join(args.out, result["task"], name)
    write_subnet(net.extract(result["chosen"]["path"]).cpu(), content, path(""), result["task"], {"index": result["chosen"]["index"]}, args)
    save_array(path("scores.npy"), scores.astype(np.float32))
    save_array(path("test_scores.npy"), tests.astype(np.float32))
    if np.isfinite(scores).sum() > 1:
        png(path("histogram.png"), lambda axes: draw_histogram(axes, result, scores))
    if os.path.exists(path("cluster.png")):            # perhaps of another run
        os.remove(path("cluster.png"))
    if args.clusters_shown is not None:
        images, clusters = args.clusters_shown
        members = np.flatnonzero(clusters == result["chosen"]["index"])
        members = np.random.default_rng(0).permutation(members)[:48]
        contact_sheet(images, [members[a:a + 12] for a in range(0, len(members), 12)], path("cluster.png"))
    save_json(path("result.json"), result)


def write_subnet(plain, content, folder, task, which, args):
    """subnet.pt of a plain network, and subnet.pt2 with --export, in the task's folder."""
    path = lambda name: os.path.join(folder, name)
    os.makedirs(folder, exist_ok=True)
    out = sdrnet.checkpoint(plain, "subnet", origin={"checkpoint": args.checkpoint, "task": task, **which})
    out["config"]["image_size"] = content["config"]["image_size"]
    sdrnet.save(path("subnet.pt"), out)
    if args.export:
        export(plain, content["config"]["image_size"], path("subnet.pt2"))


def summary(results, names, picture):
    """One table of all tasks: test percent, the gain of the routed sub-net with a bar, the average, as in the paper."""
    columns, gains = ["chosen"] + names, {}
    for measure, title in (("test", "kNN"), ("probe", "linear probe")):
        if measure not in results[0]["chosen"]:
            continue
        rows = np.array([[r[c][measure] for c in columns] for r in results])
        gains[title] = gain = rows[:, 0] - rows[:, 1]
        say(f"\n{title} on test images, %\n  {'task':<16} {'metric':<15}" + "".join(f"{('routed' if c == 'chosen' else c):>10}" for c in columns) + f"{'gain':>8}")
        for task, metric, row, g in [(r["task"], r["metric"], *v) for r, *v in zip(results, rows, gain)] + [("average", "", rows.mean(0), gain.mean())]:
            bar = "#" * round(12 * abs(g) / max(np.abs(gain).max(), 1e-9))
            say(f"  {task:<16} {metric:<15}" + "".join(f"{v:10.2f}" for v in row) + f"{g:+8.2f}  " + (f"{bar:>12}|" if g < 0 else f"{'':12}|{bar}"))
    if rank() == 0:
        png(picture, lambda axes: draw_gains(axes, results, gains))


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
    group.add_argument("--budget-gflops", type=number(float, 0), nargs=2, metavar=("LO", "HI"), help="search sizes instead: DATA, see above")
    group.add_argument("--samples", type=number(int, 1), default=40, help="sizes that --budget-gflops scores")
    group.add_argument("--k", type=number(int, 1), default=20, help="neighbours that vote")
    group.add_argument("--max-images", type=number(int, 2), default=5000, help="of a task's train and of its test part, each class alike")
    group.add_argument("--probe", action="store_true", help="linear probe of what is chosen, the largest network and SimSiam")
    group.add_argument("--export", action="store_true", help="write subnet.pt2 by torch.export")
    group.add_argument("--workers", type=number(int, 0, 1024), default=min(8, CORES))
    common_options(parser)
    args = parser.parse_args(argv)
    if args.budget_gflops and (args.search != "all" or args.simsiam not in (None, "none")):
        raise InputError("--budget-gflops searches sizes; --search and --simsiam go with sub-nets")
    if args.budget_gflops:
        parser.idle(args, ("data", "clusters"), "with --budget-gflops")
    else:
        parser.idle(args, ("samples",), "without --budget-gflops")
    return args


def shown_clusters(args, content):
    """(images, clusters) behind the sub-nets, for pictures, where they are at hand; else None."""
    config = content.get("origin", {}).get("config", {})
    data, file = args.data or ("toy" if config.get("data") == "toy" else None), args.clusters or os.path.join(args.out, "clusters.npy")
    if args.clusters and data is None:
        raise InputError(f"--clusters {file} shows images: name them with --data")
    if data is None or not args.clusters and not os.path.isfile(file):
        return None
    images = open_images(argparse.Namespace(data=data, root=args.root, download=False, subset=config.get("subset"), seed=config.get("seed", 0), max_bad=1.0, out=args.out))
    try:
        clusters = load_clusters(file, images)[0]
    except InputError:                                 # of another run, left in --out?
        if args.clusters:
            raise
        clusters = np.zeros(0)
    if hashlib.sha256(clusters.tobytes()).hexdigest() != config.get("clusters_sha256"):
        say(f"{file} is not what {args.checkpoint} was trained on: no cluster.png")
        return None
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
        return summary([search_sizes(net, content, decoded(task, size, args.max_images, args.workers), args, device) for task in tasks], ["largest"], os.path.join(args.out, "gain_sizes.png"))
    args.clusters_shown = shown_clusters(args, content)
    say(f"{args.checkpoint}: {net.groups ** 4} sub-nets of {net.config['arch']} width {net.config['width']}; {len(tasks)} task(s), --search {args.search}")
    results = []
    for task in tasks:
        say(f"{task.name}: {len(task.train.classes)} classes, {len(task.train):,} training and {len(task.test):,} test images")
        results.append(route(net, content, decoded(task, size, args.max_images, args.workers), others, args, device))
    summary(results, list(others), os.path.join(args.out, "gain.png"))


if __name__ == "__main__":
    run(main, "route.py")
