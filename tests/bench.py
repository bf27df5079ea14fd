"""bench.py - what the scripts cost, each figure beside a plain reference measured in turn with it.

    python tests/bench.py                     # all rows, about ten minutes on one core
    python tests/bench.py views tree          # some

A row prints medians of ours and of the reference (tree, cluster: of one run) and their ratio, on
one thread. Quote ratios: times depend on the machine. The rows: views, step, simsiam, tree,
cluster.
"""
import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np                                     # after the line that sets its threads
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2 as T

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cluster
import pretrain
import sdrnet

CPU = torch.device("cpu")


def in_turn(ours, reference, rounds=7):
    """Median seconds of two functions, run in turn after a round that does not count."""
    times = ([], [])
    for turn in range(rounds + 1):
        for function, kept in zip((ours, reference), times):
            began = time.perf_counter()
            function()
            if turn:
                kept.append(time.perf_counter() - began)
    return tuple(map(np.median, times))


def report(row, ours, reference, unit="s"):
    print(f"{row}: ours {ours:.3f} {unit}, reference {reference:.3f} {unit}: ours / reference "
          f"{ours / reference:.2f}, reference / ours {reference / ours:.2f}", flush=True)


def transform(size, blur):
    """SimSiam's augmentation by torchvision, an image at a time."""
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    blurring = T.RandomApply([T.GaussianBlur(13, (0.1, 2.0))], blur)
    return T.Compose([T.RandomResizedCrop(size, (0.2, 1.0), antialias=True), jitter,
                      T.RandomGrayscale(0.2), blurring, T.RandomHorizontalFlip(),
                      T.ToDtype(torch.float32, scale=True),
                      T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def our_views(pixels, step, size, blur):
    """Two views of a batch, as pretrain.training_batches makes them."""
    u = pretrain.uniform_numbers(0, step, len(pixels))
    boxes = [pretrain.crop_boxes(u[:, v], *pixels.shape[2:]) for v in (0, 1)]
    return [pretrain.make_views(pretrain.crop_batch(pixels, box, size), u[:, v], blur)
            for v, box in enumerate(boxes)]


def views():
    """Two views of 256 images at 32 px / per-image transforms."""
    pixels = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    single = transform(32, 0.0)
    report("views", *in_turn(lambda: our_views(pixels, 1, 32, 0.0),
                             lambda: [torch.stack([single(x) for x in pixels]) for _ in (0, 1)], 3))


def make_step(net, subs=0, size=32, batch=64):
    """A training step on random images: a function."""
    model = pretrain.SDR(net, layers=2, width=512).train()
    if sdrnet.has_bf16("cpu"):
        model.to(memory_format=torch.channels_last)    # as pretrain.py does
    optimizer = pretrain.make_optimizer(model, 5e-4)
    pretrain.set_lr(optimizer, 0.01, 0, 10)
    x = torch.randn(2, batch, 3, size, size)
    paths = [(0, 1, 1, 0), (1, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 0)][:subs]
    parts = [(path, x[:, :batch // 2]) for path in paths]
    return lambda: pretrain.train_step(model, optimizer, x, parts, CPU, "auto")


def operations(function):
    """Floating-point operations of convolutions and products in a call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def step():
    """An SDR step of four sub-nets, B / 2 images each / a SimSiam step of the same B: seconds, and
    what they would be if only arithmetic counted."""
    for name, options in (("toy network", dict(width=16)),
                          ("ResNet-18, small stem", dict(width=64, small_stem=True))):
        batch = 64 if "toy" in name else 16
        nets = [sdrnet.SDRNet("resnet18", groups=2, **options) for _ in (0, 1)]
        pair = make_step(nets[0], 4, batch=batch), make_step(nets[1], 0, batch=batch)
        report(f"step, {name}", *in_turn(*pair))
        print(f"  operations: {operations(pair[0]) / operations(pair[1]):.2f} times as many")


def simsiam():
    """Views and step, end to end, 64 images at 32 px / the plain recipe."""
    pixels, single = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), transform(32, 0.0)
    net = sdrnet.SDRNet("resnet18", 16, 1)
    model = pretrain.SDR(net, layers=2, width=512).train()
    optimizer = pretrain.make_optimizer(model, 5e-4)
    plain = sdrnet.resnet("resnet18", (16, 32, 64, 128), 16).train()
    projector, predictor = pretrain.mlp([128, 512, 512], True), pretrain.mlp([512, 128, 512])
    parameters = [*plain.parameters(), *projector.parameters(), *predictor.parameters()]
    sgd = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)

    def reference():
        x = [torch.stack([single(image) for image in pixels]) for _ in (0, 1)]
        with sdrnet.autocast(CPU):
            z = [projector(plain(view)) for view in x]
            p = [predictor(v) for v in z]
        loss = -(F.cosine_similarity(p[0].float(), z[1].detach().float()).mean()
                 + F.cosine_similarity(p[1].float(), z[0].detach().float()).mean()) / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    report("simsiam, end to end", *in_turn(
        lambda: pretrain.train_step(model, optimizer, our_views(pixels, 1, 32, 0.0), [], CPU,
                                    "auto"),
        reference))


@torch.no_grad()
def tree():
    """All 256 paths of a ResNet-50 as a tree / one by one (every 16th, times 16)."""
    net = sdrnet.SDRNet("resnet50", 64, 4).eval()
    for s in range(4):                                 # statistics that nobody has measured
        for bn in sdrnet.batch_norms(net.blocks(s)):
            width = len(net.channels(s, bn.num_features, (0,) * 4))
            bn.prefix_mean = torch.zeros(4 ** (s + 1), width)
            bn.prefix_var = torch.ones(4 ** (s + 1), width)
    x, began = torch.randn(4, 3, 96, 96), time.perf_counter()
    for _ in net.tree(x):
        pass
    ours, began = time.perf_counter() - began, time.perf_counter()
    for index in range(0, 256, 16):
        net(x, sdrnet.index_to_path(index, 4))
    report("tree", ours, 16 * (time.perf_counter() - began))


def cluster_row():
    """40,000 x 128 into 256: seconds, sizes; k-means of as many epochs by plain lines beside."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(400, 128))
    f = (kinds[rng.integers(0, 400, 40_000)] + rng.normal(size=(40_000, 128))).astype(np.float32)
    unit = F.normalize(torch.from_numpy(f))
    unit = F.normalize(unit - unit.mean(0))
    began = time.perf_counter()
    C = cluster.learn_centroids(unit, 256)
    ours = time.perf_counter() - began
    S = cluster.scores(unit, C)
    sizes = np.bincount(S.argmax(1), minlength=256)
    began = time.perf_counter()
    means = unit[:256].clone()
    for _ in range(10):
        owner = (unit @ means.T).argmax(1)
        means = F.normalize(torch.zeros_like(means).index_add_(0, owner, unit))
    report("cluster, 40,000 x 128 into 256 / k-means", ours, time.perf_counter() - began)
    print(f"  sizes {sizes.min()} to {sizes.max()}; mean cosine {S.max(1).values.mean():.3f}, "
          f"k-means {(unit @ means.T).max(1).values.mean():.3f}")


ROWS = {"views": views, "step": step, "simsiam": simsiam, "tree": tree, "cluster": cluster_row}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of {' '.join(ROWS)}; default: all")
    wanted = parser.parse_args().rows or list(ROWS)
    unknown = set(wanted) - set(ROWS)
    if unknown:
        parser.error(f"no row {unknown.pop()}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, one thread")
    for row in wanted:
        ROWS[row]()


if __name__ == "__main__":
    main()
