"""neighbours.py - SEPT, DATA and MoCo v2 on the pieces of the five scripts: how little it takes.

    python tests/neighbours.py sept --out runs/toy --task runs/toy/tasks/weaves --budget 1000
    python pretrain.py --subset runs/toy/weaves/subset.npy --out runs/toy_weaves
    python tests/neighbours.py moco --out runs/moco              # toy images; or --data photos/
    python route.py --out runs/moco --network runs/moco/moco.pt  # or runs/data/weaves/subnet.pt
    python tests/neighbours.py data --out runs/data --task runs/toy/tasks/weaves

sept (AAAI 2023)  A task's own pre-training set: its images retrieve their most similar ones from
    the pool, under a budget; pretrain.py then trains on these.
moco (v2, 2020)   A view against a queue of other images' views, encoded by a momentum copy.
data (CVPR 2022)  One network of nested sizes: a size takes the first c channels and the first d
    blocks of each stage. A step trains the largest, the smallest and a random size on one batch
    (the sandwich rule) towards the largest network's targets. Of the sizes in a window of FLOPs a
    task takes the one that embeds its images, without labels, most as the largest network does.

In:   sept: <out>/simsiam.pt, features.npy float (N, D), images.txt, of a run on all of --data
      moco, data: --data, a folder of images at any depth; toy images by default
      --task: a folder with train/ and test/, of which train/ counts, without its labels
Out:  sept: <out>/<task>/subset.npy  int64 (budget,), sorted rows of features.npy; and sept.png,
            rows of a target and the images it claimed
      moco, data: <out>/moco.pt or data.pt, the largest network, of kind simsiam, for all scripts;
            images.txt and features.npy beside it, so give each run an --out of its own
      data: <out>/<task>/subnet.pt, the size found; search.json, all that were scored. The same
            command with another --task searches only

subnet.pt has all blocks, as load_network builds no others. Those that its size leaves out end in a
BatchNorm of zeros and pass their input on, so outputs are the size's; `net.layer3[:depths[2]]` and
so on drop them, "depths" being in the file; detect_voc.py would train them. Measured on one core of
an AMD EPYC: an epoch of toy images takes moco 11 s and data 33 s, a search of 40 sizes 10 s.

Deviations. SEPT: its extractor saw the whole pool, not a subset. DATA: SimSiam's loss by default;
the mean of the three losses, its code sums them; one momentum update a step, there one a size; a
size is compared by cosine with the largest network itself, there with its momentum copy; one stem
for all sizes, half to all of a stage's channels, one to all of its blocks; statistics only of the
size exported, on the task's images; no search for dense tasks. MoCo: BatchNorm over the batch,
unshuffled; no bias in the projector's first layer; a short queue. Chosen, as not known: cosine
similarity and lists merged in rounds (SEPT).
"""
import argparse
import copy
import functools
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pretrain
import route
import sdrnet
from sdrnet import InputError

# ------------------------------------------------------------------------------------ SEPT

def retrieve(pool, targets, budget, chunk=8192):
    """SEPT: the images of a pool that the targets claim, int64 (budget,), in the order of claims.

    pool (N, D), targets (T, D): float arrays; the pool, read once in chunks, may be memory-mapped.
    Target after target, round after round, each claims the image of the highest cosine that is not
    yet taken: claims[t::T] are target t's. Holds T (budget + chunk) pairs of numbers. Raises
    ValueError where the budget is not within 1 .. N, there is no target, or a number not finite."""
    if not 1 <= budget <= len(pool):
        raise ValueError(f"budget {budget}: a number from 1 to {len(pool)}, the pool's images")
    if not len(targets) or not np.isfinite(targets).all():
        raise ValueError("targets: one or more are needed, of finite features")
    queries = F.normalize(torch.from_numpy(np.array(targets, np.float32)))
    cosine = torch.empty(len(queries), 0)              # of each target's best so far, falling
    image = cosine.long()
    for start in range(0, len(pool), chunk):
        part = F.normalize(torch.from_numpy(np.array(pool[start:start + chunk], np.float32)))
        if not part.isfinite().all():
            raise ValueError(f"features {start} to {start + len(part) - 1}: not all are finite")
        rows = torch.arange(start, start + len(part)).expand(len(queries), -1)
        cosine = torch.cat([cosine, queries @ part.T], 1)
        image = torch.cat([image, rows], 1)
        most = min(budget, image.shape[1])             # fewer are taken before any claim
        cosine, best = cosine.topk(most, dim=1)        # (T, most)
        image = image.gather(1, best)
    candidates = [iter(row) for row in image.numpy()]
    taken, claims = np.zeros(len(pool), bool), np.empty(budget, np.int64)
    for claim in range(budget):
        claims[claim] = next(i for i in candidates[claim % len(queries)] if not taken[i])
        taken[claims[claim]] = True
    return claims


