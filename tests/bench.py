"""bench.py - what the scripts cost, each figure against a plain reference measured beside it in the same run.

    python tests/bench.py                     # every row that this machine can do, about 15 minutes on two cores
    python tests/bench.py --only tree         # rows whose name contains "tree"
    python tests/bench.py --device cuda       # training rows on a GPU, and those that need one
    python tests/bench.py --large             # also 1,280,000 x 2048 features from a file of 10 GB, half an hour
    python tests/bench.py --json bench.jsonl  # a line per row: row, figure, bar, holds, what was measured

Ratios are medians over pairs taken in turn (reference, ours, reference, ours, ...), so that a machine whose speed
drifts spoils both alike. The references do what the official recipes do: fp32, NCHW, per-image PIL transforms, one
model, one piece. Where a public package is the reference, the row is skipped with a word if it is not installed.
"""
import argparse
import ctypes
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
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
ROWS, ARGS = {}, argparse.Namespace(checkpoint=None, task=None, data=None, device=CPU, large=False)


def row(name, bar, better="less"):
    """Registers a row: a function that returns (figure, dict of what was measured), or (None, why not)."""
    def register(function):
        ROWS[name] = function, bar, better
        return function
    return register


def paired(ours, reference, pairs=5):
    """Median seconds of two functions run in turn after one warm-up each. One that returns a float has timed itself."""
    ours(), reference()
    times, wait = ([], []), torch.cuda.synchronize if ARGS.device.type == "cuda" else lambda: None
    for _ in range(pairs):
        for function, kept in ((reference, times[1]), (ours, times[0])):
            wait()
            began = time.perf_counter()
            own = function()
            wait()
            kept.append(own if isinstance(own, float) else time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def serve(pipe, make, device, threads):
    """In a process of its own: makes a function, calls it twice to warm up, then as long as the pipe says True sends its seconds."""
    ARGS.device = device
    torch.set_num_threads(threads)
    function, wait = make(), torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function(), function()
    while pipe.recv():
        wait()
        began = time.perf_counter()
        function()
        wait()
        pipe.send(time.perf_counter() - began)


def paired_apart(ours, reference, pairs=5):
    """`paired` for functions that `ours` and `reference` make, each in a process of its own, as users run them: the memory
    allocator, which `pretrain.keep_memory` sets for ours, is not shared with the reference."""
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for make in (ours, reference):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, make, ARGS.device, torch.get_num_threads()), daemon=True))
        processes[-1].start()
        there.close()                                  # so that an end of the process is seen here
        pipes.append(here)
    medians = paired(*(lambda pipe=pipe: (pipe.send(True), pipe.recv())[1] for pipe in pipes), pairs)
    for pipe, process in zip(pipes, processes):
        pipe.send(False)
        process.join()                                 # else its end disturbs the next row
    return medians


def peak_memory(function):
    """Anonymous memory (MB) that a function needs beyond what the process has, sampled every 5 ms (Linux)."""
    def rss():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
    ctypes.CDLL("libc.so.6").malloc_trim(0)            # else what an earlier function freed hides what this one takes
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

def pil_views(pil, size, blur, count=2):
    """SimSiam's augmentation as the official recipe composes it, image by image, with torchvision on PIL."""
    from PIL import ImageFilter
    from torchvision import transforms as T

    class Blur:
        def __call__(self, image):
            return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))
    transform = T.Compose([T.RandomResizedCrop(size, (0.2, 1.0)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2)]
                          + ([T.RandomApply([Blur()], 0.5)] if blur else []) + [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(pretrain.MEAN, pretrain.STD)])
    return [torch.stack([transform(p) for p in pil]) for _ in range(count)]


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


def our_step(width, groups, shared, small, head=2048, arch="resnet18"):
    """A training step of ours on given views: bf16 where the machine has it, channels_last."""
    torch.manual_seed(0)
    model = pretrain.SDR(SDRNet(arch, width, groups, shared, small), width=head).to(ARGS.device, memory_format=torch.channels_last)

    def loss(x, sub=None, paths=()):
        with pretrain.autocast(ARGS.device, "auto"):
            return model(x, sub, paths)[0]
    return stepper(model, loss)


def random_views(count, size):
    return torch.randn(count, 3, size, size, device=ARGS.device).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------- training

