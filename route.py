"""route.py - "here is my task: which sub-net?" Scores all sub-nets on a task and exports the best.

    python route.py                                          # the toy tasks, runs/toy/sdrnet.pt
    python route.py --out runs/photos --data photos/ --task pets/ --task cars/
    python route.py --out runs/in1k --task aircraft --task dtd --root /datasets --probe
    torchrun --nproc_per_node 8 route.py --out runs/in1k --task aircraft ... # tasks are shared out
    python route.py --network runs/toy/simsiam.pt --out runs/simsiam     # any network of ours

In the paper's terms (SDR, "deployment"): a k-nearest-neighbour classifier on frozen features scores
every sub-net W_i. What CHOOSES is its leave-one-out score on the task's training images: each is
classified by the others. Test images only report. The sub-nets are run as a tree, each prefix of a
path once. Where all score alike nothing can be chosen, and the largest network W_0 is taken.

In:   <out>/sdrnet.pt, or --network
      --task   a folder with train/ and test/, in each a folder a class; or by name, below --root as
               torchvision has them, each with its own split and metric: aircraft caltech101 cars
               cifar10 cifar100 dtd flowers food pets sun397 voc2007
Out:  <out>/<task>/scores.npy       float32 (g^4,), leave-one-out on training images, in percent
                   test_scores.npy  float32 (g^4,), on test images; never used to choose
                   subnet.pt        the chosen sub-net, a plain ResNet: sdrnet.load_network
                   result.json      path, scores, protocol, origin
                   story.png        the task, the images that its sub-net learned from, the scores
                   histogram.png    with matplotlib, and <out>/gains.png

Measured on one core (AMD EPYC, AVX2, torch 2.14): 16 toy sub-nets on 400 + 400 images in 10 s.

Not known from the paper: on which images the kNN scores are taken. Here, for speed, on 5,000
training images of a task at most; published figures use all: --max-train 1000000.
"""
import argparse
import functools
import hashlib
import math
import os
import sys
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.optimize import minimize
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets

import sdrnet
from sdrnet import InputError

# ------------------------------------------------------------------------------------ tasks

class Task(NamedTuple):
    """train, test: data sets of uint8 (3, S, S); labels: int64 (N,), or (N, C) of 1, 0 and -1,
    which does not count; classes: how many; metric: top-1, mean-per-class or mAP."""
    name: str
    train: Dataset
    train_labels: torch.Tensor
    test: Dataset
    test_labels: torch.Tensor
    classes: int
    metric: str = "top-1"


def open_task(name, size, root=None, download=False):
    """A task by name or folder, its images cropped to `size`. Raises InputError."""
    crop = functools.partial(sdrnet.center_crop, size=size)
    if name in NAMED and (root or not os.path.isdir(name)):
        return named_task(name, crop, root, download)
    classes, parts = None, []
    for part in ("train", "test"):
        folder = os.path.join(name, part)
        if not os.path.isdir(folder):
            raise InputError(f"task {name}: no folder {folder}; a task is a folder with train/ and "
                             f"test/ of a folder a class, or, in route.py, {', '.join(NAMED)}")
        names = sdrnet.list_images(folder)
        if any(os.sep not in path for path in names):
            raise InputError(f"task {name}: {folder} holds images outside of class folders")
        class_of = [path.split(os.sep)[0] for path in names]
        classes = classes or sorted(set(class_of))     # those of train/
        unknown = sorted(set(class_of) - set(classes))
        if unknown:
            raise InputError(f"task {name}: {folder} has class {unknown[0]}, which train/ lacks")
        labels = torch.tensor([classes.index(c) for c in class_of])
        parts += [sdrnet.Images(folder, names, crop), labels]
    return Task(os.path.basename(os.path.abspath(name)), *parts, len(classes))