def draw_claims(claims, targets, pool, path, rows=12, most=11, tile=64):
    """A picture: rows of a target and, apart, the images that it claimed, the most similar first.
    claims: as `retrieve` returns them; targets, pool: data sets of uint8 (3, S, S)."""
    columns = min(most, math.ceil(len(claims) / len(targets)))
    shown = np.unique(np.linspace(0, min(len(targets), len(claims)) - 1, rows).astype(int))
    sheet = Image.new("RGB", ((columns + 1) * (tile + 3) + 12, len(shown) * (tile + 3)), "white")
    for y, target in enumerate(shown.tolist()):
        claimed = claims[target::len(targets)][:columns].tolist()
        claimed = next(sdrnet.load_batches(pool, [claimed]))
        for x, image in enumerate([targets[target], *claimed]):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile))
            sheet.paste(picture, (x * (tile + 3) + min(x, 1) * 12, y * (tile + 3)))
    sdrnet.save_file(path, functools.partial(sheet.save, format="PNG"))


def run_sept(args):
    """A task's subset of the pool, and its picture."""
    device, place = set_up(args), functools.partial(os.path.join, args.out)
    net = sdrnet.load_network(place("simsiam.pt")).to(device)
    size = sdrnet.load_checkpoint(place("simsiam.pt"))["image_size"]
    names = sdrnet.list_images(args.data, leave_out=args.out)
    try:
        features = np.lib.format.open_memmap(place("features.npy"), "r")
        pretrain.compare_listings(place("images.txt"), names)      # what --subset will count in
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{args.out}: {sdrnet.first_line(error)}: run pretrain.py first") from None
    if features.shape != (len(names), net.features):
        raise InputError(f"{args.out}: features.npy is of another run, of shape {features.shape}")
    if args.budget > len(names):
        raise InputError(f"--budget {args.budget}: the pool has {len(names):,} images only")
    task = route.open_task(args.task, size)
    targets = sdrnet.embed(net, task.train, device, workers=args.workers)
    try:
        claims = retrieve(features, targets, args.budget)
    except ValueError as error:
        raise InputError(f"{place('features.npy')}: {error}") from None
    sdrnet.make_folder(place(task.name))
    subset = place(task.name, "subset.npy")
    sdrnet.save_file(subset, functools.partial(np.save, arr=np.sort(claims)))
    pool = sdrnet.Images(args.data, names, functools.partial(sdrnet.center_crop, size=size))
    draw_claims(claims, task.train, pool, place(task.name, "sept.png"))
    print(f"wrote {subset}: {len(claims):,} of {len(names):,}, claimed by {len(targets):,} images")


# ------------------------------------------------------------------------------------ losses

def info_nce(q, k, queue, temperature):
    """L = -log( exp(q.k / T) / (exp(q.k / T) + sum_j exp(q.k_j / T)) ), the mean over rows.

    q, k: (B, d), here made unit; queue: unit keys k_j (K, d). In fp32 at least. With own = q.k / T
    and rest = log sum_j exp(q.k_j / T) it is log(1 + exp(rest - own))."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):             # which would make q @ queue bf16
        q, k = F.normalize(q.to(wide), dim=1), F.normalize(k.to(wide), dim=1)
        own = (q * k).sum(1) / temperature                         # (B,)
        rest = torch.logsumexp(q @ queue.T / temperature, dim=1)   # (B,)
        return F.softplus(rest - own).mean()


def embedding(model, x, size=None, track=True):
    """z (B, d) of images (B, 3, S, S): the projector's first layer reads a size's channels."""
    columns = model.net.channels(sdrnet.STAGES - 1, model.net.features, size)
    return model.projector(model.net(x, size, track), columns)


def mean_loss(losses, z):
    """The mean of the losses, and what to log. z: the largest network's embeddings (B, d)."""
    log = dict(zip(("loss", "smallest", "random"), torch.stack(losses).detach()))
    return torch.stack(losses).mean(), {**log, "std": pretrain.feature_std(z)}