def simsiam_ours(loading, batch=256):
    """A function that does a training step of ours: ResNet-18, small stem, 32 px. loading: views and all, else on given views."""
    pretrain.keep_memory()                             # as `pretrain.start` does
    step, x, images = our_step(64, 1, 0.5, True), random_views(2 * batch, 32), pretrain.toy_listing(512, 0)
    steps = pretrain.training_batches(images, pretrain.Plan(512, batch, 100, 0), 0, size=32, seed=0, device=ARGS.device, workers=0, blurred=0.0)
    return lambda: step(next(steps)[1] if loading else x)


def simsiam_plain(loading, batch=256):
    """The same step by the plain recipe, views of PIL images made one by one."""
    from PIL import Image
    model, y = PlainSimSiam().to(ARGS.device), torch.randn(2, batch, 3, 32, 32, device=ARGS.device)
    step, pil = stepper(model, model), [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in pretrain.toy_images(np.arange(batch))[0]]
    return lambda: step(*(v.to(ARGS.device) for v in pil_views(pil, 32, False)) if loading else y)


@row("simsiam step, end to end", 3.0, "more")
def simsiam_step_end_to_end():
    a, b = paired_apart(functools.partial(simsiam_ours, True), functools.partial(simsiam_plain, True))
    return b / a, {"ours_s": a, "reference_s": b, "batch": 256, "note": "ResNet-18 small stem, 32 px"}


@row("simsiam step, model only", 2.5, "more")
def simsiam_step():
    a, b = paired_apart(functools.partial(simsiam_ours, False), functools.partial(simsiam_plain, False))
    return b / a, {"ours_s": a, "reference_s": b, "batch": 256}


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


def trained_knn(images, tasks, views, seed, size=32, batch=64, epochs=3):
    """Mean kNN percent on tasks after SimSiam (ResNet-18 of width 16) whose views come from `views`."""
    torch.manual_seed(seed)
    model = pretrain.SDR(SDRNet("resnet18", 16, 1)).to(memory_format=torch.channels_last)
    optimizer, plan = torch.optim.SGD(model.parameters(), 0.06, 0.9, weight_decay=5e-4), pretrain.Plan(len(images), batch, epochs, seed)
    original, pretrain.views = pretrain.views, views
    try:
        for step, x, *_ in pretrain.training_batches(images, plan, 0, size=size, seed=seed, device=CPU, workers=0, blurred=0.0):
            optimizer.param_groups[0]["lr"] = 0.03 * (1 + np.cos(np.pi * step / plan.steps))
            with pretrain.autocast(CPU, "auto"):
                loss = model(x)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        pretrain.views = original
    embed = lambda part: pretrain.embed(model.net, part, size=size, device=CPU)
    return statistics.mean(pretrain.knn_score(embed(task.train), embed(task.test), task) for task in tasks)


@row("kNN after equal epochs: what our views lack, in standard errors", 2.0)
def views_accuracy():
    """(Mean over six seeds with per-image transforms - mean with our views) / the standard error of that difference; half
    an hour on one core."""
    if not ARGS.data:
        return None, "needs --data FOLDER and --task"
    from PIL import Image
    images = pretrain.folder_listing(ARGS.data).pack()
    tasks = pretrain.open_tasks(ARGS.task)
    for task in tasks:
        task.train.pack(), task.test.pack()
    plain = lambda pixels, u, size, *_: pil_views([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in pixels], size, False, 1)[0]
    ours, theirs = ([trained_knn(images, tasks, views, seed) for seed in range(6)] for views in (pretrain.views, plain))
    points = statistics.mean(theirs) - statistics.mean(ours)
    error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
    return points / error, {"points": points, "standard_error": error, "ours": [round(v, 2) for v in ours], "per_image": [round(v, 2) for v in theirs],
                            "images": len(images), "epochs": 3, "tasks": [task.name for task in tasks]}


@row("JPEG files of 500 x 375 to two views at 224 px, one core", 2.0, "more")
def jpeg_views():
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(32):                            # smooth, as photographs are: noise decodes slower than they do
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375), Image.BICUBIC).save(os.path.join(folder, f"{i:02}.jpg"), quality=90)
        images, u = pretrain.folder_listing(folder), pretrain.draws(0, 0, 32)
        crops = pretrain.TrainCrops(images, 224)

        def ours():
            both = torch.stack([crops[i, u[i]][0] for i in range(32)])
            return [pretrain.views(both[:, v], u[:, v], 224, cropped=True) for v in (0, 1)]

        def plain():
            return pil_views([Image.open(name).convert("RGB") for name in images.names], 224, True)
        a, b = on_one_thread(lambda: paired(ours, plain, 3))
    return b / a, {"ours_images_per_s": 32 / a, "reference_images_per_s": 32 / b}