# Name: torchvision's data set, the splits that train, those that test, metric. The splits are the
# official ones; Caltech-101 has none: 30 images a class train; of SUN397 the first partition.
NAMED = {
    "aircraft": (datasets.FGVCAircraft, ["trainval"], ["test"], "mean-per-class"),
    "caltech101": (datasets.Caltech101, ["train"], ["test"], "mean-per-class"),
    "cars": (datasets.StanfordCars, ["train"], ["test"], "top-1"),
    "cifar10": (datasets.CIFAR10, ["train"], ["test"], "top-1"),
    "cifar100": (datasets.CIFAR100, ["train"], ["test"], "top-1"),
    "dtd": (datasets.DTD, ["train", "val"], ["test"], "top-1"),
    "flowers": (datasets.Flowers102, ["train", "val"], ["test"], "mean-per-class"),
    "food": (datasets.Food101, ["train"], ["test"], "top-1"),
    "pets": (datasets.OxfordIIITPet, ["trainval"], ["test"], "mean-per-class"),
    "sun397": (datasets.SUN397, ["Training_01"], ["Testing_01"], "top-1"),
    "voc2007": (datasets.VOCDetection, ["trainval"], ["test"], "mAP"),
}
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()


class Cropped(Dataset):
    """A torchvision data set's images, uint8 (3, S, S), or the sentence that one cannot be read."""

    def __init__(self, data, crop, name):
        self.data, self.crop, self.name = data, crop, name

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        try:
            image = np.array(self.data[i][0].convert("RGB"))
            return self.crop(torch.from_numpy(image).permute(2, 0, 1))
        except Exception as error:                     # PIL raises nearly anything on a bad file
            return f"{self.name}: image {i} cannot be read ({sdrnet.first_line(error)})"


def named_task(name, crop, root, download):
    """One of the paper's eleven tasks. Raises InputError where torchvision cannot read it."""
    if not root:
        raise InputError(f"task {name}: name the folder that it lies in by route.py's --root")
    make, train, test, metric = NAMED[name]
    try:
        parts = []
        for splits in (train, test):
            data = [read_split(name, make, split, root, download) for split in splits]
            labels = torch.cat([torch.as_tensor(read_labels(part)) for part in data])
            parts += [Cropped(ConcatDataset(data), crop, name), labels]
    except Exception as error:                         # torchvision raises nearly anything here
        raise InputError(f"task {name} cannot be read ({sdrnet.first_line(error)}); is --root right"
                         "? --download fetches all but cars and sun397's partitions") from None
    count = parts[1].shape[1] if metric == "mAP" else int(parts[1].max()) + 1
    return Task(name, *parts, count, metric)


def read_split(name, make, split, root, download):
    """One split of a torchvision data set: a data set."""
    if name in ("cifar10", "cifar100"):
        return make(root, train=split == "train", download=download)
    if name == "cars":
        return make(root, split=split)
    if name == "voc2007":
        return make(root, year="2007", image_set=split, download=download)
    if name == "caltech101":
        data = make(root, download=download)
        labels = np.asarray(data.y)
        order = np.random.default_rng(0).permutation(len(labels))
        train = [i for c in np.unique(labels) for i in order[labels[order] == c][:30]]
        test = np.setdiff1d(np.arange(len(labels)), train)
        return Subset(data, sorted(train) if split == "train" else test.tolist())
    if name == "sun397":
        data = make(root, download=download)
        place = {str(file).split("SUN397")[-1]: i for i, file in enumerate(data._image_files)}
        with open(os.path.join(root, "SUN397", f"{split}.txt")) as lines:
            return Subset(data, [place[line.strip()] for line in lines if line.strip()])
    return make(root, split=split, download=download)


def read_labels(data):
    """Labels of a torchvision data set, without decoding its images: int64 (N,); of VOC (N, 20)."""
    if isinstance(data, Subset):
        return np.asarray(read_labels(data.dataset))[data.indices]
    if isinstance(data, datasets.VOCDetection):
        return np.array([voc_labels(path) for path in data.annotations])
    for attribute in ("targets", "_labels", "y"):
        if hasattr(data, attribute):
            return np.asarray(getattr(data, attribute))
    return np.asarray([label for _, label in data._samples])