class MoCo(pretrain.SDR):
    """MoCo v2. keys: K, the queue's length. The momentum copy is BYOL's as SDR has it."""

    def __init__(self, net, width=2048, keys=65536, temperature=0.2, dim=128):
        super().__init__(net, width=width)
        self.temperature = temperature
        self.projector = pretrain.Projector(nn.Linear(net.features, width, bias=False), nn.ReLU(),
                                            nn.Linear(width, dim))
        for name in ("predictor", "sub_projector", "sub_predictor", "distiller"):
            setattr(self, name, nn.Identity())         # MoCo has none of them
        online = nn.ModuleList([self.net, self.projector, self.sub_projector])
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(keys, dim), dim=1))

    def forward(self, x, sizes=()):
        """x: two views (B, 3, S, S), of queries and of keys; sizes: whose queries train beside the
        largest network's. The keys, its momentum copy's, then enter the queue; the oldest leave."""
        k = self.targets(x[1:], None)[0]                           # (B, d)
        q = [embedding(self, x[0], size) for size in (None, *sizes)]
        losses = [info_nce(q_i, k, self.queue, self.temperature) for q_i in q]
        longer = torch.cat([self.queue, F.normalize(k.to(self.queue.dtype), dim=1)])
        self.queue = longer[-len(self.queue):]
        return mean_loss(losses, q[0])


class SimSiam(pretrain.SDR):
    """SimSiam's loss of several sizes of a SizeNet."""

    def forward(self, x, sizes=()):
        """x: two views (B, 3, S, S); sizes: what trains beside the largest, whose z all predict."""
        z = [[embedding(self, v, size) for v in x] for size in (None, *sizes)]
        p = [[self.predictor(v) for v in z_i] for z_i in z]        # (B, d) each
        return mean_loss([pretrain.symmetric_loss(p_i, z[0]) for p_i in p], z[0][0])


# ------------------------------------------------------------------------------------ DATA

class Size(NamedTuple):
    """widths: planes of the four stages; depths: their blocks."""
    widths: tuple
    depths: tuple