def on_one_thread(function):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def sdr_steps(width, small, head, batch, groups=4, m=4, size=32, arch="resnet18"):
    """(SDR's step in the paper's form: SiamKD, shared 1/2, B images for the largest network and B/2 for m sub-nets;
    SimSiam's on the same B), both without arguments."""
    simsiam, sdr = our_step(width, groups, 0.5, small, head, arch), our_step(width, groups, 0.5, small, head, arch)
    x, sub, rng = random_views(2 * batch, size), random_views(batch, size), np.random.default_rng(0)
    return lambda: sdr(x, sub, [sdrnet.index_to_path(i, groups) for i in rng.choice(groups ** 4, m, replace=False)]), lambda: simsiam(x)


def sdr_against_simsiam(*shape, **more):
    a, b = paired(*sdr_steps(*shape, **more), 5)
    return a / b, {"sdr_s": a, "simsiam_s": b, "batch": shape[3], "m": 4, "groups": 4}


@row("SDR step / SimSiam step, toy network", 1.8)
def sdr_step_toy():
    return sdr_against_simsiam(16, False, 512, 256)


@row("SDR step / SimSiam step, ResNet-18 small stem", 1.6)
def sdr_step_resnet18():
    return sdr_against_simsiam(64, True, 2048, 128)


@row("the same in peak memory of the process", 1.7)
def sdr_memory():
    """Each side in a process of its own; what importing needs is not counted. Parameters, momentum and all are."""
    code = "import sys, resource; sys.path.insert(0, {!r}); import bench; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; a = peak(); " \
           "step = bench.sdr_steps(64, True, 2048, 64)[{}]; step(); step(); print((peak() - a) / 1024)"
    sdr, simsiam = (float(subprocess.run([sys.executable, "-c", code.format(os.path.dirname(os.path.abspath(__file__)), i)], capture_output=True, text=True, check=True).stdout) for i in (0, 1))
    return sdr / simsiam, {"sdr_mb": sdr, "simsiam_mb": simsiam, "batch": 64}


def count_reductions(rank, port, found):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = pretrain.parallel(pretrain.SDR(SDRNet("resnet18", 16, 4), width=64), CPU)
    x, paths = torch.randn(8, 3, 32, 32), [(0, 1, 2, 3), (1, 1, 1, 1), (3, 2, 1, 0), (2, 2, 3, 3)]
    for _ in range(2):                                 # DDP arranges its buckets anew after the first step
        with torch.profiler.profile() as profile:
            loss, values = model(x, torch.randn(16, 3, 32, 32), paths)
            loss.backward()
            pretrain.agree(torch.cat([loss.detach()[None], values]), CPU)
    if rank == 0:
        norms = sum(isinstance(module, sdrnet.BatchNorm) for module in model.modules())
        found.put((sum(e.count for e in profile.key_averages() if "gloo:all_reduce" in e.key), norms))
    torch.distributed.destroy_process_group()


@row("all-reduces of an SDR step - 4 per BatchNorm layer", 10)
def reductions():
    context, port = torch.multiprocessing.get_context("spawn"), 29000 + os.getpid() % 1000
    found = context.SimpleQueue()
    torch.multiprocessing.spawn(count_reductions, (port, found), nprocs=2)
    calls, norms = found.get()
    return calls - 4 * norms, {"all_reduces": calls, "batchnorm_layers": norms, "processes": 2, "note": "DDP's and the check of the loss included"}


@row("ResNet-50 at 224 px, batch 512: image pairs a second (GPU)", 1500.0, "more")
def resnet50_pairs():
    if ARGS.device.type != "cuda":
        return None, "needs --device cuda"
    step, x = our_step(64, 4, 0.5, False, 2048, "resnet50"), random_views(1024, 224)
    a, _ = paired(lambda: step(x), lambda: None)
    return 512 / a, {"step_s": a, "gpu": torch.cuda.get_device_name()}


@row("ResNet-50 at 224 px: SDR step / SimSiam step (GPU)", 1.6)
def resnet50_sdr():
    if ARGS.device.type != "cuda":
        return None, "needs --device cuda"
    return sdr_against_simsiam(64, False, 2048, 512, size=224, arch="resnet50")


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
    # As features are: a spectrum that falls as a power, no separate blobs. (More blobs than clusters, all of one size, is
    # where balance costs: 0.74 to 0.94 of faiss's cosine on such data; on SimSiam's features of 40,000 photographs 0.98.)
    x = (np.random.default_rng(0).normal(size=(200_000, 512)) * np.arange(1, 513) ** -0.7).astype(np.float32)
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
        result["about"] = cluster.cluster(x, 256, CPU, epochs=6, order="none")[-1]
    began = time.perf_counter()
    memory = peak_memory(ours)
    seconds = time.perf_counter() - began
    about = result["about"]
    return theirs / seconds, {"ours_s": seconds, "faiss_s": theirs, "marginal_error": about["marginal_error"], "mean_cosine": about["mean_cosine"], "faiss_cosine": their_cosine,
                              "cosine_ratio": about["mean_cosine"] / their_cosine, "memory_mb": memory}


