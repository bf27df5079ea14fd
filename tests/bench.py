"""bench.py - what the scripts cost, each figure against a plain reference measured beside it in the same run.

    python tests/bench.py                     # every row that this machine can do, about 15 minutes on two cores
    python tests/bench.py --only tree         # rows whose name contains "tree"
    python tests/bench.py --json bench.jsonl  # a line per row: row, figure, bar, holds, what was measured

Ratios are medians over pairs taken in turn (reference, ours, reference, ours, ...), so that a machine whose speed
drifts spoils both alike. The references do what the official recipes do: fp32, NCHW, per-image PIL transforms, one
model, one piece. Where a public package is the reference, the row is skipped with a word if it is not installed.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cluster
import detect_voc
import pretrain
import route
import sdrnet
from sdrnet import SDRNet

CPU = torch.device("cpu")
ROWS = {}


def row(name, bar, better="less"):
    """Registers a row: a function that returns (figure, dict of what was measured), or (None, why not)."""
    def register(function):
        ROWS[name] = function, bar, better
        return function
    return register


def paired(ours, reference, pairs=5):
    """Median seconds of two functions run in turn after one warm-up each."""
    ours(), reference()
    times = [], []
    for _ in range(pairs):
        for function, kept in ((reference, times[1]), (ours, times[0])):
            began = time.perf_counter()
            function()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_memory(function):
    """Anonymous memory (MB) that a function needs beyond what the process has, sampled every 5 ms (Linux)."""
    def rss():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
    before, peak, done = rss(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], rss())
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0.0, peak[0] - before)


# ---------------------------------------------------------------------------- references

def pil_views(pil, size, blur):
    """SimSiam's augmentation as the official recipe composes it, image by image, with torchvision on PIL."""
    from PIL import ImageFilter
    from torchvision import transforms as T

    class Blur:
        def __call__(self, image):
            return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))
    transform = T.Compose([T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2)]
                          + ([T.RandomApply([Blur()], 0.5)] if blur else []) + [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(pretrain.MEAN, pretrain.STD)])
    return [torch.stack([transform(p) for p in pil]) for _ in range(2)]


class PlainSimSiam(torch.nn.Module):
    """torchvision's ResNet-18 with a small stem, projector and predictor of torch modules: fp32, NCHW."""

    def __init__(self, width=64, head=2048, small=True):
        super().__init__()
        nn = torch.nn
        net = sdrnet.ResNet("resnet18", [width * 2 ** s for s in range(4)], width, small)
        self.f = nn.Sequential(net, nn.Linear(net.features, head, bias=False), nn.BatchNorm1d(head), nn.ReLU(), nn.Linear(head, head, bias=False), nn.BatchNorm1d(head, affine=False))
        self.h = nn.Sequential(nn.Linear(head, head // 4, bias=False), nn.BatchNorm1d(head // 4), nn.ReLU(), nn.Linear(head // 4, head))

    def forward(self, x1, x2):
        z1, z2 = self.f(x1), self.f(x2)
        p1, p2 = self.h(z1), self.h(z2)
        return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


def stepper(model, loss, lr=0.03):
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4)

    def step(*inputs):
        optimizer.zero_grad(set_to_none=True)
        loss(*inputs).backward()
        optimizer.step()
    return step


def our_step(width, groups, shared, small, head=2048):
    """A training step of ours on given views: bf16 where the machine has it, channels_last."""
    torch.manual_seed(0)
    model = pretrain.SDR(SDRNet("resnet18", width, groups, shared, small), width=head, shared_grad=False).to(memory_format=torch.channels_last)

    def loss(x, sub=None, paths=()):
        with pretrain.autocast(CPU, "auto"):
            return model(x, sub, paths)[0]
    return stepper(model, loss)


def random_views(count, size):
    return torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------- training

@row("simsiam step, end to end", 3.0, "more")
def simsiam_step_end_to_end():
    batch, images = 128, pretrain.toy_listing(512, 0)
    from PIL import Image
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images.packed[:batch]]
    reference, ours = PlainSimSiam(), our_step(64, 1, 0.5, True)
    plain = stepper(reference, reference)
    plan = pretrain.Plan(512, batch, 100, 0)
    steps = pretrain.training_batches(images, plan, 0, size=32, seed=0, device=CPU, workers=0, blurred=0.0)
    a, b = paired(lambda: ours(next(steps)[1]), lambda: plain(*pil_views(pil, 32, False)), 3)
    return b / a, {"ours_s": a, "reference_s": b, "batch": batch, "note": "ResNet-18 small stem, 32 px"}