def voc_labels(path):
    """Of a VOC annotation, (20,): 1 where a class is there, 0 where not, -1 where all its objects
    are marked difficult, so that the image does not count for it."""
    labels = np.zeros(len(VOC_CLASSES), np.int64)
    for thing in ElementTree.parse(path).iter("object"):
        c = VOC_CLASSES.index(thing.findtext("name"))
        if thing.findtext("difficult") != "1":
            labels[c] = 1
        elif labels[c] == 0:
            labels[c] = -1
    return labels


def limit_training(task, most):
    """The task with at most `most` training images, of each class as many as of the others."""
    labels, n = task.train_labels, len(task.train_labels)
    if n <= most:
        return task
    kinds = labels.numpy() if labels.dim() == 1 else np.zeros(n, int)
    drawn = np.random.default_rng(0).permutation(n).argsort()          # each image's turn
    by_class = np.lexsort((drawn, kinds))
    turn = np.arange(n) - np.searchsorted(kinds[by_class], kinds[by_class])    # in its class
    chosen = np.sort(by_class[np.lexsort((drawn[by_class], turn))[:most]])
    return task._replace(train=Subset(task.train, chosen.tolist()), train_labels=labels[chosen])


# ------------------------------------------------------------------------------------ scoring

def knn(train, labels, test=None, k=20, temperature=0.07, chunk=1024):
    """Weighted nearest neighbours: each class's share of the votes, float32 (Q, C).

    train (N, D), test (Q, D): features; labels: int64 (N,), or (N, C) of 0 and 1. The k training
    images of the highest cosine vote with exp(cos / temperature); k is N at most. test None: leave
    one out, each training image being classified by the others."""
    train = F.normalize(train.float(), dim=1)
    queries = train if test is None else F.normalize(test.float(), dim=1)
    votes = (labels if labels.dim() > 1 else F.one_hot(labels)).float()
    k = min(k, len(train))
    shares = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start:start + chunk] @ train.T            # (chunk, N)
        if test is None:
            similarity.diagonal(start).fill_(-math.inf)                # votes with weight 0
        near, index = similarity.topk(k, dim=1)                        # (chunk, k)
        weight = torch.softmax(near / temperature, dim=1)              # exp, without overflow
        shares.append(torch.einsum("qk,qkc->qc", weight, votes[index]))
    return torch.cat(shares)


def measure(shares, labels, metric):
    """Percent. shares (Q, C): scores of the classes; labels int64 (Q,), for mAP (Q, C) of 1, 0, -1.

    mean-per-class: the mean of the classes' accuracies. mAP: the mean of VOC2007's 11-point average
    precisions over classes with a positive image; an image of label -1 does not count."""
    if metric != "mAP":
        right = (shares.argmax(1) == labels).double()
        if metric == "top-1":
            return 100 * right.mean().item()
        return 100 * (torch.bincount(labels, right) / torch.bincount(labels)).nanmean().item()
    precisions = []
    for scores, truth in zip(shares.T, labels.T):
        scores, truth = scores[truth >= 0], truth[truth >= 0]
        hit = truth[scores.argsort(descending=True, stable=True)].double()
        if hit.sum() == 0:
            continue
        recall = hit.cumsum(0) / hit.sum()
        precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
        points = [precision[recall >= r - 1e-9].max().item() for r in np.linspace(0, 1, 11)]
        precisions.append(np.mean(points))
    return 100 * float(np.mean(precisions))


@torch.no_grad()
def run_network(run, dataset, device, amp="auto", workers=0, batch=256):
    """Features of a data set by many networks: {key: float32 (N, D)}, on this process alone.

    run(images (B, 3, S, S)) -> pairs (key, features (B, D))."""
    parts = {}
    blocks = [range(a, min(a + batch, len(dataset))) for a in range(0, len(dataset), batch)]
    batches = sdrnet.load_batches(dataset, blocks, workers)
    for samples in sdrnet.progress(batches, "batches of features", len(blocks)):
        x = sdrnet.normalise(torch.stack(samples).to(device).float() / 255)
        with sdrnet.autocast(device, amp):
            for key, f in run(x):
                parts.setdefault(key, []).append(f.float().cpu())
    return {key: torch.cat(part) for key, part in parts.items()}