@row("clustering 1,280,000 x 2048 from a file: anonymous memory, GB", 4.0)
def clustering_large():
    if not ARGS.large:
        return None, "needs --large"
    n, d, rng, result = 1_280_000, 2048, np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "features.npy")
        x = np.lib.format.open_memmap(file, "w+", np.float32, (n, d))
        centres = rng.normal(size=(400, d)).astype(np.float32)
        for a in range(0, n, 20_000):
            x[a:a + 20_000] = centres[rng.integers(0, 400, 20_000)] + rng.standard_normal((20_000, d), np.float32)
        x.flush()
        del x
        began = time.perf_counter()
        memory = peak_memory(lambda: result.update(cluster.cluster(np.load(file, mmap_mode="r"), 256, CPU, epochs=2, order="none")[-1]))
    return memory / 1024, {"seconds": time.perf_counter() - began, "epochs": 2, "marginal_error": result["marginal_error"]}


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

def random_task(train, test, size, classes=8):
    """A task of random pixels, as route.decoded returns one."""
    g = torch.Generator().manual_seed(0)
    parts = []
    for n in (train, test):
        packed = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)
        parts.append(pretrain.Images([str(i) for i in range(n)], None, torch.arange(n) % classes, [str(c) for c in range(classes)], packed))
    return pretrain.Task("random", *parts)


def resnet50(width):
    return SDRNet("resnet50", width, 4).eval().to(memory_format=torch.channels_last)


def one_by_one(net, task, size, indices):
    """Features and leave-one-out scores of sub-nets one after the other, each a plain dense network. Returns the
    seconds, without those of extracting the networks: a user would have them at hand."""
    seconds = 0.0
    for i in indices:
        plain = net.extract(sdrnet.index_to_path(i, net.groups)).to(memory_format=torch.channels_last)
        began = time.perf_counter()
        route.loo_score(pretrain.embed(plain, task.train, size=size, device=CPU), task)
        seconds += time.perf_counter() - began
    return seconds


@row("256 paths of a ResNet-50 as a tree / one by one", 0.40)
def tree():
    net, task = resnet50(32), random_task(64, 1, 64)
    a, b = paired(lambda: route.search_all(net, task, CPU, "auto", 20, tests=False), lambda: one_by_one(net, task, 64, range(256)), 1)
    return a / b, {"tree_s": a, "one_by_one_s": b, "images": 64, "size": 64, "width": 32}


@row("halving / one by one", 0.20)
def halving():
    net, task = resnet50(16), random_task(512, 1, 64)
    a, b = paired(lambda: route.search_halving(net, task, CPU, "auto", 20), lambda: one_by_one(net, task, 64, range(256)), 1)
    return a / b, {"halving_s": a, "one_by_one_s": b, "images": 512, "size": 64, "width": 16}


@row("memory of the tree / of one by one, without the tree's features", 3.0)
def tree_memory():
    """Two sub-trees of g^2 sub-nets: the other fourteen would take turns in the same memory."""
    net, task = resnet50(32), random_task(1024, 1, 64)
    tree = peak_memory(lambda: route.search_all(net, task, CPU, "auto", 20, range(32), tests=False))
    single = peak_memory(lambda: one_by_one(net, task, 64, range(2)))
    features = net.groups ** 2 * len(task.train) * net.sub_features * 4 / 2 ** 20
    return (tree - features) / single, {"tree_mb": tree, "features_mb": features, "one_by_one_mb": single, "images": 1024}