class SizeNet(sdrnet.SDRNet):
    """A ResNet of nested sizes: an SDRNet of one group that takes a Size in place of a path."""

    def channels(self, s, count, size):
        """Which of stage s's `count` channels a size has, the first: int64, None for all."""
        if size is None:
            return None
        times = count // self.widths[s]                # 4 at the end of a bottleneck, else 1
        return torch.arange(times * size.widths[s], device=self.resnet.conv1.weight.device)

    def row(self, s, size):
        """None: in here no size has statistics of its own."""

    def layers(self, s, size):
        """Stage s at a size: its first blocks, each as SDRNet yields it."""
        depth = None if size is None else size.depths[s]
        return list(super().layers(s, size))[:depth]

    def largest(self):
        """The whole network's Size."""
        return Size(tuple(self.widths), sdrnet.ARCHS[self.config["arch"]][1])

    def smallest(self):
        """Half of each stage's channels, one of its blocks."""
        return Size(tuple(width // 2 for width in self.widths), (1,) * sdrnet.STAGES)

    def draw(self, rng):
        """A random Size: four to eight eighths of a stage's channels, one to all of its blocks."""
        widths, depths = self.largest()
        return Size(tuple(width * int(rng.integers(4, 9)) // 8 for width in widths),
                    tuple(int(rng.integers(depth)) + 1 for depth in depths))

    @torch.no_grad()
    def extract(self, size):
        """A size as torchvision's ResNet in eval mode, equal to self(x, size): the first corner of
        each tensor. Its attribute config is that of all blocks."""
        net = sdrnet.resnet(self.config["arch"], size.widths, self.config["width"],
                            self.config["small_stem"], sdrnet.BatchNorm)
        ours = self.resnet.state_dict()
        for s, depth in enumerate(size.depths, start=1):
            setattr(net, f"layer{s}", getattr(net, f"layer{s}")[:depth])
        for name, tensor in net.state_dict().items():
            if name in ours:
                tensor.copy_(ours[name][tuple(slice(length) for length in tensor.shape)])
        shortcut = net.layer1[0].downsample
        if shortcut is not None and self.resnet.layer1[0].downsample is None:
            sdrnet.select_channels(shortcut[0], torch.arange(size.widths[0]))
        return net.to(self.resnet.conv1.weight.device).eval()

    @torch.no_grad()
    def flops(self, size, side):
        """FLOPs of a size on an image of side x side; torch counts two for a multiply-add."""
        net, x = self.extract(size), self.resnet.conv1.weight.new_zeros(1, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            net(x)
        return counter.get_total_flops()


@torch.no_grad()
def score_sizes(model, sizes, batches):
    """{Size: mean cosine of its embeddings of images, [(B, 3, S, S), ...], and the largest's}."""
    model.train()                                      # each batch is normalised by itself
    z_0, scores = [embedding(model, x, track=False) for x in batches], {}
    for size in sizes:
        cosines = [F.cosine_similarity(embedding(model, x, size), z) for x, z in zip(batches, z_0)]
        scores[size] = torch.cat(cosines).mean().item()
    return scores


def search_task(model, task, args, device, most=512):
    """Scores sizes on a task's images; prints those that no cheaper one equals; saves the best."""
    rng = np.random.default_rng([args.seed, 11])
    chosen = rng.permutation(len(task.train))[:most]
    blocks = np.array_split(chosen, math.ceil(len(chosen) / 256))
    batches = [sdrnet.normalise(torch.stack(samples).to(device).float() / 255)
               for samples in sdrnet.load_batches(task.train, blocks, args.workers)]
    net, flops = model.net, {}
    low, high = np.array(args.window) * net.flops(net.largest(), args.image_size)
    for size in (net.draw(rng) for _ in range(20 * args.samples)):
        count = net.flops(size, args.image_size)
        if low <= count <= high:
            flops[size] = count
        if len(flops) == args.samples:
            break
    if not flops:
        raise InputError("--window: no size that was drawn lies in it: widen it")
    scores = score_sizes(model, flops, batches)
    print(f"{task.name}: {len(flops)} sizes; MFLOPs, cosine and size of the front, the best last")
    best = None
    for size in sorted(flops, key=flops.get):
        if best is None or scores[size] > scores[best]:
            best = size
            print(f"  {flops[size] / 1e6:8.2f}  {scores[size]:.4f}  {size.widths} {size.depths}")
    plain = net.extract(best)
    sdrnet.average_statistics(plain, (plain(x) for x in batches))
    complete = sdrnet.resnet(**plain.config)           # blocks left out: their last BatchNorm is 0
    complete.load_state_dict(plain.state_dict(), strict=False)
    folder = os.path.join(args.out, task.name)
    sdrnet.make_folder(folder)
    sdrnet.save_checkpoint(os.path.join(folder, "subnet.pt"), {
        "kind": "subnet", "config": plain.config, "depths": list(best.depths), "path": None,
        "image_size": args.image_size, "backbone": complete.state_dict(),
        "origin": {"command": " ".join(sys.argv)}})
    rows = [{**size._asdict(), "flops": flops[size], "score": scores[size]} for size in scores]
    sdrnet.save_json(os.path.join(folder, "search.json"), {"sizes": rows})


# ------------------------------------------------------------------------------------ training

def train(model, args, names, device):
    """pretrain.py's SGD on MoCo or SimSiam, a line an epoch."""
    steps = max(1, round(args.epochs * len(names) / args.batch_size))
    per_epoch = max(1, len(names) // args.batch_size)
    optimizer = pretrain.make_optimizer(model, args.weight_decay)
    pixels = pretrain.decode_all(args.data, names, args.image_size, args.workers)
    batches = pretrain.training_batches(args, names, None, 1, pixels, 0, steps, device)
    for step, x, _ in batches:
        sizes = []
        if args.method == "data":                      # the sandwich rule
            rng = np.random.default_rng([args.seed, 10, step])
            sizes = [model.net.smallest(), model.net.draw(rng)]
        pretrain.set_lr(optimizer, args.lr * args.batch_size / 256, step, steps)
        values = pretrain.train_step(model, optimizer, x, sizes, device, args.amp)
        if model.target is not None:
            model.update_target(0.999)                 # MoCo's momentum
        if not math.isfinite(sum(values.values())):
            raise InputError(f"step {step}: not finite: {values}; take a lower --lr")
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            words = (f"{name} {value:.3f}" for name, value in values.items())
            print(f"step {step + 1} of {steps}", *words, sep="  ", flush=True)


def set_up(args, seed=0):
    """The device; --data becomes toy images where none is given. Raises InputError."""
    device = sdrnet.setup(seed=seed)
    if sdrnet.world_size() > 1:
        raise InputError("this runs on one process: start it by python, not by torchrun")
    args.data = args.data or os.path.join(sdrnet.toy_folder(), "images")
    return device


def open_tasks(args):
    """The tasks that sizes are searched for. Raises InputError."""
    tasks = [route.open_task(name, args.image_size) for name in args.task]
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError("--task: two have one name, and each gets a folder of it: rename one")
    if any(len(task.train) < 2 for task in tasks):
        raise InputError("--task: two training images or more are needed")
    if tasks and args.window[0] >= args.window[1]:
        raise InputError(f"--window {args.window[0]:g} {args.window[1]:g}: the least comes first")
    return tasks


def run_training(args):
    """moco and data: trains, where <out> does not hold the network; data then searches."""
    recipe = args.recipe or (None if args.data else "toy")
    if args.seed is None:              # what goes on sees other views than the run before it saw
        args.seed = 1 if args.init else 0
    device = set_up(args, args.seed)
    names = sdrnet.list_images(args.data, leave_out=args.out)
    pretrain.fill_defaults(args, names, recipe)
    tasks = open_tasks(args)
    arguments = {key: getattr(args, key)
                 for key in ("loss", "queue", "init", "seed", *pretrain.RECIPES["toy"])}
    net = SizeNet(args.arch, args.width, groups=1, small_stem=args.small_stem)
    moco = args.loss == "moco"
    model = (MoCo(net, args.head, args.queue) if moco
             else SimSiam(net, args.layers, args.head, "none", shared_heads=True))
    final = os.path.join(args.out, f"{args.method}.pt")
    if pretrain.start_folder(args, names, arguments, final, f"{final}.tmp"):
        if args.init and moco:                         # another loss's heads would not fit
            print(sdrnet.load_weights(net.resnet, args.init))
            model.update_target(0.0)
        elif args.init:
            pretrain.load_init(model, args.init)
        train(model.to(device), args, names, device)
        origin = {"command": " ".join(sys.argv), "arguments": arguments}
        pretrain.finish(model, "simsiam", args, names, None, device, origin, final)
    content = sdrnet.load_checkpoint(final, "simsiam")
    net.resnet.load_state_dict(content["backbone"])
    model.projector.load_state_dict(content["heads"]["projector"])
    for task in tasks:
        search_task(model.to(device), task, args, device)


# ------------------------------------------------------------------------------------ command

def build_parser():
    """The parser and {method: its own}, for their errors."""
    number, options = sdrnet.number, dict(allow_abbrev=False, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], **options)
    methods = parser.add_subparsers(dest="method", required=True, prog=parser.prog)
    sept = methods.add_parser("sept", help="retrieve a task's own pre-training set", **options)
    moco = methods.add_parser("moco", help="train by MoCo v2", **options)
    data = methods.add_parser("data", help="train a network of many sizes, and search", **options)
    for method, out in ((sept, "runs/toy"), (moco, "runs/moco"), (data, "runs/data")):
        method.add_argument("--data", help="folder of images, at any depth; default: toy images")
        method.add_argument("--out", default=out, help=f"folder of this run's files: {out}")
        method.add_argument("--workers", type=number(int, 0), default=2,
                            help="processes that read images: 2; 0: this one does")
    sept.add_argument("--task", required=True, help="a folder with train/ and test/")
    sept.add_argument("--budget", type=number(int, 1), default=1000,
                      help="K, images to retrieve: 1000; paper: not given")
    for method in (moco, data):                        # what has no default: the recipe's
        method.add_argument("--init", help="start from these weights: ours, or any ResNet's")
        method.add_argument("--recipe", choices=sorted(pretrain.RECIPES), help="of pretrain.py; "
                            "default: toy for toy images, for others by their size")
        method.add_argument("--width", type=number(int, 2), help="channels of the stem")
        method.add_argument("--epochs", type=number(float, 1e-6), help="MoCo v2: 200")
        method.add_argument("--batch-size", type=number(int, 2), help="B; MoCo v2: 256")
        method.add_argument("--lr", type=number(float, 1e-12), help="times B / 256; MoCo v2: 0.03")
        method.add_argument("--queue", type=number(int, 1), default=1024,
                            help="K, keys that MoCo keeps: 1024; MoCo v2: 65536")
        method.add_argument("--seed", type=number(int, 0),
                            help="of what is drawn: 0; with --init 1")
        method.add_argument("--fresh", action="store_true", help="start anew, over an earlier run")
        # What pretrain.py's functions read of a run beside these:
        method.set_defaults(clusters=None, sub_batch=None, amp="auto", loss="moco", task=[])
    data.add_argument("--loss", choices=("simsiam", "moco"), default="simsiam", help="paper: moco")
    data.add_argument("--task", action="append", default=[], help="search for it; any number")
    data.add_argument("--window", type=number(float, 0, 1), nargs=2, default=[0.3, 0.6],
                      help="least and most of the largest network's FLOPs: 0.3 0.6")
    data.add_argument("--samples", type=number(int, 1), default=40, help="sizes scored: 40")
    return parser, methods.choices


def main():
    parser, methods = build_parser()
    args = parser.parse_args()
    try:
        {"sept": run_sept, "moco": run_training, "data": run_training}[args.method](args)
    except InputError as error:
        methods[args.method].error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