@row("simsiam step, model only", 2.5, "more")
def simsiam_step():
    batch, reference, ours = 128, PlainSimSiam(), our_step(64, 1, 0.5, True)
    plain, x, y = stepper(reference, reference), random_views(256, 32), torch.randn(2, batch, 3, 32, 32)
    a, b = paired(lambda: ours(x), lambda: plain(*y), 3)
    return b / a, {"ours_s": a, "reference_s": b, "batch": batch}


@row("two views, 256 images at 32 px", 5.0, "more")
def views_32():
    from PIL import Image
    images = pretrain.toy_images(np.arange(256))[0]
    pil, u = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], pretrain.draws(0, 0, 256)
    a, b = paired(lambda: [pretrain.views(images, u[:, v], 32) for v in (0, 1)], lambda: pil_views(pil, 32, True))
    return b / a, {"ours_s": a, "reference_s": b, "note": "with blur in both"}


@row("two views, 64 decoded images at 224 px", 2.0, "more")
def views_224():
    from PIL import Image
    from torchvision.transforms.v2 import functional as T
    pil = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (375, 500, 3), dtype=np.uint8)) for i in range(64)]
    tensors, u = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pil], pretrain.draws(0, 0, 64)

    def ours():
        for v in (0, 1):
            crops = [T.resized_crop(t, *[int(n) for n in torch.stack(pretrain.crop_boxes(u[i:i + 1, v], 375, 500))[:, 0]], [224, 224], antialias=True) for i, t in enumerate(tensors)]
            pretrain.views(torch.stack(crops), u[:, v], 224, cropped=True)
    a, b = paired(ours, lambda: pil_views(pil, 224, True), 3)
    return b / a, {"ours_s": a, "reference_s": b}


def sdr_against_simsiam(width, small, head, batch=128, groups=4, m=4):
    simsiam, sdr = our_step(width, groups, 0.5, small, head), our_step(width, groups, 0.5, small, head)
    x, sub = random_views(2 * batch, 32), random_views(batch, 32)
    rng = np.random.default_rng(0)
    a, b = paired(lambda: sdr(x, sub, [sdrnet.index_to_path(i, groups) for i in rng.choice(groups ** 4, m, replace=False)]), lambda: simsiam(x), 5)
    return a / b, {"sdr_s": a, "simsiam_s": b, "batch": batch, "m": m, "groups": groups}


@row("SDR step / SimSiam step, toy network", 1.8)
def sdr_step_toy():
    return sdr_against_simsiam(16, False, 512, 256)


@row("SDR step / SimSiam step, ResNet-18 small stem", 1.6)
def sdr_step_resnet18():
    return sdr_against_simsiam(64, True, 2048, 64)


@row("SDR step with 256 sub-nets / with 16", 1.05)
def sdr_256_against_16():
    many, few = our_step(32, 4, 0.5, True, 512), our_step(32, 2, 0.25, True, 512)
    x, sub, rng = random_views(128, 32), random_views(64, 32), np.random.default_rng(0)
    draw = lambda g: [sdrnet.index_to_path(i, g) for i in rng.choice(g ** 4, 4, replace=False)]
    a, b = paired(lambda: many(x, sub, draw(4)), lambda: few(x, sub, draw(2)), 7)
    return a / b, {"with_256_s": a, "with_16_s": b}


# ---------------------------------------------------------------------------- clustering