def task_features(net, task, device, amp="auto", workers=0):
    """W_0's, or a plain network's, of a task's training and test images: (N, D), (M, D)."""
    return [run_network(lambda x: [(None, net(x))], part, device, amp, workers)[None]
            for part in (task.train, task.test)]


def knn_accuracy(train, test, task, k=20):
    """(leave-one-out percent on the training images, percent on the test images) of features."""
    votes = task.train_labels.clamp(min=0)
    return (measure(knn(train, votes, None, k), task.train_labels, task.metric),
            measure(knn(train, votes, test, k), task.test_labels, task.metric))


def score_all_paths(net, task, k, device, amp="auto", workers=0):
    """Leave-one-out and test scores of all sub-nets, percent: two float32 (g^4,).

    Run as a tree, the sub-trees of the first digit in turn: features of g^3 sub-nets at a time."""
    scores, tests = np.zeros((2, net.groups ** sdrnet.STAGES), np.float32)
    for digit in range(net.groups):
        def subtree(x):
            return net.tree(net.stage(0, net.stem(x), (digit,)), (digit,))
        train = run_network(subtree, task.train, device, amp, workers)
        test = run_network(subtree, task.test, device, amp, workers)
        for path in train:
            index = sdrnet.path_to_index(path, net.groups)
            scores[index], tests[index] = knn_accuracy(train[path], test[path], task, k)
    return scores, tests


def linear_probe(train, labels, test, decay):
    """Logits (M, C) of test features by logistic regression on training features, whose rms divides
    both; for labels (N, C) of 0 and 1 C binary ones. L-BFGS: cross-entropy + decay / 2 |W|^2."""
    scale = train.pow(2).mean().sqrt().clamp(min=1e-12)
    x, test = train / scale, test / scale
    classes = labels.shape[1] if labels.dim() > 1 else int(labels.max()) + 1
    shape = (x.shape[1] + 1, classes)                  # the last row is the bias

    def objective(flat):
        w = torch.from_numpy(flat).float().view(shape).requires_grad_()
        logits = x @ w[:-1] + w[-1]
        if labels.dim() > 1:
            error = F.binary_cross_entropy_with_logits(logits, labels.float()) * classes
        else:
            error = F.cross_entropy(logits, labels)
        loss = error + decay / 2 * w[:-1].pow(2).sum()
        loss.backward()
        return loss.item(), w.grad.double().flatten().numpy()
    found = minimize(objective, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B",
                     options={"maxiter": 1000, "gtol": 1e-6})
    w = torch.from_numpy(found.x).float().view(shape)
    return test @ w[:-1] + w[-1]