@row("halving's choice within 1 point of the best, share of tasks", 0.8, "more")
def halving_choice():
    """Of the tasks whose best sub-net is 2 points over the median, by the leave-one-out score on all training images."""
    if not ARGS.checkpoint:
        return None, "name a trained --checkpoint (and its --task, each; default: the toy tasks of seeds 0, 1 and 2)"
    content = sdrnet.load(ARGS.checkpoint, ("sdrnet",))
    net, size = sdrnet.network(content, ARGS.checkpoint).to(memory_format=torch.channels_last), content["config"]["image_size"]
    tasks = pretrain.open_tasks(ARGS.task) if ARGS.task else [task for seed in range(3) for task in pretrain.open_tasks(["toy"], seed)]
    behind, spread, done = [], [], []
    for task in tasks:
        task = route.decoded(task, size, 5000, 0)
        scores = route.search_all(net, task, CPU, "auto", 20, tests=False)[0]
        chosen, passes = route.search_halving(net, task, CPU, "auto", 20)
        behind, spread, done = behind + [scores.max() - scores[np.nanargmax(chosen)]], spread + [scores.max() - np.median(scores)], done + [passes]
    behind, wide = np.array(behind), np.array(spread) >= 2
    return float((behind[wide] <= 1).mean()) if wide.any() else None, {
        "tasks": len(tasks), "with_2_points": int(wide.sum()), "within_1_of_all": int((behind <= 1).sum()), "passes": float(np.mean(done)),
        "points_behind": [round(float(b), 2) for b in behind], "best_minus_median": [round(float(s), 2) for s in spread]} if wide.any() else "no task's best sub-net is 2 points over the median"


def knn_pair():
    g = torch.Generator().manual_seed(0)
    train, queries = torch.randn(50_000, 512, generator=g), torch.randn(10_000, 512, generator=g)
    labels = torch.randint(0, 100, (50_000,), generator=g)

    def plain():
        similarity = F.normalize(queries) @ F.normalize(train).T
        near, index = similarity.topk(20)
        return torch.einsum("qk,qkc->qc", torch.softmax(near / 0.07, 1), F.one_hot(labels, 100).float()[index])
    return lambda: pretrain.knn(train, labels, queries, 100), plain


@row("kNN 50,000 x 512 against 10,000 / one piece, time", 1.1)
def knn_time():
    a, b = paired(*knn_pair(), 3)
    return a / b, {"ours_s": a, "plain_s": b}


@row("kNN 50,000 x 512 against 10,000 / one piece, memory", 0.2)
def knn_memory():
    a, b = (peak_memory(function) for function in knn_pair())
    return a / b, {"ours_mb": a, "plain_mb": b}


def probe_pair():
    """Functions that fit 3,000 x 256 in 20 classes and return the accuracy on 1,000 others: ours and scikit-learn's."""
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 256)) * 0.25
    labels = rng.integers(0, 20, 4000)
    x = (centres[labels] + rng.normal(size=(4000, 256))).astype(np.float32)
    train, test, y, decay = torch.from_numpy(x[:3000]), torch.from_numpy(x[3000:]), torch.from_numpy(labels), 1e-2

    def ours():
        w = torch.from_numpy(route.logistic_fit(train, y[:3000], decay, tolerance=1e-4)).float()
        return 100 * ((test @ w[:-1] + w[-1]).argmax(1) == y[3000:]).double().mean()
    theirs = lambda: 100 * LogisticRegression(C=1 / (decay * 3000), tol=1e-4, max_iter=1000).fit(x[:3000], labels[:3000]).score(x[3000:], labels[3000:])
    return ours, theirs


@row("linear probe / scikit-learn, time", 1.0)
def probe_time():
    try:
        ours, theirs = probe_pair()
    except ImportError:
        return None, "scikit-learn is not installed"
    a, b = paired(lambda: [ours()], lambda: [theirs()], 5)
    return a / b, {"ours_s": a, "sklearn_s": b}


@row("linear probe and scikit-learn, points of accuracy between them", 0.3)
def probe_accuracy():
    try:
        a, b = (float(function()) for function in probe_pair())
    except ImportError:
        return None, "scikit-learn is not installed"
    return abs(a - b), {"ours": a, "sklearn": b}


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
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda, for the rows of training")
    parser.add_argument("--large", action="store_true", help="also the row of 1,280,000 x 2048 features")
    parser.add_argument("--json", help="append a line per row to this file")
    parser.add_argument("--checkpoint", help="a trained sdrnet.pt, for the row of halving's choice")
    parser.add_argument("--task", action="append", help="and its tasks, as route.py takes them")
    parser.add_argument("--data", help="a folder of small photographs, for the row that compares accuracy (with --task)")
    args = parser.parse_args(namespace=ARGS)
    chosen = {n: r for n, r in ROWS.items() if args.only.lower() in n.lower()}
    if not chosen:
        parser.error(f"no row contains {args.only!r}; the rows are: " + "; ".join(ROWS))
    pretrain.keep_memory()                             # as training does
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