@row("clustering 200,000 x 512 into 256 / faiss spherical k-means", 0.5, "more")
def clustering():
    try:
        import faiss
    except ImportError:
        return None, "faiss is not installed"
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(400, 512)).astype(np.float32)
    x = centres[rng.integers(0, 400, 200_000)] + 1.2 * rng.normal(size=(200_000, 512)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    unit -= unit.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    faiss.omp_set_num_threads(torch.get_num_threads())
    began = time.perf_counter()
    kmeans = faiss.Kmeans(512, 256, niter=20, spherical=True, max_points_per_centroid=10 ** 9, seed=0)
    kmeans.train(unit)
    theirs = time.perf_counter() - began
    their_cosine = float((unit @ kmeans.centroids.T).max(1).mean())
    result = {}

    def ours():
        result["about"] = cluster.cluster(x, 256, CPU, epochs=8, order="none")[-1]
    began = time.perf_counter()
    memory = peak_memory(ours)
    seconds = time.perf_counter() - began
    about = result["about"]
    return theirs / seconds, {"ours_s": seconds, "faiss_s": theirs, "marginal_error": about["marginal_error"], "mean_cosine": about["mean_cosine"], "faiss_cosine": their_cosine,
                              "cosine_ratio": about["mean_cosine"] / their_cosine, "memory_mb": memory}


@row("retrieval, 20,000 of 200,000 x 512 for 2,000 targets / faiss IndexFlatIP, time", 1.0)
def retrieval():
    """Both from raw features; faiss finds the neighbours (as many per target as ours considers), ours also shares them out."""
    try:
        import faiss
    except ImportError:
        return None, "faiss is not installed"
    rng, lengths, plain = np.random.default_rng(0), [], cluster.candidates
    pool = rng.normal(size=(400, 512)).astype(np.float32)[rng.integers(0, 400, 200_000)] + 1.2 * rng.normal(size=(200_000, 512)).astype(np.float32)
    targets = pool[rng.integers(0, len(pool), 2000)] + 0.3 * rng.normal(size=(2000, 512)).astype(np.float32)
    faiss.omp_set_num_threads(torch.get_num_threads())

    def counted(pool, targets, m, taken):
        lengths.append(m)
        return plain(pool, targets, m, taken)

    def ours():
        cluster.candidates = counted
        cluster.retrieve(pool, torch.from_numpy(targets), 20_000)
        cluster.candidates = plain

    def theirs():
        unit, queries = pool.copy(), targets.copy()
        faiss.normalize_L2(unit), faiss.normalize_L2(queries)
        index = faiss.IndexFlatIP(512)
        index.add(unit)
        index.search(queries, lengths[0])
    memory, passes = peak_memory(ours), len(lengths)   # before the warm-up leaves its memory to be used again
    a, b = paired(ours, theirs, 3)
    return a / b, {"ours_s": a, "faiss_s": b, "neighbours": lengths[0], "passes": passes, "memory_mb": memory, "bf16": pretrain.computes_in_bf16("cpu")}


# ---------------------------------------------------------------------------- routing

class RandomTask:
    """A task of random pixels, in the shape that route.Pixels has."""

    def __init__(self, train, test, size, classes=8):
        g = torch.Generator().manual_seed(0)
        self.name, self.metric, self.classes = "random", "top-1", [str(c) for c in range(classes)]
        self.train, self.test = (torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g) for n in (train, test))
        self.train_labels, self.test_labels = torch.arange(train) % classes, torch.arange(test) % classes


def one_by_one(net, task, count=None):
    """Features and scores of sub-nets extracted one after the other; count: only so many, spread out."""
    indices = np.linspace(0, net.groups ** 4 - 1, count or net.groups ** 4).astype(int)
    for i in indices:
        plain = net.extract(sdrnet.index_to_path(i, net.groups)).to(memory_format=torch.channels_last)
        route.loo_score(route.plain_features(plain, task.train, CPU, "auto"), task)


@row("256 paths of a ResNet-50 as a tree / one by one", 0.40)
def tree():
    net, task = SDRNet("resnet50", 32, 4).eval().to(memory_format=torch.channels_last), RandomTask(64, 2, 64)
    a, b = paired(lambda: route.search_all(net, task, CPU, "auto", 20, tests=False), lambda: one_by_one(net, task), 2)
    return a / b, {"tree_s": a, "one_by_one_s": b, "images": 64, "size": 64, "width": 32}


@row("halving / one by one", 0.20)
def halving():
    net, task = SDRNet("resnet50", 16, 4).eval().to(memory_format=torch.channels_last), RandomTask(256, 2, 64)
    a, b = paired(lambda: route.search_halving(net, task, CPU, "auto", 20), lambda: one_by_one(net, task), 2)
    return a / b, {"halving_s": a, "one_by_one_s": b, "images": 256}