def probe_accuracy(train, test, task):
    """Percent on the test images of a linear probe, whose decay a held-out fifth of the training
    images has chosen from 1 to 1e-6. Returns it and the decay."""
    labels, order = task.train_labels, np.random.default_rng(0).permutation(len(train))
    held, rest = order[:len(order) // 5], order[len(order) // 5:]
    votes = labels.clamp(min=0)
    grid = [10.0 ** -power for power in range(7)]
    scores = [measure(linear_probe(train[rest], votes[rest], train[held], decay),
                      labels[held], task.metric) for decay in grid]
    decay = grid[int(np.argmax(scores))]
    return measure(linear_probe(train, votes, test, decay), task.test_labels, task.metric), decay


# ------------------------------------------------------------------------------------ choice

def choose(scores):
    """The index of the best leave-one-out score, the first among equals; None where all are alike,
    as with one training image a class: then nothing can be chosen."""
    return None if scores.max() == scores.min() else int(scores.argmax())


def near_duplicates(train, labels):
    """The share of images whose nearest other one is nearly the same, a cosine of centred features
    (N, D) above 0.98, and has the same labels: leave-one-out then asks what it has seen."""
    f, count = F.normalize(train - train.mean(0), dim=1), 0
    for start in range(0, len(f), 1024):
        similarity = f[start:start + 1024] @ f.T                       # (1024, N)
        similarity.diagonal(start).fill_(-1)
        cosine, nearest = similarity.max(1)
        same = (labels[nearest] == labels[start:start + 1024]).view(len(nearest), -1).all(1)
        count += ((cosine > 0.98) & same).sum().item()
    return count / len(f)


def score_network(net, task, args, device):
    """The beginning of result.json: the task, and how W_0, or a plain network, does on it."""
    train, test = task_features(net, task, device, args.amp, args.workers)
    if near_duplicates(train, task.train_labels) > 0.5:
        print(f"{task.name}: warning: most training images have a near-duplicate among them, as in "
              "a film or by a network near collapse, so leave-one-out scores mean little")
    largest = dict(zip(("score", "test"), knn_accuracy(train, test, task, args.k)))
    if args.probe:
        largest["probe"], largest["probe_decay"] = probe_accuracy(train, test, task)
    return {"task": task.name, "metric": task.metric, "k": min(args.k, len(train)),
            "temperature": 0.07, "train_images": len(task.train), "test_images": len(task.test),
            "classes": task.classes, "largest": largest, "origin": {
                "command": " ".join(sys.argv), "network": args.network, "weights": args.weights}}


def choose_subnet(net, task, result, args, device):
    """Scores all sub-nets, chooses one, writes and shows it; adds to `result` what was found."""
    place = functools.partial(os.path.join, args.out, task.name)
    scores, tests = score_all_paths(net, task, args.k, device, args.amp, args.workers)
    index, path = choose(scores), None
    if index is None:
        print(f"{task.name}: all sub-nets score alike, {scores[0]:.1f} %: none can be chosen, so "
              "the largest network is taken")
        chosen = {"index": None, "path": None, **result["largest"]}
    else:
        path = sdrnet.index_to_path(index, net.groups)
        chosen = {"index": index, "path": list(path), "score": float(scores[index]),
                  "test": float(tests[index])}
    plain = net.extract(path)
    if args.probe:
        features = task_features(plain, task, device, args.amp, args.workers)
        chosen["probe"], chosen["probe_decay"] = probe_accuracy(*features, task)
    result["chosen"] = chosen
    result["mean"] = {"score": float(scores.mean()), "test": float(tests.mean())}
    result["best_by_test"] = {"index": int(tests.argmax()), "test": float(tests.max())}
    sdrnet.save_file(place("scores.npy"), functools.partial(np.save, arr=scores))
    sdrnet.save_file(place("test_scores.npy"), functools.partial(np.save, arr=tests))
    sdrnet.save_checkpoint(place("subnet.pt"), {
        "kind": "subnet", "config": plain.config, "image_size": args.image_size, "path": path,
        "backbone": plain.state_dict(), "origin": result["origin"]})
    print_ranking(result, scores, tests, net.groups)
    draw_story(result, task, args, place("story.png"))
    save_plot(place("histogram.png"), functools.partial(draw_histogram, result, scores))


def route_task(net, task, args, device):
    """All of one task. Returns result.json's content."""
    folder = os.path.join(args.out, task.name)
    sdrnet.make_folder(folder)
    result = score_network(net, task, args, device)
    if isinstance(net, sdrnet.SDRNet) and net.prefix_statistics():
        choose_subnet(net, task, result, args, device)
    elif os.path.exists(os.path.join(folder, "subnet.pt")):
        raise InputError(f"{folder} is of a supernet: give another --out for {args.network}")
    sdrnet.save_json(os.path.join(folder, "result.json"), result)
    return result


# ------------------------------------------------------------------------------------ what is shown

def print_ranking(result, scores, tests, groups):
    """The five best sub-nets of a task, by the score that chooses."""
    print(f"{result['task']}: {result['classes']} classes, {result['train_images']:,} training and "
          f"{result['test_images']:,} test images, kNN {result['metric']} in %")
    print("   sub-net          path  leave-one-out   test")
    for index in np.argsort(-scores, kind="stable")[:5]:
        path = str(sdrnet.index_to_path(index, groups))
        print(f"  {index:8d}  {path:>12}  {scores[index]:13.2f}  {tests[index]:5.2f}")
    for name in ("largest", "mean"):
        print(f"  {name:>22}  {result[name]['score']:13.2f}  {result[name]['test']:5.2f}")
    if result["largest"]["score"] > scores.max():
        print("  the largest network scores higher than any sub-net; the best of these is exported")


def print_summary(results):
    """One table of all tasks: percent on test images, kNN and where there is one the probe. noise:
    sqrt(p (1 - p) / n), the std of an accuracy p on n images; for mAP a rough guide."""
    for key in ("test", "probe"):
        if key not in results[0]["largest"]:
            continue
        print(f"\n{'kNN' if key == 'test' else 'linear probe'} on the test images, %\n"
              f"  {'task':<16} {'metric':<15} {'routed':>7} {'largest':>8} {'gain':>6}  noise")
        rows = []
        for result in results:
            pair = [result.get("chosen", result["largest"])[key], result["largest"][key]]
            rows.append(pair)
            noise = math.sqrt(pair[1] * (100 - pair[1]) / result["test_images"])
            print(f"  {result['task']:<16} {result['metric']:<15} {pair[0]:7.2f} {pair[1]:8.2f} "
                  f"{pair[0] - pair[1]:+6.2f} {noise:6.2f}")
        routed, largest = np.mean(rows, axis=0)
        print(f"  {'average':<32} {routed:7.2f} {largest:8.2f} {routed - largest:+6.2f}")


def draw_story(result, task, args, path, columns=12, tile=64):
    """A picture of the routing: the task's images, those its sub-net was trained on, scores."""
    chosen, some = result["chosen"], np.linspace(0, len(task.train) - 1, columns).astype(int)
    groups = [(f"task {task.name}: {task.classes} classes, {len(task.train):,} training images, "
               "such as", [task.train[i] for i in some.tolist()])]
    pool = cluster_images(args, chosen["index"], 2 * columns)
    if pool:
        groups.append((f"routed to sub-net {chosen['index']}, path {tuple(chosen['path'])}, "
                       "trained on a cluster of images, such as", pool))
    gain = chosen["test"] - result["largest"]["test"]
    groups.append((f"kNN on {result['test_images']:,} test images: {chosen['test']:.1f} %, the "
                   f"largest network {result['largest']['test']:.1f} %: {gain:+.1f} points", []))
    line, gap = 26, 3
    heights = [line + -(-len(images) // columns) * (tile + gap) for _, images in groups]
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, sum(heights) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for (text, images), height in zip(groups, heights):
        draw.text((gap, y + 5), text, fill="black", font=ImageFont.load_default(size=15))
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile))
            place = (gap + i % columns * (tile + gap), y + line + i // columns * (tile + gap))
            sheet.paste(picture, place)
        y += height
    sdrnet.save_file(path, functools.partial(sheet.save, format="PNG"))


def cluster_images(args, index, count):
    """Up to `count` images of a cluster, uint8 (3, S, S); none where the files are not there."""
    files = [os.path.join(args.out, name) for name in ("clusters.npy", "images.txt")]
    if index is None or not all(map(os.path.exists, files)):
        return []
    clusters, names = np.load(files[0]), sdrnet.load_names(files[1])
    if hashlib.sha256(clusters.astype(np.int64).tobytes()).hexdigest()[:16] != args.trained_on:
        print(f"{files[0]} is not what {args.network} was trained on: its images are not shown")
        return []
    members = np.flatnonzero(clusters == index)
    members = members[np.linspace(0, len(members) - 1, min(count, len(members))).astype(int)]
    crop = functools.partial(sdrnet.center_crop, size=args.image_size)
    images = sdrnet.Images(args.data, [names[i] for i in members], crop)
    shown = [image for image in images if not isinstance(image, str)]
    if len(shown) < len(members):
        print(f"{files[1]} names images that {args.data} lacks: give --data; they are not shown")
    return shown


def save_plot(path, draw):
    """Has draw(axes) fill a plot and writes it. Returns False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    draw(figure.subplots())
    sdrnet.save_file(path, functools.partial(figure.savefig, format="png", dpi=120))
    return True


def draw_histogram(result, scores, axes):
    """How many sub-nets score what on a task (the paper's claim that they differ)."""
    axes.hist(scores, bins=24, color="#88aacc")
    axes.axvline(result["chosen"]["score"], color="#aa3311", label="chosen")
    axes.axvline(result["largest"]["score"], color="black", linestyle="--", label="largest network")
    axes.set_xlabel(f"leave-one-out kNN on training images, {result['metric']}, %")
    axes.set_ylabel("sub-nets")
    axes.set_title(f"{result['task']}: {len(scores)} sub-nets".encode(errors="replace").decode())
    axes.figure.legend(loc="outside right upper")


def draw_gains(results, axes):
    """Each task's gain over the largest network."""
    gains = [result["chosen"]["test"] - result["largest"]["test"] for result in results]
    names = [result["task"].encode(errors="replace").decode() for result in results]
    axes.barh(names, gains, color="#88aacc")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("routed sub-net over the largest network, points of kNN on test images")


# ------------------------------------------------------------------------------------ command

def build_parser():
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    group = parser.add_argument_group("files")
    group.add_argument("--task", action="append", help="a folder with train/ and test/, or a name; "
                       "may be repeated; default: all folders of runs/toy/tasks")
    group.add_argument("--out", default="runs/toy", help="folder of the run's files: runs/toy")
    group.add_argument("--network", help="checkpoint to score; default: <out>/sdrnet.pt")
    group.add_argument("--data", default="runs/toy/images",
                       help="the images that it was trained on, for story.png: runs/toy/images")
    group.add_argument("--root", help="folder of torchvision's data sets")
    group.add_argument("--download", action="store_true", help="let torchvision fetch them")
    group = parser.add_argument_group("scoring")
    group.add_argument("--k", type=sdrnet.number(int, 1), default=20, help="votes of kNN: 20")
    group.add_argument("--max-train", type=sdrnet.number(int, 2), default=5000,
                       help="training images of a task that are used, each class alike: 5000")
    group.add_argument("--probe", action="store_true", help="also a linear probe of what is chosen")
    group = parser.add_argument_group("run")
    group.add_argument("--workers", type=sdrnet.number(int, 0), default=min(8, os.cpu_count()),
                       help="processes that read images; 0: this one does")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                       help="auto: cuda where there is one")
    group.add_argument("--amp", choices=("auto", "off"), default="auto",
                       help="auto: bf16 where the hardware has it")
    return parser


def run(args):
    """The command, from the options on."""
    device = sdrnet.setup(args.device)
    args.network = args.network or os.path.join(args.out, "sdrnet.pt")
    net = sdrnet.load_network(args.network).to(device)
    content = sdrnet.load_checkpoint(args.network)
    args.image_size = content["image_size"]
    args.weights = hashlib.sha256(np.fromfile(args.network, np.uint8)).hexdigest()
    args.trained_on = content.get("origin", {}).get("arguments", {}).get("clusters")
    if not args.task:
        folder = os.path.join(sdrnet.toy_folder(), "tasks")
        args.task = sorted(entry.path for entry in os.scandir(folder))
        sdrnet.print0(f"no --task: the toy tasks of {folder}")
    names = [os.path.basename(os.path.abspath(name)) for name in args.task]
    if len(set(names)) < len(names):
        raise InputError(f"--task: two are named {max(names, key=names.count)}: rename one")
    tasks = [open_task(name, args.image_size, args.root, args.download)
             for name in args.task[sdrnet.rank()::sdrnet.world_size()]]        # shared out
    tasks = [limit_training(task, args.max_train) for task in tasks]
    results = [route_task(net, task, args, device) for task in tasks]
    if sdrnet.world_size() > 1:
        parts = [None] * sdrnet.world_size()
        dist.all_gather_object(parts, results)
        results = sorted((r for part in parts for r in part), key=lambda r: names.index(r["task"]))
    if sdrnet.rank() == 0:
        print_summary(results)
        if "chosen" in results[0]:
            path = os.path.join(args.out, "gains.png")
            if not save_plot(path, functools.partial(draw_gains, results)):
                print("no histogram.png, no gains.png: pip install matplotlib")
    if dist.is_initialized():
        dist.destroy_process_group()


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        run(args)
    except InputError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