@row("kNN 50,000 x 512 against 10,000 / one piece, time", 1.1)
def knn_time():
    g = torch.Generator().manual_seed(0)
    train, queries = torch.randn(50_000, 512, generator=g), torch.randn(10_000, 512, generator=g)
    labels = torch.randint(0, 100, (50_000,), generator=g)

    def plain():
        similarity = F.normalize(queries) @ F.normalize(train).T
        near, index = similarity.topk(20)
        return torch.einsum("qk,qkc->qc", torch.softmax(near / 0.07, 1), F.one_hot(labels, 100).float()[index])
    ours = lambda: pretrain.knn(train, labels, queries, 100)
    a, b = paired(ours, plain, 3)
    memory, plain_memory = peak_memory(ours), peak_memory(plain)
    return a / b, {"ours_s": a, "plain_s": b, "memory_ratio": memory / plain_memory, "memory_bar": 0.2}


@row("linear probe / scikit-learn, time", 1.0)
def linear_probe():
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None, "scikit-learn is not installed"
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 256)) * 0.25
    labels = rng.integers(0, 20, 4000)
    x = (centres[labels] + rng.normal(size=(4000, 256))).astype(np.float32)
    train, test, y, decay = torch.from_numpy(x[:3000]), torch.from_numpy(x[3000:]), torch.from_numpy(labels), 1e-2
    kept = {}

    def ours():
        w = route.logistic_fit(train, y[:3000], decay, tolerance=1e-4)
        kept["ours"] = ((test @ torch.from_numpy(w[:-1]).float() + torch.from_numpy(w[-1]).float()).argmax(1) == y[3000:]).double().mean().item()

    def theirs():
        model = LogisticRegression(C=1 / (decay * 3000), tol=1e-4, max_iter=1000).fit(x[:3000], labels[:3000])
        kept["theirs"] = model.score(x[3000:], labels[3000:])
    a, b = paired(ours, theirs, 3)
    return a / b, {"ours_s": a, "sklearn_s": b, "accuracy": 100 * kept["ours"], "sklearn_accuracy": 100 * kept["theirs"], "accuracy_bar": 0.3}


# ---------------------------------------------------------------------------- detection

@row("evaluating VOC2007 test's size on one core, seconds", 20.0)
def evaluator():
    """4,952 images, 12,032 objects of 20 classes as skewed as VOC's, 100 detections an image, a tenth near an object."""
    images, objects, classes, rng = 4952, 12032, 20, np.random.default_rng(0)

    def boxes(n):
        corner, side = rng.uniform(0, 350, (n, 2)), rng.uniform(20, 150, (n, 2))
        return np.concatenate([corner, corner + side], 1)
    skew = np.r_[6.0, np.ones(classes - 1)] / (classes + 5)
    truth = {"image": rng.integers(0, images, objects), "label": rng.choice(classes, objects, p=skew), "box": boxes(objects), "difficult": rng.random(objects) < 0.15}
    image = np.repeat(np.arange(images), 100)
    found = {"image": image, "label": rng.choice(classes, len(image), p=skew), "box": boxes(len(image)), "score": rng.random(len(image))}
    near, k = rng.permutation(len(image))[:len(image) // 10], rng.integers(0, objects, len(image) // 10)
    found["image"][near], found["label"][near], found["box"][near] = truth["image"][k], truth["label"][k], truth["box"][k] + rng.normal(0, 8, (len(near), 4))
    began = time.perf_counter()
    detect_voc.evaluate(truth, found, classes)
    return time.perf_counter() - began, {"images": images, "objects": objects, "detections": len(image)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", help="append a line per row to this file")
    args = parser.parse_args()
    chosen = {n: r for n, r in ROWS.items() if args.only.lower() in n.lower()}
    if not chosen:
        parser.error(f"no row contains {args.only!r}; the rows are: " + "; ".join(ROWS))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 {'yes' if pretrain.computes_in_bf16('cpu') else 'no'}", flush=True)
    failed = 0
    for name, (function, bar, better) in chosen.items():
        figure, about = function()
        holds = None if figure is None else bool(figure >= bar if better == "more" else figure <= bar)
        failed += holds is False
        text = f"skipped: {about}" if figure is None else f"{figure:7.3f}  {'at least' if better == 'more' else 'at most'} {bar:<5} {'holds' if holds else 'FAILS'}  " + " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in about.items())
        print(f"{name:<62} {text}", flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps({"row": name, "figure": figure, "bar": bar, "holds": holds, "measured": about, "torch": str(torch.__version__), "threads": torch.get_num_threads()}) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
