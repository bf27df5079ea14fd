"""pretrain.py - SimSiam, and SDR: one supernet whose sub-nets are each trained on one cluster of the images.

    torchrun pretrain.py                                       # embedded toy images, SimSiam -> runs/toy/simsiam.pt
    torchrun pretrain.py --clusters runs/toy/clusters.npy      # 16 sub-nets on 16 clusters   -> runs/toy/sdrnet.pt
    python pretrain.py --data photos/ --out runs/photos        # your own folder (any depth), ResNet-50 recipe
    torchrun --nproc_per_node 8 pretrain.py --data imagenet/train --out runs/in1k --workers 12
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 pretrain.py ...

What it does, in the paper's terms (SDR, AAAI 2022). D(p, z) = -cos(p, sg(z)), sg = no gradient, two views 1, 2:

    L_ssl(D; W)  = D(p1, z2)/2 + D(p2, z1)/2                         SimSiam, z = projector(f), p = predictor(z)
    KD_i         = D(q(z_i1), z_02)/2 + D(q(z_i2), z_01)/2           SiamKD, q a second predictor, W_0 the teacher
    L            = L_ssl(D0; W0) + mean over sampled i of [ L_ssl(D_i; W_i) + lambda KD_i ]

Without --clusters only the first term: plain SimSiam. With it, each step draws a uniform batch of B for the largest
network W_0, and m clusters in proportion to their size, 3B/m images of each for its sub-net. By default neither SiamKD
nor progressive training is used, since both cost accuracy in our runs (README). As in the paper, phase 0 training W_0
alone, phase p = 1..4 also the g^p paths whose first 4-p digits are 0:

    torchrun pretrain.py --clusters runs/toy/clusters.npy --distill siamkd --phases 1,1,1,1,4 --shared 0.5 --out runs/paper --init runs/toy/simsiam.pt

--objective replaces D and its target (see SDR): byol, the momentum copy of network and projector, for a sub-net along
its own path; mocov2, the key of the largest network's momentum copy among those in a queue. --sizes D,E trains, with no
clusters, nested networks of many sizes (DATA, see sdrnet.py) by the sandwich rule: each step the largest network, the
smallest (D blocks and E/8 of the channels in each stage) and a random one see the same batch, with W_0's target for all.

In:  --data      toy | a folder | a torchvision data set by name with --root
     --clusters  clusters.npy, int64 (N,), and clusters.json beside it, from cluster.py
Out: <out>/simsiam.pt (byol.pt, mocov2.pt), sdrnet.pt or with --sizes datanet.pt (see sdrnet.py), the same name with
     .last.pt and .prev.pt (to continue: the newest state and the one before), .log.jsonl (each step); bad_images.txt,
     the images that cannot be read, if any

To read SDR alone: "the model that is trained" (Head, SDR.forward), "the plan of a run" (Plan.step), `train`. What stands
before them is images, tasks and views; what is around them keeps a run whole when machines, files or processes fail.

Measured: 81,920 toy images, as each of the first two commands sees, take SimSiam 77 s and SDR 82 s on one CPU core (AMD
EPYC with bf16 units, torch 2.15). What comes out, and what does not, is in the README.
"""
import argparse
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import sdrnet
from sdrnet import BatchNorm, InputError, OwnError, SDRNet, index_to_path, world_size

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)           # of ImageNet, in RGB, images in [0, 1]


# ---------------------------------------------------------------------------- running: processes, signals, errors

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; an option is never guessed from its beginning."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise InputError(message)

    def given(self, args, names):
        """Those of the options, as they are typed, that were given."""
        return [f"--{name.replace('_', '-')}" for name in sorted(names) if getattr(args, name) != self.get_default(name)]

    def idle(self, args, names, why):
        """Raises InputError if one of these options was given: it would do nothing, `why`."""
        for option in self.given(args, names):
            raise InputError(f"{option} does nothing {why}: leave it out")


def number(kind, least, most=2 ** 40):
    """A type for argparse: a number from `least` to `most`, kind int or float; nan is none. Negative ones: argparse's own."""
    def read(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value
    read.__name__ = kind.__name__                      # for argparse's "invalid int value"
    return read


TINY = 1e-12                                           # the least positive number that an option takes


class Stopped(Exception):
    """A signal asked to stop, and everything is saved."""


class Signals:
    """SIGTERM and SIGINT set a flag that every loop polls: work stops between two steps, saved."""
    caught = None

    @classmethod
    def install(cls):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, frame: setattr(cls, "caught", n))

    @classmethod
    def poll(cls):
        """For loops without a collective of their own: raises Stopped."""
        if cls.caught:
            raise Stopped()


def run(main, script):
    """Calls main() and turns its end into an exit status: bad input is one line on stderr and 2."""
    status = 0
    try:
        Signals.install()
        main()
    except (InputError, OSError) as error:
        text = str(error) if isinstance(error, InputError) else f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        if rank() == 0 or isinstance(error, OwnError):
            print(f"{script}: error: " + " ".join(text.split()), file=sys.stderr, flush=True)
        status = 2
    except Stopped:
        status = 128 + int(Signals.caught)
    except Exception as error:                         # what torch says when another process has gone
        gone = None if not isinstance(error, RuntimeError) else "a loader worker" if "DataLoader worker" in str(error) else \
               "another process of this run" if world_size() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "peer")) else None
        if gone is None:                               # a fault of ours. Not left to Python: its end waits for loader workers
            traceback.print_exc()
        elif not Signals.caught:
            print(f"{script}: {gone} has ended, so this one does; the same command continues from the last saved state", file=sys.stderr, flush=True)
        status = 128 + int(Signals.caught) if gone and Signals.caught else 1
    if dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    with suppress(OSError):                            # the disk may be full
        sys.stdout.flush()
    if status:                                         # not sys.exit: other ranks may never reach a barrier
        os._exit(status)


def rank():
    """This process's number, 0 if it is alone."""
    return int(os.environ.get("RANK", 0))


def say(*words, **options):
    """print, on one process only."""
    if rank() == 0:
        print(*words, **{"flush": True, **options})


def tell(text, shown, always=False):
    """The line that moves: on a terminal twice a second, in a file once a minute, and `always`. Returns when last."""
    terminal, now = sys.stdout.isatty(), time.time()
    if not always and now - shown < (0.5 if terminal else 60):
        return shown
    say(f"{chr(13) * terminal}{text}", end="\n" if always or not terminal else "")
    return now


def keep_memory():
    """Lets glibc keep what tensors free. Given back to the kernel, every 4 KiB of the next step costs a page fault: 13 % of
    a toy step, 20 % of a step of ResNet-18 with small stem at B = 256, and 30 % of the views, on CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1), libc.mallopt(-3, 2 ** 30)       # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    except (OSError, AttributeError):                  # another C library: nothing lost
        pass


def restarted():
    """Whether torchrun (--max-restarts) started this process anew after another died: --fresh was obeyed before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start(args):
    """Device, process group and precision of this process, from the arguments and torchrun's environment."""
    if not args.out or os.path.exists(args.out) and not os.path.isdir(args.out):
        raise InputError(f"--out {args.out}: a folder is needed" + ", and this is a file" * bool(args.out))
    keep_memory()
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: cpu or cuda, and this machine has {'a' if torch.cuda.is_available() else 'no'} CUDA device")
    device = torch.device("cuda", local) if name == "cuda" else torch.device("cpu")
    if name == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, number, world = next(dist.rendezvous("env://"))         # after a restart, none of the addresses that the dead left there
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=number, world_size=world)
    torch.manual_seed(args.seed)
    return device


@functools.cache
def computes_in_bf16(kind):
    """Whether this machine's "cpu" or "cuda" has bf16 arithmetic."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device, amp):
    """bf16 autocast where the hardware computes in bf16, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if amp == "auto" and computes_in_bf16(device.type) else nullcontext()


def common_options(parser, out="runs/toy"):
    """The options that all scripts share."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=out, help="folder of this run's files; the stage before left its own there")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--amp", default="auto", choices=("auto", "off"), help="bf16 autocast where the hardware has it")
    group.add_argument("--seed", type=number(int, 0, 2 ** 31 - 1), default=0)
    return group


def interval(text):
    """"500" -> (500.0, "steps"), "10m" -> (10.0, "minutes")."""
    value = float(text.removesuffix("m"))
    if not 1e-9 <= value < math.inf or not (value.is_integer() or text.endswith("m")):
        raise ValueError
    return value, "minutes" if text.endswith("m") else "steps"


def due(every, step, saved):
    """Whether a state is to be saved after this step. every: an `interval`; saved: the time of the last one."""
    return (time.time() - saved) / 60 >= every[0] if every[1] == "minutes" else (step + 1) % every[0] == 0


def training_options(group):
    """Those of the scripts that train."""
    group.add_argument("--save-every", type=interval, default="10m", help="steps (500) or minutes (10m) between states to continue from")
    group.add_argument("--fresh", action="store_true", help="start anew; this run's old files are moved to *.bak")


def data_options(parser):
    """The options that name images; `open_images` reads them."""
    group = parser.add_argument_group("images")
    group.add_argument("--data", default="toy", help="toy, a folder, or the name of a torchvision data set")
    group.add_argument("--root", help="where torchvision's data sets lie")
    group.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    group.add_argument("--subset", help="an .npy of indices: only these images, sorted")
    group.add_argument("--workers", type=number(int, 0, 1024), default=min(8, CORES), help="processes that decode images")
    group.add_argument("--max-bad", type=number(float, 0, 1), default=0.01, help="share of the images that may be broken: they are skipped, and listed in <out>/bad_images.txt")
    return group


# ---------------------------------------------------------------------------- images: toy

TOY_IMAGES, TOY_SIZE, TOY_CLASSES = 4096, 32, 8
TOY_WORLDS = ("shapes", "weaves", "lands", "glyphs")
TOY_TASK_START = 1_000_000                             # images from this index on belong to the labelled tasks


def _uniform(seed, index, count):
    """(n, count) uniform numbers in [0, 1), a function of (seed, index, column): splitmix64, vectorised."""
    with np.errstate(over="ignore"):
        x = (np.asarray(index, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
             + np.arange(count, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed * 2 + 1) * np.uint64(0x8CB92BA72F3D8DD7))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0 ** 53


def _colour(u):
    """Hue, saturation, value in [0, 1] (n, 3) -> RGB (n, 3, 1, 1)."""
    h = (u[:, :1] * 6 + np.array([[0, 4, 2]])) % 6
    return (u[:, 2:] * (1 - u[:, 1:2] * np.clip(1 - np.abs(h - 3) + 1, 0, 1)))[:, :, None, None]


def toy_images(index, seed=0):
    """The toy images of these indices: (uint8 (n, 3, 32, 32), world (n,), class in the world (n,)).

    World index % 4, class (index // 4) % 8; colours, places, turns, sizes and noise are drawn from (seed, index):
      shapes  four copies of a figure on a dark ground: disc, ring, square, triangle, cross, star, bar, moon
      weaves  a texture fills the frame: stripes, checks, waves, dots, bricks, zigzags, grid, ripples
      lands   a skyline under a sky: flat, hills, peaks, blocks, arches, saw, trees, steps
      glyphs  four copies of one of eight signs, dark on paper
    """
    index = np.asarray(index, np.int64)
    n, world, label = len(index), index % 4, index // 4 % TOY_CLASSES
    u, grid = _uniform(seed, index, 40), (np.arange(TOY_SIZE) + 0.5) / TOY_SIZE * 2 - 1
    image = np.zeros((n, 3, TOY_SIZE, TOY_SIZE))
    edge = lambda d, width=0.07: np.clip(0.5 - d / width, 0, 1)        # signed distance -> coverage

    def choose(w, *options):                           # the option of each image's class
        return np.select([label[w][:, None, None] == c for c in range(len(options))], np.broadcast_arrays(*options))

    def paint(w, mask, front, back):
        image[w] = back + mask[:, None] * (front - back)

    def four(w, size):                                 # coordinates (x, y) of four cells, each shifted, turned and scaled
        for c in range(4):
            p = lambda j: u[w, 10 + 5 * c + j][:, None, None]
            cx, cy = (c % 2) - 0.5 + 0.3 * (p(0) - 0.5), (c // 2) - 0.5 + 0.3 * (p(1) - 0.5)
            a, s = 0.6 * (p(2) - 0.5), size * (0.85 + 0.4 * p(3))
            x, y = (grid[None, None, :] - cx) / s, (grid[None, :, None] - cy) / s
            yield x, y, a, s

    w, mask = world == 0, 0
    for x, y, a, s in four(w, 0.36):
        x, y = np.cos(a) * x + np.sin(a) * y, np.cos(a) * y - np.sin(a) * x
        r, t = np.hypot(x, y), np.arctan2(y, x)
        d = choose(w, r - 0.9, np.abs(r - 0.7) - 0.22, np.maximum(np.abs(x), np.abs(y)) - 0.75, r * np.cos((t + math.pi / 3) % (2 * math.pi / 3) - math.pi / 3) - 0.5,
                   np.minimum(np.maximum(np.abs(x) - 0.27, np.abs(y) - 0.95), np.maximum(np.abs(y) - 0.27, np.abs(x) - 0.95)), r - 0.62 * (1 + 0.45 * np.cos(5 * t)),
                   np.maximum(np.abs(x) - 0.3, np.abs(y) - 1.0), np.maximum(r - 0.9, 0.75 - np.hypot(x - 0.5, y)))
        mask = np.maximum(mask, edge(d * s))
    paint(w, mask, _colour(u[w, 0:3] * [1, 0.4, 0.4] + [0, 0.6, 0.6]), _colour(u[w, 3:6] * [1, 0.4, 0.2] + [0, 0.2, 0.1]))

    w = world == 1
    a, f = 0.6 * (u[w, 6] - 0.5)[:, None, None], (8 + 4 * u[w, 7])[:, None, None]
    x, y = f * grid[None, None, :], f * grid[None, :, None]
    x, y = np.cos(a) * x + np.sin(a) * y + 6 * u[w, 8][:, None, None], np.cos(a) * y - np.sin(a) * x + 6 * u[w, 9][:, None, None]
    saw = lambda v: np.abs((v / math.pi) % 2 - 1) * 2 - 1
    wave = choose(w, np.sin(x), 1.6 * np.sin(x) * np.sin(y), np.sin(x + 1.8 * np.sin(y)), np.cos(x) + np.cos(y) - 0.8,
                  np.minimum(np.cos(y), np.cos(x / 2 + math.pi / 2 * (np.floor(y / (2 * math.pi)) % 2))) * 2 + 1, np.sin(x + 2.4 * saw(y)), np.maximum(np.cos(x), np.cos(y)) * 2 - 1.2, np.sin(1.2 * np.hypot(x - 6, y - 6)))
    paint(w, np.clip(0.5 + 1.5 * wave, 0, 1), _colour(u[w, 0:3] * [1, 0.5, 0.3] + [0, 0.3, 0.7]), _colour(u[w, 3:6] * [1, 0.5, 0.3] + [0, 0.4, 0.25]))

    w = world == 2
    x, y = grid[None, None, :] * (5 + 2 * u[w, 7])[:, None, None] + 6 * u[w, 8][:, None, None], grid[None, :, None]
    tall = 0.5 + 0.2 * u[w, 9][:, None, None]
    skyline = choose(w, 0 * x, np.sin(x) * 0.5 + 0.5, 0.5 + 0.5 * saw(1.4 * x), (np.sin(1.4 * x) > 0) * 1.0, np.abs(np.sin(x)), (x / 2.2) % 1.0,
                     np.clip(1.6 * np.cos(3 * x), 0, 1), np.floor((x / 3.0 % 1.0) * 3) / 2)
    hue = np.array([0.57, 0.06, 0.60, 0.10])[(u[w, 6] * 4).astype(int)]
    sky = np.stack([hue + 0.05 * u[w, 0], 0.2 + 0.4 * u[w, 1], 0.75 + 0.25 * u[w, 2]], 1)
    ground = np.stack([0.08 + 0.3 * u[w, 3], 0.3 + 0.4 * u[w, 4], 0.12 + 0.25 * u[w, 5]], 1)
    paint(w, edge(0.45 - tall * skyline - y), _colour(ground), _colour(sky) * (0.85 + 0.15 * y)[:, None])

    w = world == 3
    strokes, paper = _uniform(12, np.arange(TOY_CLASSES), 16).reshape(TOY_CLASSES, 4, 2, 2)[label[w]] * 2 - 1, 0   # (n, 4 strokes, 2 ends, xy)
    for x, y, a, s in four(w, 0.38):
        x, d = x + 0.5 * np.sin(a) * y, 9.0
        for k in range(4):
            ax, ay, bx, by = (strokes[:, k, e, c][:, None, None] for e in (0, 1) for c in (0, 1))
            t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2 + 1e-9), 0, 1)
            d = np.minimum(d, np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)))
        paper = np.maximum(paper, edge((d - 0.14) * s))
    paint(w, paper, _colour(u[w, 0:3] * [1, 0.6, 0.35]), _colour(u[w, 3:6] * [1, 0.1, 0.08] + [0, 0, 0.9]))

    noise = _uniform(seed + 1, index, 3 * TOY_SIZE ** 2).reshape(image.shape) - 0.5
    image = np.clip(image + noise * (0.02 + 0.1 * u[:, 30])[:, None, None, None], 0, 1)
    return torch.from_numpy((image * 255).round().astype(np.uint8)), world, label


# ---------------------------------------------------------------------------- images: folders and data sets

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
PACK_SIDE, PACK_BYTES = 128, 4 << 30                   # equal images up to this side are kept decoded in memory


class Images:
    """A listing of images with one index each.

    open_image(i) -> PIL image; names: file or index of each; labels: int64 (N,), (N, C) of 0/1 for several labels an
    image, or None; packed: uint8 (N, 3, H, W), all of them decoded, or None; fingerprint: what clusters.json compares.

    Broken images: up to `spare` (0: none) are skipped. In the place of each comes the next image of the listing that
    can be read, of the same cluster if `clusters` (N,) is set: a function of the files alone, so that neither resuming
    nor the number of workers or processes changes a run. bad: {index: what is wrong} of those met so far.
    """

    def __init__(self, names, open_image=None, labels=None, classes=None, packed=None, fingerprint=None):
        self.names, self.open_image, self.labels, self.classes, self.packed = names, open_image, labels, classes, packed
        self.fingerprint = fingerprint or hashlib.sha256("\n".join(names).encode("utf8", "surrogateescape")).hexdigest()
        self.whole = self.fingerprint                  # of the listing that a subset was taken from
        self.bad, self.listed, self.spare, self.clusters, self.list_file = {}, set(), 0, None, None

    def __len__(self):
        return len(self.names)

    def subset(self, indices):
        """The images at these sorted, unique indices: they are the listing from now on."""
        kept = [self.names[i] for i in indices]
        part = Images(kept, None if self.open_image is None else (lambda i: self.open_image(int(indices[i]))),
                      None if self.labels is None else self.labels[indices], self.classes,
                      None if self.packed is None else self.packed[torch.as_tensor(indices)],
                      hashlib.sha256((self.fingerprint + ",".join(map(str, indices))).encode()).hexdigest())
        part.whole = self.whole
        return part

    def decode(self, i):
        """Image i as uint8 (3, H, W). Raises InputError with its name when it cannot be read."""
        try:
            array = np.array(rgb(self.open_image(i)))
        except Exception as problem:                   # PIL raises nearly anything on a damaged file
            raise self.refusal(i, " ".join(f"{type(problem).__name__}: {problem}".split())) from None
        return torch.from_numpy(array).permute(2, 0, 1)

    def refusal(self, i, reason):
        error = OwnError(f"image {self.names[i]} cannot be read ({reason}); mend or remove it")
        error.reason = reason
        return error

    def stand_ins(self, i):
        """Who takes the place of image i if it is broken: the next ones of its cluster, then of the listing."""
        for members in ([] if self.clusters is None else [np.flatnonzero(self.clusters == self.clusters[i])]) + [np.arange(len(self))]:
            at = int(np.searchsorted(members, i))
            yield from (int(j) for j in np.r_[members[at + 1:], members[:at]])

    def attempt(self, i, make):
        """(make(image i), {}); if image i is broken, made of its first good stand-in, and {index: what is wrong} of those
        that were not; (None, ...) where more are broken than may be, or a hundred in a row. For loader workers too."""
        broken = {}
        for j in itertools.chain([int(i)], self.stand_ins(i)):
            try:
                return make(self.decode(j)), broken
            except OwnError as error:
                broken[j] = error.reason
            if len(broken) > min(self.spare, 99):
                break
        return None, broken

    def pixels(self, i):
        """Image i or its stand-in, uint8 (3, H, W). Raises InputError as `decode` does."""
        if self.packed is not None:
            return self.packed[self.present([i])[0]]
        image, broken = self.attempt(i, lambda image: image)
        if image is None:
            raise self.refusal(*next(iter(broken.items())))
        return image

    def present(self, indices):
        """The indices, those of broken packed images replaced by their stand-ins."""
        return np.array([i if i not in self.bad else next(j for j in self.stand_ins(i) if j not in self.bad) for i in indices], int) if self.bad else indices

    def share(self):
        """Tells all processes of the broken images that each has met, and lists them. Raises InputError, on all of them,
        if there are more than may be."""
        if world_size() > 1:
            parts = [None] * world_size()
            dist.all_gather_object(parts, (self.bad, self.spare))
            self.bad, self.spare = {i: reason for bad, _ in parts for i, reason in bad.items()}, min(spare for _, spare in parts)
        new = sorted(set(self.bad) - self.listed)
        if not new:
            return
        if rank() == 0 and self.list_file:
            os.makedirs(os.path.dirname(self.list_file) or ".", exist_ok=True)
            with sdrnet.whole(self.list_file) as file:
                file.write("".join(f"{self.names[i]}\t{self.bad[i]}\n" for i in sorted(self.bad)).encode("utf8", "surrogateescape"))
        self.listed = set(self.bad)
        text = f"image {self.names[new[0]]} cannot be read ({self.bad[new[0]]}); {len(self.bad)} of {len(self):,} are broken"
        if len(self.bad) > self.spare:
            raise InputError(f"{text}, {'a hundred in a row, or all,' if self.spare < 0 else 'more than --max-bad allows' if self.list_file else 'and each counts in a task'}: "
                             f"mend or remove {f'those in {self.list_file}' if self.list_file else 'them'}")
        say(f"warning: {text} and skipped, {self.spare} may be; all are listed in {self.list_file}")

    def pack(self):
        """Decodes all images into memory if they are small and of one size: then no epoch waits for the disk."""
        if self.packed is not None or len(self) == 0:
            return self
        try:
            first = self.pixels(0)
        except InputError as error:                    # all processes decode everything here
            raise InputError(str(error)) from None
        if max(first.shape[1:]) > PACK_SIDE or first.numel() * len(self) > PACK_BYTES:
            return self
        from concurrent.futures import ThreadPoolExecutor
        packed, bad, began = torch.zeros(len(self), *first.shape, dtype=torch.uint8), {}, time.time()

        def fill(block):
            for i in block:
                try:
                    image = self.decode(i)
                except OwnError as error:
                    bad[i] = error.reason
                    continue
                if image.shape != first.shape or Signals.caught:
                    return False
                packed[i] = image
            return True
        blocks = [range(a, min(a + 500, len(self))) for a in range(0, len(self), 500)]
        with ThreadPoolExecutor(CORES) as pool:
            for done, same in enumerate(pool.map(fill, blocks), 1):
                if not same:
                    pool.shutdown(cancel_futures=True)
                    Signals.poll()
                    return self
                if sys.stdout.isatty() or done == len(blocks) and len(self) > 2000:
                    say(f"\rdecoded {min(done * 500, len(self)):,} of {len(self):,} images, {time.time() - began:.0f} s", end="" if done < len(blocks) else "\n")
        self.packed, self.bad = packed, bad
        self.share()
        return self


warnings.filterwarnings("ignore", message="Image size .* exceeds limit")        # PIL's warning of what is refused here


def rgb(image, turn=True):
    """A PIL image of any mode in RGB; turn: as its EXIF says. Raises what PIL raises on damaged files, and refuses
    decompression bombs: more than PIL's 89 million pixels."""
    from PIL import Image, ImageOps
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {Image.MAX_IMAGE_PIXELS:,} that are decoded")
    image = ImageOps.exif_transpose(image) if turn else image
    if image.mode.startswith("I"):                     # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


def toy_listing(count, seed, start=0, labels=None):
    """Toy images start .. start+count-1; labels: None, or the world whose task this is (classes as labels)."""
    index = np.arange(count) + start if labels is None else (np.arange(count) * 4 + labels + start)
    packed, _, label = toy_images(index, seed)
    return Images([f"toy{i}" for i in index], None, None if labels is None else torch.from_numpy(label),
                  None if labels is None else [str(c) for c in range(TOY_CLASSES)], packed, f"toy seed {seed} n {count} start {start}")


def folder_listing(folder, classes=None, top=None):
    """The images under a folder at any depth, sorted by relative path. classes: names of the sub-folders whose
    index is the label (None: unlabelled)."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder}")
    names = []
    for base in [folder] if classes is None else [os.path.join(folder, c) for c in classes]:
        for where, folders, files in os.walk(base):
            folders.sort()
            names += [os.path.relpath(os.path.join(where, f), folder) for f in files if f.lower().endswith(SUFFIXES)]
    names.sort()
    if not names:
        raise InputError(f"no images in {folder} (looked for {' '.join(SUFFIXES)} at any depth)")
    from PIL import Image
    labels = None if classes is None else torch.tensor([classes.index(n.split(os.sep)[0]) for n in names])
    listing = Images(names, lambda i: Image.open(os.path.join(folder, names[i])), labels, classes)
    listing.names = [os.path.join(folder, n) for n in names]           # whole paths for messages, relative ones hashed
    return listing


def torchvision_listing(make, name, labelled=True):
    """A torchvision data set, or several joined, as Images. make: () -> list of data sets."""
    try:
        parts = make()
        labels = torch.cat([torch.as_tensor(_labels(p)) if labelled else torch.zeros(len(p), dtype=torch.int64) for p in parts])
    except InputError:
        raise
    except Exception as error:                         # torchvision raises nearly anything on a copy that is not whole
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{name} cannot be read ({problem}); is --root right? --download lets torchvision fetch it") from None
    if len(labels) == 0:
        raise InputError(f"{name}: a part of it has no images; is --root right, and the copy whole?")
    starts = np.cumsum([0] + [len(p) for p in parts])

    def open_image(i):
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return parts[part][i - starts[part]][0]
    return Images([f"{name}[{i}]" for i in range(starts[-1])], open_image, labels,
                  [str(c) for c in range(int(labels.shape[1] if labels.dim() > 1 else labels.max() + 1))])


def _labels(part):
    """Labels of a torchvision data set without decoding its images."""
    import torchvision
    if isinstance(part, torch.utils.data.Subset):
        return np.asarray(_labels(part.dataset))[part.indices]
    if isinstance(part, torchvision.datasets.VOCDetection):
        table = np.zeros((len(part), len(VOC_CLASSES)), np.int64)
        for i, file in enumerate(part.annotations):
            from xml.etree.ElementTree import parse
            for thing in parse(file).getroot().iter("object"):
                table[i, VOC_CLASSES.index(thing.findtext("name"))] = 1
        return table
    for attribute in ("targets", "_labels", "labels", "y"):
        if hasattr(part, attribute):
            return np.asarray(getattr(part, attribute))
    return np.asarray([label for _, label in part._samples])


VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


def open_images(args):
    """The images that --data, --root, --subset name, unlabelled, as Images. Raises InputError."""
    if args.data == "toy":
        listing = toy_listing(TOY_IMAGES, args.seed)
    elif os.path.isdir(args.data):
        listing = folder_listing(args.data)
    else:
        import torchvision
        make = getattr(torchvision.datasets, args.data, None)
        if not isinstance(make, type):
            raise InputError(f"--data {args.data}: no such folder, and torchvision has no data set of this name")
        if not args.root:
            raise InputError(f"--data {args.data}: name the folder it lies in with --root")
        extra = {"download": args.download} if "download" in make.__init__.__code__.co_varnames else {}
        listing = torchvision_listing(lambda: [make(args.root, **extra)], args.data, labelled=False)
    if args.subset:
        indices = load_array(args.subset, "i", 1)
        if len(indices) == 0 or indices.min() < 0 or indices.max() >= len(listing):
            raise InputError(f"{args.subset}: indices must lie in 0 .. {len(listing) - 1}, and there must be some")
        if note_beside(args.subset).get("sha256") not in (None, listing.fingerprint):
            raise InputError(f"{args.subset} was made from another listing of images (names or seed differ)")
        listing = listing.subset(np.unique(indices))
    listing.spare, listing.list_file = int(args.max_bad * len(listing)), os.path.join(args.out, "bad_images.txt")
    return listing


def load_array(path, kind, dims, **options):
    """An .npy file of dtype kind "i" or "f" and so many dimensions, without pickle. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no file {path}: run the stage before, or name the right file")
    try:
        array = np.load(path, allow_pickle=False, **options)
    except Exception as error:
        raise InputError(f"{path} is not a plain .npy array, or it is damaged ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kind or array.ndim != dims or array.size == 0 \
            or not array.dtype.isnative or array.itemsize > 8:
        shape = getattr(array, "shape", "?"), str(getattr(array, "dtype", "?"))
        raise InputError(f"{path} holds {shape[1]} of shape {shape[0]}; {dims} dimension(s) of {'integers' if kind == 'i' else 'floats'} are needed")
    return array


def note_beside(path):
    """What the .json beside an .npy says: a dict, empty where there is none. Raises InputError."""
    path = os.path.splitext(path)[0] + ".json"
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: run cluster.py again") from None


def contact_sheet(images, rows, path, size=64):
    """A PNG with a row of pictures per list of indices in `rows`."""
    from torchvision.utils import make_grid
    from torchvision.io import encode_png
    width = max(len(r) for r in rows)
    tiles = torch.full((len(rows) * width, 3, size, size), 255, dtype=torch.uint8)
    for a, row in enumerate(rows):
        for b, i in enumerate(row):
            image = images.pixels(int(i))
            tiles[a * width + b] = plain_crop(plain_crop(image, min(size, min(image.shape[1:]))), size)
    with sdrnet.whole(path) as file:
        file.write(encode_png(make_grid(tiles, width, padding=2, pad_value=255)).numpy().tobytes())


def save_array(path, array):
    """An .npy written whole or not at all."""
    with sdrnet.whole(path) as file:
        np.save(file, array)


def save_json(path, content):
    """A JSON file written whole or not at all, by one process."""
    if rank() == 0:
        with sdrnet.whole(path) as file:
            file.write(json.dumps(content, indent=1).encode())


# ---------------------------------------------------------------------------- tasks

class Task:
    """A labelled task: name, train and test (Images with labels), metric: "top-1", "mean-per-class" or "mAP"."""

    def __init__(self, name, train, test, metric="top-1"):
        self.name, self.train, self.test, self.metric = name, train, test, metric
        if len(train) < 2 or len(test) < 1:
            raise InputError(f"task {name}: {len(train)} training and {len(test)} test images; at least 2 and 1 are needed")


def open_tasks(names, seed=0):
    """Tasks by name: toy (all worlds), toy:WORLD, or a folder with train/ and test/ of one folder per class."""
    tasks = []
    for name in names:
        if name == "toy" or name.startswith("toy:"):
            for world in TOY_WORLDS if name == "toy" else [name[4:]]:
                if world not in TOY_WORLDS:
                    raise InputError(f"task {name}: the toy worlds are {', '.join(TOY_WORLDS)}")
                w = TOY_WORLDS.index(world)
                tasks.append(Task(f"toy-{world}", toy_listing(400, seed, TOY_TASK_START, w), toy_listing(400, seed, 2 * TOY_TASK_START, w)))
            continue
        parts = {}
        for part in ("train", "test"):
            folder = os.path.join(name, part)
            if not os.path.isdir(folder):
                raise InputError(f"task {name}: no folder {folder}; a task is a folder with train/ and test/, toy, or toy:WORLD")
            parts[part] = sorted(e.name for e in os.scandir(folder) if e.is_dir())
        only = sorted(set(parts["test"]) - set(parts["train"]))
        if only:
            raise InputError(f"task {name}: class {only[0]} is in test/ but not in train/")
        if not parts["test"] or not parts["train"]:
            raise InputError(f"task {name}: no class folders in {os.path.join(name, 'test' if parts['train'] else 'train')}")
        tasks.append(Task(os.path.basename(os.path.abspath(name)), *(folder_listing(os.path.join(name, p), parts["train"]) for p in ("train", "test"))))
    return tasks


# ---------------------------------------------------------------------------- views
# Every image and view has a row of uniform numbers of its own, a function of (seed, step, position in the global
# batch, view). All of SimSiam's augmentation is computed from that row, for a whole batch at once:
#   crop, resize, flip and blur are linear along each side: two small matrices per image, out = R_y x R_x^T;
#   brightness, contrast, saturation, hue and grey are affine in RGB: one 3x3 matrix and a shift per image.

TRIES = 10                                             # of crop shapes that may not fit, as torchvision does
COLUMNS = 2 * TRIES + 15                               # uniform numbers per view


def draws(seed, step, rows):
    """Uniform numbers of one step for all processes: float32 (rows, 2 views, COLUMNS)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
    return torch.rand(rows, 2, COLUMNS, generator=generator)


def crop_boxes(u, height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop from uniform numbers: u (n, >= 22) -> top, left, height, width, int64 (n,) each."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[:, TRIES:2 * TRIES])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first = fits.float().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    whole_h, whole_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))    # the fallback: centre
    found = fits.any(1)
    h, w = torch.where(found, h, torch.tensor(float(whole_h))), torch.where(found, w, torch.tensor(float(whole_w)))
    top = torch.where(found, (u[:, 2 * TRIES] * (height - h + 1)).floor(), (height - h) // 2)
    left = torch.where(found, (u[:, 2 * TRIES + 1] * (width - w + 1)).floor(), (width - w) // 2)
    return top.long(), left.long(), h.long(), w.long()


def resize_matrix(start, length, source, target):
    """(n, target, source): rows that resize pixels [start, start + length) to `target` pixels, bilinear with
    antialiasing (a triangle as wide as the step), as PIL and torchvision do."""
    step = (length.float() / target)[:, None, None]
    centre = start[:, None, None] + (torch.arange(target, device=start.device)[None, :, None] + 0.5) * step
    pixel = torch.arange(source, device=start.device)[None, None]
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel >= start[:, None, None]) & (pixel < (start + length)[:, None, None]))
    return weight / weight.sum(2, keepdim=True)


def blur_matrix(sigma, size):
    """(n, size, size): Gaussian blur along one side; rows at the border are renormalised. sigma 0: the identity."""
    place = torch.arange(size, device=sigma.device)
    power = (place[:, None] - place[None]) ** 2 / (2 * sigma[:, None, None] ** 2).clamp(min=1e-6)
    weight = torch.exp(-power.clamp(max=60))           # not less: denormal numbers are many times slower
    return weight / weight.sum(2, keepdim=True)


def blur(x, sigma, reach=8):
    """What blur_matrix does along both sides, cheaper where images are large: x (n, 3, S, S), sigma (n,) at most 2, cut off
    at `reach` pixels. Two convolutions, each image with its own kernel."""
    (n, _, size, _), place = x.shape, torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-place ** 2 / (2 * sigma[:, None] ** 2).clamp(min=1e-6))              # (n, 17)
    inside = F.conv1d(x.new_ones(1, n, size), kernel[:, None], padding=reach, groups=n)[0]   # (n, S): what lies in the image
    kernel, x = kernel.repeat_interleave(3, 0), x.flatten(0, 1)[None]                        # (3n, 17), (1, 3n, S, S)
    x = F.conv2d(x, kernel[:, None, None], padding=(0, reach), groups=3 * n)
    x = F.conv2d(x, kernel[:, None, :, None], padding=(reach, 0), groups=3 * n)
    return x.view(n, 3, size, size) / (inside[:, None, :, None] * inside[:, None, None])


def colour_maps(u, mean):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8, its four steps in random order, then grey with 0.2.

    u: (n, 10) uniform numbers; mean: (n, 3) mean RGB of each image in [0, 1], which contrast turns about.
    Returns M (n, 3, 3) and t (n, 3): x -> M x + t. Hue turns RGB about its grey axis by up to a tenth of a circle, which
    is linear; torchvision shifts the hue of HSV, and clamps after each step, here once at the end. On photographs that
    shift changes a value by 12.9 of 255 at a tenth; this differs from it by 8.2, a turn of YIQ, which keeps luma, by 13.4."""
    n, device = len(u), u.device
    eye = torch.eye(3, device=device)
    luma = torch.tensor([0.299, 0.587, 0.114], device=device)
    factor = 0.6 + 0.8 * u[:, :3]                      # (n, 3): brightness, contrast, saturation
    angle, mid = ((u[:, 3] - 0.5) * 0.4 * math.pi)[:, None, None], torch.full((3, 3), 1 / 3, device=device)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / 3 ** 0.5       # a quarter turn of what is not grey
    turn = mid + angle.cos() * (eye - mid) + angle.sin() * across                             # (n, 3, 3), Rodrigues
    grey = luma.expand(3, 3)                           # every channel becomes the luma
    f = factor[:, :, None, None]
    steps = torch.stack([f[:, 0] * eye, f[:, 1] * eye, f[:, 2] * eye + (1 - f[:, 2]) * grey, turn], 1)
    jittered, order = u[:, 8] < 0.8, u[:, 4:8].argsort(1)
    m, t, rows = eye.expand(n, 3, 3), torch.zeros(n, 3, device=device), torch.arange(n, device=device)
    for k in range(4):
        step = torch.where(jittered[:, None, None], steps[rows, order[:, k]], eye)
        level = ((m @ mean[:, :, None])[:, :, 0] + t) @ luma                      # mean grey so far
        lift = (1 - factor[:, 1]) * level * (jittered & (order[:, k] == 1))       # contrast: x -> c x + (1 - c) level
        m, t = step @ m, (step @ t[:, :, None])[:, :, 0] + lift[:, None]
    last = torch.where((u[:, 9] < 0.2)[:, None, None], grey, eye)
    return last @ m, (last @ t[:, :, None])[:, :, 0]


def views(images, u, size, cropped=False, blurred=0.5):
    """One SimSiam view of each image: uint8 (n, 3, H, W), u (n, COLUMNS) -> float32 (n, 3, size, size), normalised.
    cropped: the images are crops of this size already (large images are cropped while decoding).
    blurred: probability of blur (0 in SimSiam's recipe for small images)."""
    n, _, height, width = images.shape
    own = u[:, 2 * TRIES + 2:].to(images.device)       # flip, blur or not, sigma, ten of colour
    flip, sigma = own[:, 0] < 0.5, torch.where(own[:, 1] < blurred, 0.1 + 1.9 * own[:, 2], 0.0)
    x = images.float()
    if cropped:
        x[flip] = x[flip].flip(3)
        rows = (sigma > 0).nonzero()[:, 0]
        if len(rows):                                  # of a small batch perhaps none
            x[rows] = blur(x[rows], sigma[rows])
    else:
        top, left, h, w = (v.to(images.device) for v in crop_boxes(u, height, width))
        ry, rx = resize_matrix(top, h, height, size), resize_matrix(left, w, width, size)
        if blurred:
            smooth = blur_matrix(sigma, size)
            ry, rx = smooth @ ry, smooth @ rx
        rx = torch.where(flip[:, None, None], rx.flip(1), rx)
        x = (x.flatten(1, 2) @ rx.mT).view(n, 3, height, size)                    # (n, 3, H, size)
        x = ry[:, None] @ x                                                       # (n, 3, size, size)
    m, t = colour_maps(own[:, 3:], x.mean((2, 3)) / 255)
    x = torch.baddbmm(t[:, :, None], m / 255, x.flatten(2)).clamp_(0, 1)          # (n, 3, size * size)
    mean, std = (torch.tensor(v, device=x.device)[:, None] for v in (MEAN, STD))
    return x.sub_(mean).div_(std).view(n, 3, size, size)


def plain_input(images, device):
    """uint8 (n, 3, S, S) -> normalised float32, channels_last, on the device: what evaluation sees."""
    x = images.to(device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255
    return (x - mean[:, None, None]) / std[:, None, None]


def plain_crop(image, size):
    """uint8 (..., 3, H, W) -> (..., 3, size, size) for evaluation: short side to `size` (8/7 of it above 64), centre crop."""
    from torchvision.transforms.v2 import functional as T
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    if max(height, width) > 4 * min(height, width):    # 1 x 20,000 pixels scaled up would fill the memory
        image = T.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])
    return T.center_crop(T.resize(image, [size if size <= 64 else round(size * 8 / 7)], antialias=True), [size, size])


# ---------------------------------------------------------------------------- features and nearest neighbours

class PlainCrops(torch.utils.data.Dataset):
    """Image i, decoded and cropped for evaluation: what `Images.attempt` returns."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitem__(self, i):
        return self.images.attempt(i, lambda image: plain_crop(image, self.size))


def quiet_worker(_):
    """Loader workers leave signals to the main process: one that dies of a SIGTERM to the whole group would take the
    step that is to be finished with it. They end by themselves when it has ended. One thread each is enough."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def loader(crops, batch_sampler, workers):
    """Lists of what the data set `crops` gives, by forked processes."""
    return torch.utils.data.DataLoader(crops, batch_sampler=batch_sampler, num_workers=workers, worker_init_fn=quiet_worker, collate_fn=list,
                                       prefetch_factor=3 if workers else None, multiprocessing_context="fork" if workers else None)


def batches(images, size, batch=256, workers=0, mine=True, order=None):
    """Yields (positions, uint8 (b, 3, size, size)) in fixed batches of the listing, or of the indices `order`; with
    mine, only those of this process (every world_size-th)."""
    order = np.arange(len(images)) if order is None else np.asarray(order)
    blocks = [np.arange(a, min(a + batch, len(order))) for a in range(0, len(order), batch)]
    blocks = blocks[rank()::world_size()] if mine else blocks
    if images.packed is not None:
        for block in blocks:
            yield block, plain_crop(images.packed[torch.from_numpy(images.present(order[block]))], size)
        return
    for block, items in zip(blocks, loader(PlainCrops(images, size), [order[b].tolist() for b in blocks], workers)):
        for crop, broken in items:
            images.bad.update(broken)
            if crop is None:
                error = images.refusal(*next(iter(broken.items())))
                raise error if mine else InputError(str(error))            # not mine alone: all processes meet it
        yield block, torch.stack([crop for crop, _ in items])


@torch.no_grad()
def embed(net, images, *, size, device, amp="auto", workers=0, batch=256, what="features"):
    """Pooled features of every image at its index, by the largest network or a plain one: float32 (N, D) on the CPU, on
    every process. Batches are shared out over the processes."""
    net.eval()
    table, began, done = torch.zeros(len(images), net.features), time.time(), 0
    shown = began                                      # nothing is shown of what is quick
    for block, pixels in batches(images, size, batch, workers):
        with autocast(device, amp):
            table[torch.from_numpy(block)] = net(plain_input(pixels, device)).float().cpu()
        Signals.poll()
        done += len(block)
        shown = tell(f"{what}: {min(done * world_size(), len(images)):,} of {len(images):,}", shown, shown > began and done * world_size() >= len(images))
    if world_size() > 1:                               # each row is on one process: the sum is a gather
        table = sdrnet.add_up(table.to(device)).cpu()
    images.share()
    return table


def knn(train, labels, queries, classes, k=20, temperature=0.07, leave_one_out=False, chunk=1024):
    """Weighted nearest neighbours. train (N, D), queries (Q, D): features, any scale; labels int64 (N,), or 0/1 (N, C).

    The k most similar training images (cosine) vote with exp(cos / temperature); k shrinks to what there is. With
    leave_one_out the queries ARE the training images and none votes for itself. Returns each class's share of the
    votes, float32 (Q, C). Chunked: memory for `chunk` rows of similarities at a time."""
    train = F.normalize(train.float())
    queries = train if leave_one_out else F.normalize(queries.float())
    votes = labels.float() if labels.dim() > 1 else F.one_hot(labels, classes).float()
    k = min(k, len(train) - 1 if leave_one_out else len(train))
    shares = torch.empty(len(queries), votes.shape[1], device=queries.device)
    room = train.new_empty(min(chunk, len(queries)), len(train))       # one buffer for all chunks: half the memory
    for a in range(0, len(queries), chunk):
        similarity = torch.mm(queries[a:a + chunk], train.T, out=room[:len(queries) - a])      # (chunk, N)
        if leave_one_out:
            rows = torch.arange(len(similarity), device=similarity.device)
            similarity[rows, rows + a] = -math.inf
        near, index = similarity.topk(k)
        weight = torch.softmax(near / temperature, 1)  # (chunk, k): exp(cos/T), normalised without overflow
        shares[a:a + chunk] = torch.einsum("qk,qkc->qc", weight, votes[index])
    return shares


def score(shares, labels, metric):
    """Percent, from class scores (Q, C) and labels: "top-1", "mean-per-class" accuracy, or "mAP", the mean over
    classes of 11-point average precision (VOC2007's rule), for labels (Q, C) of 0/1."""
    if metric == "mAP":
        points = []
        for c in range(labels.shape[1]):
            hit = labels[shares[:, c].argsort(descending=True, stable=True), c].double()
            if hit.sum() == 0:
                continue
            recall, precision = hit.cumsum(0) / hit.sum(), hit.cumsum(0) / torch.arange(1, len(hit) + 1)
            points.append(np.mean([precision[recall >= r - 1e-12].max().item() for r in np.linspace(0, 1, 11)]))
        return 100 * float(np.mean(points))
    right = (shares.argmax(1) == labels).double()
    if metric == "top-1":
        return 100 * right.mean().item()
    return 100 * float(np.mean([right[labels == c].mean().item() for c in labels.unique()]))


def knn_score(train, test, task, k=20):
    """kNN percent on a task's test images from features train (N, D) and test (M, D), in the task's metric."""
    shares = knn(train, task.train.labels, test, len(task.train.classes), k)
    return score(shares, task.test.labels, task.metric)


# ---------------------------------------------------------------------------- the model that is trained

class Head(nn.Module):
    """An MLP: Linear, BatchNorm, ReLU, ..., Linear; last_norm: a BatchNorm without affine at the end (the projector's);
    norm=False: no BatchNorm at all; a single width: the identity. Takes (B, D) of the largest network or (B, m, D') of m
    sub-nets, whose channels of D are `cut`."""
    shared_grad = True

    def __init__(self, widths, last_norm=False, norm=True):
        super().__init__()
        count = len(widths) - 1
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=not norm or not last_norm and i == count - 1)
                                     for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.norms = nn.ModuleList(BatchNorm(b, affine=i < count - 1) for i, b in enumerate(widths[1:]) if norm and (last_norm or i < count - 1))

    def forward(self, x, cut=None, mode="batch"):
        m = x.shape[1] if x.dim() == 3 else None
        for i, linear in enumerate(self.linears):
            if cut is not None and i == 0:
                x = torch.einsum("bmd,mhd->bmh", x, sdrnet.cut_weight(linear.weight, None, cut, self.shared_grad))
                x = x if linear.bias is None else x + linear.bias
            else:
                x = F.linear(x, linear.weight, linear.bias)
            if i < len(self.norms):
                x = self.norms[i](x.flatten(1), mode=mode, m=m).view_as(x)         # each sub-net by its own statistics
            if i < len(self.linears) - 1:
                x = F.relu_(x)
        return x


def cosine_loss(p, z):
    """D(p, z) = -cos(p, sg(z)), the mean over the rows, in fp32 at least. p, z: (B, d), or of m networks (B, m, d) -> (m,)."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(wide), z.detach().to(wide), dim=-1).mean(0)


def symmetric(p, z, distance=cosine_loss):
    """distance(p1, z2)/2 + distance(p2, z1)/2 for rows [view 1; view 2]: (2B, ...)."""
    (p1, p2), (z1, z2) = p.chunk(2), z.chunk(2)
    return distance(p1, z2) / 2 + distance(p2, z1) / 2


def spread(z):
    """std * sqrt(d) of normalised z (B, d), or of m networks' (B, m, d) -> (m,): about 1 when healthy, 0 when collapsed."""
    z = F.normalize(z.detach().float(), dim=-1)
    return z.std(0).mean(-1) * z.shape[-1] ** 0.5


HEADS = ("projector", "predictor", "distiller")


def make_heads(objective, features, layers, width):
    """Projector, predictor h and second predictor q, as each paper has them, scaled to `width`."""
    if objective == "simsiam":
        widths, predictor = [features] + [width] * layers, [width, width // 4, width]
        return Head(widths, last_norm=True), Head(predictor), Head(predictor)
    out = min(width, 256 if objective == "byol" else 128)
    if objective == "byol":
        return Head([features, width, out]), Head([out, width, out]), Head([out, width, out])
    return Head([features, width, out], norm=False), Head([out]), Head([out])


def encode(net, projector, stem, paths=None, mode="batch"):
    """z of the largest network (B, d), or of m paths or one size (B, m, d): stem outputs along them (`trunk`), projected."""
    return projector(net.trunk(stem, paths, mode), None if paths is None else net.cut(net.features, [p[-1] for p in paths]), mode)


class SDR(nn.Module):
    """Supernet, projector, predictor h, and the second predictor q of SiamKD; forward returns the loss of a step.

    objective  target of p = h(z)                      distance
    simsiam    z of the other view                     D
    byol       z of the momentum network, same path    D, |p - z|^2 / 2 - 1 of unit vectors
    mocov2     z of the largest momentum network       -log softmax of cosines / temperature: the target's among those
               (h and q are the identity)              of the newest `queue` targets of the largest network
    MoCo's loss is symmetrised, as in SimSiam's comparison. Keys are not shuffled over the processes: BatchNorm takes the
    statistics of all of them.
    shared_grad: whether sub-nets' losses train what all paths share, or the individual groups and the heads only."""

    def __init__(self, net, layers=2, width=512, distill="siamkd", kd_weight=1.0, shared_grad=True,
                 objective="simsiam", tau=0.996, queue=4096, temperature=0.2):
        super().__init__()
        self.net, self.distill, self.kd_weight, self.objective, self.tau, self.temperature = net, distill, kd_weight, objective, tau, temperature
        self.projector, self.predictor, self.distiller = make_heads(objective, net.features, layers, width)
        self.target = None if objective == "simsiam" else copy.deepcopy(nn.ModuleList([net, self.projector])).requires_grad_(False)
        self.distance = cosine_loss
        if objective == "mocov2":
            self.distance = self.contrast
            self.register_buffer("queue", F.normalize(torch.randn(queue, self.projector.linears[-1].out_features), dim=1))
        for module in self.modules():
            if isinstance(module, (SDRNet, BatchNorm, Head)):
                module.shared_grad = shared_grad

    def contrast(self, q, k):
        """Cross-entropy of finding for each q (B, d) its own key k (B, d) among those of the queue; of m networks
        (B, m, d) -> (m,)."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = F.normalize(q.to(self.queue), dim=-1), F.normalize(k.detach().to(self.queue), dim=-1)
            logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ self.queue.T], -1) / self.temperature     # (B, ..., 1 + queue)
            return -torch.log_softmax(logits, -1)[..., 0].mean(0)

    @torch.no_grad()
    def enqueue(self, z):
        """Puts the keys z, rows [view 1; view 2] of all processes in the global batch's order, before the older ones."""
        table = self.queue.new_zeros(world_size(), 2, len(z) // 2, z.shape[1])
        table[rank() % world_size()] = F.normalize(z.to(self.queue), dim=1).unflatten(0, (2, -1))
        self.queue = torch.cat([sdrnet.add_up(table).transpose(0, 1).flatten(0, 2), self.queue])[:len(self.queue)]

    @torch.no_grad()
    def follow(self, step, steps):
        """Before each step: target <- tau target + (1 - tau) online, a copy at the first; BYOL's tau rises to 1."""
        if self.target is not None:
            tau = 1 - (1 - self.tau) * (0.5 * (1 + math.cos(math.pi * step / steps)) if self.objective == "byol" else 1)
            torch._foreach_lerp_(list(self.target.parameters()), [*self.net.parameters(), *self.projector.parameters()], 1 - tau if step else 1.0)

    @torch.no_grad()
    def aim(self, x, paths=None, stem="batch", mode="batch"):
        """z of the momentum network along paths; stem, mode: their BatchNorms' modes."""
        net, projector = self.target
        return encode(net, projector, net.stem(x, stem), paths, mode)

    def forward(self, x, sub_x=None, paths=()):
        """x: (2B, 3, S, S), view 1 then view 2 of the largest network's images. sub_x: (m 2b, 3, S, S), for each of the
        m sub-nets view 1 then view 2 of its b images; paths: theirs. Without sub_x, paths are sizes that see x as well.
        Returns the loss and a vector (4 + 2m,) of what to log: loss of W_0, mean loss of the sub-nets, mean KD, std of W_0,
        then each sub-net's loss and each one's std."""
        net, m = self.net, len(paths)
        stem = net.stem(x, "batch")
        z = encode(net, self.projector, stem)
        target = keys = z if self.target is None else self.aim(x)
        own = symmetric(self.predictor(z), target, self.distance)                # L_ssl(D0; W0)
        kd = sum((p.sum() for p in self.distiller.parameters()), x.new_zeros(())) * 0              # every parameter has a gradient, for DDP
        if m and sub_x is None:                        # sizes: the same batch and target
            z_i = torch.cat([encode(net, self.projector, stem, [size]) for size in paths], 1)                       # (2B, m, d)
            target = target[:, None].expand(-1, m, -1)
        elif m:
            s = net.stem(sub_x, "last")
            s = s if net.shared_grad else s.detach()
            z_i = encode(net, self.projector, s, paths)                          # (2b, m, d)
            side = lambda rows: rows.unflatten(0, (m, -1)).transpose(0, 1)       # (m 2b, d) of the largest network -> (2b, m, d)
            target = (z_i if self.target is None else self.aim(sub_x, paths, "last") if self.objective == "byol"
                      else side(self.aim(sub_x, None, "last", "last")))
            if self.distill != "none":
                with torch.no_grad():                  # z_0 of the same images: what the largest network is right now
                    z_0 = side(encode(net, self.projector, s, None, "last"))
                kd = symmetric(self.distiller(z_i), z_0).mean() if self.distill == "siamkd" else kd + F.mse_loss(z_i.float(), z_0.float())
        each = symmetric(self.predictor(z_i), target, self.distance) if m else own[None] * 0     # (m,): L_ssl(D_i; W_i)
        values = [torch.stack([own, each.mean(), kd, spread(z)]), *([each, spread(z_i)] if m else [])]
        if self.objective == "mocov2":
            self.enqueue(keys)
        return own + each.mean() + self.kd_weight * kd, torch.cat([v.detach() for v in values])


@torch.no_grad()
def calibrate(net, images, clusters, *, size, device, amp, workers, seed, limit=8192, batch=512):
    """Measures the BatchNorm statistics for inference on plainly cropped images of the pre-training set.

    The largest network's by a uniform sample. Then stage by stage each prefix's, the stages before running on their
    final statistics: half of its sample are images whose cluster begins with it, half are uniform. Why half: a task is
    wider than a cluster. On the toy images the routed sub-net scored 35.2, 39.2, 37.4 % with the cluster's images
    alone, half, uniform ones alone (a second run: 39.1, 39.0, 37.8; one with --shared-grad: 34.8, 36.9, 34.1).
    At most `limit` images each."""
    rng, began = np.random.default_rng([seed, 77]), time.time()
    count = 1 + sum(net.groups ** (s + 1) for s in range(sdrnet.STAGES if clusters is not None else 0))
    done, shown = itertools.count(1), began

    def passes(members, stage, prefix):
        nonlocal shown
        order = rng.permutation(members)[:limit]
        if prefix is not None:
            order = np.concatenate([order[:limit // 2], rng.choice(len(images), min(len(order), limit // 2))])
        for _, pixels in batches(images, size, batch, workers, order=rng.permutation(order)):
            with autocast(device, amp):
                x = plain_input(pixels, device)
                if prefix is None:
                    net.trunk(net.stem(x, "collect"), None, "collect")
                else:
                    x = net.stem(x)
                    for s in range(stage + 1):
                        x = net.stage(s, x, [prefix[:s + 1]], "collect" if s == stage else "saved")
            Signals.poll()
        number = next(done)
        shown = tell(f"statistics for inference: {number} of {count} sets", shown, shown > began and number == count)

    passes(np.arange(len(images)), None, None)
    net.finish_statistics()
    for stage in range(sdrnet.STAGES if clusters is not None else 0):
        below = net.groups ** (sdrnet.STAGES - 1 - stage)              # paths that share a prefix
        for slot in range(net.groups ** (stage + 1)):
            passes(np.flatnonzero(clusters // below == slot), stage, index_to_path(slot * below, net.groups)[:stage + 1])
        net.finish_statistics(stage)
    images.share()
    say(f"statistics for inference measured in {time.time() - began:.0f} s")


# ---------------------------------------------------------------------------- the plan of a run

class Plan:
    """Which images and sub-nets each step takes: a function of (seed, step) alone, the same on every process."""

    def __init__(self, count, batch, epochs, seed, clusters=None, groups=1, subnets=4, phases=(1,), sub_batch=None):
        self.count, self.batch, self.seed, self.clusters, self.groups, self.subnets = count, batch, seed, clusters, groups, subnets
        self.steps = max(1, math.ceil(epochs * count / batch))
        self.rows = (sub_batch or batch // 2) // subnets               # images per sub-net
        ends = np.cumsum(phases) / sum(phases) * self.steps
        self.phase_ends = [int(round(e)) for e in ends]
        self.members = None if clusters is None else [np.flatnonzero(clusters == i) for i in range(groups ** sdrnet.STAGES)]
        self.permutation = functools.lru_cache(3)(lambda epoch: np.random.default_rng([seed, 1, epoch]).permutation(count))

    def phase(self, step):
        return 0 if self.clusters is None else next(p for p, end in enumerate(self.phase_ends) if step < end)

    def uniform(self, step):
        """B indices: the next ones of an endless row of permutations of the images, an epoch each."""
        return np.array([self.permutation(at // self.count)[at % self.count] for at in range(step * self.batch, (step + 1) * self.batch)])

    def step(self, step):
        """(indices of the largest network's B images, [(sub-net, indices of its images), ...])."""
        phase = self.phase(step)
        if phase == 0:
            return self.uniform(step), []
        rng = np.random.default_rng([self.seed, 2, step])
        space = self.groups ** phase                   # the paths whose first 4 - phase digits are 0 come first
        sizes = np.array([len(self.members[i]) for i in range(space)], float)
        chosen = rng.choice(space, min(self.subnets, space), replace=False, p=sizes / sizes.sum())
        return self.uniform(step), [(int(i), rng.choice(self.members[i], self.rows, replace=len(self.members[i]) < self.rows)) for i in chosen]

    def mine(self, step):
        """This process's part of a step: (indices, their rows in the table of draws, sub-nets, rows of all in the table)."""
        uniform, subs = self.step(step)
        index = np.concatenate([uniform, *(chosen for _, chosen in subs)])         # of all processes
        part = lambda start, n: start + np.arange(n * rank() // world_size(), n * (rank() + 1) // world_size())
        rows = np.concatenate([part(0, self.batch), *(part(self.batch + j * self.rows, self.rows) for j in range(len(subs)))])
        return index[rows], rows, [i for i, _ in subs], len(index)


class TrainCrops(torch.utils.data.Dataset):
    """(image index, its two rows of uniform numbers) -> two crops, uint8 (2, 3, S, S), as `Images.attempt` returns them."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitem__(self, item):
        from torchvision.transforms.v2 import functional as T
        i, u = item

        def crops(image):
            boxes = torch.stack(crop_boxes(u, *image.shape[1:]), 1).tolist()
            return torch.stack([T.resized_crop(image, *box, [self.size, self.size], antialias=True) for box in boxes])
        return self.images.attempt(i, crops)


def training_batches(images, plan, first, *, size, seed, device, workers, blurred=0.5):
    """Yields (step, x (2B', 3, S, S), sub_x or None, sub-nets) of this process, from step `first` on."""
    def tables():
        for step in range(first, plan.steps):
            index, rows, subs, total = plan.mine(step)             # the first `own` rows are the largest network's
            yield step, index, draws(seed, step, total)[torch.from_numpy(rows)], subs, int((rows < plan.batch).sum())
    now, ahead = itertools.tee(tables())               # the loader's workers are some steps ahead
    if images.packed is None:
        source = iter(loader(TrainCrops(images, size), ([(int(i), row) for i, row in zip(index, u)] for _, index, u, *_ in ahead), workers))
    else:
        del ahead                                      # else all of it would be kept
        pool = images.packed.to(device) if images.packed.numel() < 8 << 30 else images.packed
    for step, index, u, subs, own in now:
        if images.packed is None:
            crops, broken = zip(*next(source))
            for part in broken:
                images.bad.update(part)
            if any(c is None for c in crops) and len(images.bad) <= images.spare:          # `Images.share` stops all processes
                images.spare = -1
            crops = torch.stack([torch.zeros(2, 3, size, size, dtype=torch.uint8) if c is None else c for c in crops]).to(device, non_blocking=True)
            both = [views(crops[:, v], u[:, v], size, True, blurred) for v in (0, 1)]
        else:
            pixels = pool[torch.from_numpy(images.present(index)).to(pool.device)].to(device)
            both = [views(pixels, u[:, v], size, False, blurred) for v in (0, 1)]
        x = torch.cat([v[:own] for v in both])
        sub_x = None
        if subs:
            sub_x = torch.stack([v[own:].unflatten(0, (len(subs), -1)) for v in both], 1).flatten(0, 2)    # (m, 2, b, ...) -> (m 2b, ...)
            sub_x = sub_x.contiguous(memory_format=torch.channels_last)
        yield step, x.contiguous(memory_format=torch.channels_last), sub_x, subs


# ---------------------------------------------------------------------------- training

class Log:
    """The .log.jsonl, each step once (lines from a resumed step on are dropped), and the line that moves: on a terminal
    twice a second, in a file once an epoch, or a minute."""

    def __init__(self, path, first, steps, per_epoch=1):
        self.path, self.first, self.steps, self.per_epoch, self.lines = path, first, steps, max(1, per_epoch), []
        self.began = self.shown = time.time()
        self.wait, self.images, self.warned = 0.0, 0, False
        if rank() == 0:
            lines = open(path, "rb").readlines() if os.path.exists(path) else []
            with sdrnet.whole(path) as file:
                file.writelines(line for line in lines if self.step_of(line) < first)

    @staticmethod
    def step_of(line):
        """The step of a line; infinity for half of one."""
        try:
            return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
        except (ValueError, KeyError, TypeError):
            return math.inf

    def add(self, **values):
        self.lines.append(json.dumps(values) + "\n")

    def flush(self):
        if rank() == 0 and self.lines:
            try:
                with open(self.path, "a") as file:
                    file.writelines(self.lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:                   # a full disk does not say which file
                raise OSError(error.errno, error.strerror, self.path) from None
        self.lines = []

    def ends_epoch(self, step):
        return (step + 1) % self.per_epoch == 0 or step + 1 == self.steps

    def show(self, line):
        step, elapsed = line["step"], time.time() - self.began
        subs = f"  sub-nets {line['ssl']:+.3f} kd {line['kd']:+.3f}" if "ssl" in line else ""
        std = f"  std {line['std']:.2f}" + (f"/{line['std_sub']:.2f}" if "ssl" in line else "")
        eta = elapsed / (step + 1 - self.first) * (self.steps - step - 1)
        text = (f"epoch {line['epoch']:6.1f}  phase {line['phase']}  loss {line['own']:+.3f}{subs}{std}  lr {line['lr']:.4f}  "
            f"{self.images / elapsed:.0f} img/s  wait {100 * self.wait / elapsed:.0f}%  eta {clock(eta)}")
        self.shown = tell(text, self.shown, self.ends_epoch(step))


def learning_rate(optimizer, base, step, steps):
    """Sets and returns the rate: one cosine over the run; the predictors' stays constant, as SimSiam found best."""
    rate = base * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = base if group["constant"] else rate
    return rate


def make_optimizer(model, args):
    """SGD; weight decay leaves BatchNorm and biases alone; SimSiam's predictors keep a constant learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        key = args.objective == "simsiam" and ("predictor" in name or "distiller" in name), p.dim() > 1
        if p.requires_grad:                            # the momentum network follows without gradients
            groups.setdefault(key, []).append(p)
    return torch.optim.SGD([{"params": ps, "constant": constant, "weight_decay": args.weight_decay if decay else 0.0}
                            for (constant, decay), ps in groups.items()], lr=args.lr, momentum=0.9)


def sandwich(net, seed):
    """DATA's rule: the smallest size and a random one, beside the largest network."""
    rng, choices = np.random.default_rng(seed), net.sizes()
    return [tuple(c[0] for c in choices), tuple(c[rng.integers(len(c))] for c in choices)]


def agree(values, device):
    """The mean over the processes of a vector of floats, in float64: one all-reduce."""
    return (sdrnet.add_up(values.double().to(device)) / world_size()).tolist()


def keep(path, older, content):
    """Saves the state to continue from, keeping the one before."""
    if rank() == 0:
        sdrnet.save(path + ".new", content)
        if os.path.exists(path):
            os.replace(path, older)
        os.replace(path + ".new", path)


def resume(paths, config, model, optimizer):
    """Loads the newest whole state among `paths` (newest first) into model and optimizer, and returns it, or None.
    Refuses one of other arguments."""
    for path, *older in (paths[i:] for i in range(len(paths))):
        if not os.path.exists(path):
            continue
        try:
            state = sdrnet.load(path, ("training",))
            if state["config"] == config:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
        except Exception as error:                     # an optimizer's state can be wrong in many ways
            problem = error if isinstance(error, InputError) else f"{path} does not fit this network ({type(error).__name__})"
            if not any(os.path.exists(p) for p in older):
                raise InputError(f"{problem}; start anew with --fresh") from None
            say(f"{problem}; falling back to {older[0]}")
            if rank() == 0:                            # or the next save would make it the state before
                os.replace(path, path + ".bad")
            continue
        same_run(state["config"], config, path)
        say(f"continuing from {path}, step {state['step']}")
        return state
    return None


def same_run(old, new, path):
    """Raises InputError that names the arguments which differ from those that `path` was written with."""
    changed = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(set(old) | set(new)) if old.get(k) != new.get(k)]
    if changed:
        raise InputError(f"{path} was made with other arguments ({'; '.join(changed)}): use them again, another --out, or --fresh")


def clock(seconds):
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def parallel(model, device):
    """The model under DDP when there are several processes. Its buffers are equal everywhere by construction."""
    if world_size() == 1:
        return model
    DDP = nn.parallel.DistributedDataParallel
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in DDP.__init__.__code__.co_varnames else "broadcast_buffers"     # renamed in torch 2.15
    return DDP(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, **{buffers: False})


def train(model, images, plan, args, device, paths, config, tasks):
    """The loop: from the state in <out>/*.last.pt, if any, to the last step. Returns images seen and seconds."""
    optimizer = make_optimizer(model, args)
    state = resume(paths, config, model, optimizer) or {"step": 0, "images_seen": 0, "seconds": 0.0}
    first, seen, spent = state["step"], state["images_seen"], state["seconds"]
    images.bad.update(state.get("bad_images", {}))
    images.share()
    log, wrapped = Log(paths[0].replace(".last.pt", ".log.jsonl"), first, plan.steps, round(plan.count / plan.batch)), parallel(model, device)
    began = saved = mark = time.time()

    def snapshot(step):
        log.flush()
        keep(*paths, {"format": sdrnet.FORMAT, "kind": "training", "config": config, "step": step, "images_seen": seen,
                      "seconds": spent + time.time() - began, "bad_images": dict(images.bad), "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    for step, x, sub_x, subs in training_batches(images, plan, first, size=args.image_size, seed=args.seed, device=device, workers=args.workers, blurred=args.blur):
        log.wait += time.time() - mark
        if subs and (step == 0 or not plan.phase(step - 1)):           # sub-nets enter: q starts as a copy of h
            model.distiller.load_state_dict(model.predictor.state_dict())
        rate = learning_rate(optimizer, args.lr, step, plan.steps)
        model.follow(step, plan.steps)
        along = sandwich(model.net, [args.seed, 4, step]) if args.sizes else [index_to_path(i, plan.groups) for i in subs]
        with autocast(device, args.amp):
            loss, values = wrapped(x, sub_x, along)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        flags = (not torch.isfinite(loss), Signals.caught or 0, due(args.save_every, step, saved), len(images.bad) > len(images.listed))
        flags = torch.tensor([float(f) for f in flags]).to(loss)       # what all processes must agree on, before the weights change
        total, own, ssl, kd, std, *each, bad, stop, save, broken = agree(torch.cat([loss.detach()[None], values, flags]), device)
        names = [str(size) for size in along] if args.sizes else subs
        losses, stds = ({i: round(v, 4) for i, v in zip(names, part)} for part in (each[:len(names)], each[len(names):]))  # {sub-net: its value}
        low = min(stds.values(), default=math.inf)
        if broken:
            images.share()
        if bad:
            log.flush()
            raise InputError(f"step {step}: the loss is not finite (largest network {own:.4g}, sub-nets {losses}, distillation {kd:.4g}); "
                             f"the last good state, if any, is in {paths[0]}: try a lower --lr")
        optimizer.step()

        drawn = plan.batch + len(along) * (plan.batch if args.sizes else plan.rows)
        seen, log.images = seen + drawn, log.images + drawn
        line = {"step": step, "epoch": round((step + 1) * plan.batch / len(images), 3), "phase": plan.phase(step), "loss": total, "own": own, "std": std, "lr": rate}
        if along:
            line.update(subnets=along if args.sizes else subs, ssl=ssl, kd=kd, std_sub=low)
        log.show(line)
        if tasks and log.ends_epoch(step) and ((step + 1) // log.per_epoch % args.monitor_every == 0 or step + 1 == plan.steps):
            line["knn"] = monitor(model.net, tasks, args, device)
        log.add(**line)
        collapsed = min(std, low) < args.collapse_std
        if collapsed and not log.warned:
            log.warned = True
            say(f"warning: step {step}: std {std:.3f}, of sub-nets {stds}: features collapse (healthy is near 1)")
        if stop or save or step + 1 == plan.steps or collapsed and args.stop_on_collapse:
            snapshot(step + 1)
            saved = time.time()
        if collapsed and args.stop_on_collapse:
            raise InputError(f"step {step}: features collapsed (std {std:.3f}, sub-nets {stds}), and --stop-on-collapse was given")
        if stop:
            Signals.caught = Signals.caught or signal.SIGTERM
            raise Stopped()
        mark = time.time()
    return seen, spent + time.time() - began


def monitor(net, tasks, args, device):
    """{task: kNN percent} of the largest network with its running statistics; every process computes its share."""
    result = {}
    for task in tasks:
        train, test = (embed(net, part, size=args.image_size, device=device, amp=args.amp, workers=args.workers) for part in (task.train, task.test))
        result[task.name] = knn_score(train, test, task)
    say("  kNN " + ", ".join(f"{name} {accuracy:.1f} %" for name, accuracy in result.items()))
    return result


# ---------------------------------------------------------------------------- the command

RECIPES = {                                            # values that no option gave
    "toy":   dict(arch="resnet18", width=16, small_stem=False, image_size=32, epochs=20, batch_size=64, lr=0.06, weight_decay=5e-4, layers=2, head=512, blur=0.0, subnets=2),
    "small": dict(arch="resnet18", width=64, small_stem=True, epochs=200, batch_size=256, lr=0.03, weight_decay=5e-4, layers=2, head=2048, blur=0.0, subnets=2),
    "large": dict(arch="resnet50", width=64, small_stem=False, image_size=224, epochs=100, batch_size=512, weight_decay=1e-4, layers=3, head=2048, blur=0.5, subnets=2),
}
OBJECTIVES = {"simsiam": {}, "byol": dict(tau=0.996), "mocov2": dict(tau=0.999, temperature=0.2, queue=4096)}
NOT_COMPARED = {"out", "device", "workers", "root", "download", "save_every", "fresh", "monitor_task", "monitor_every", "stop_on_collapse", "collapse_std", "max_bad"}
OF_SUBNETS = {"groups", "shared", "subnets", "sub_batch", "shared_grad", "distill", "kd_weight", "phases"}      # nothing to a network that trains alone


def parse(argv=None):
    parser = Parser(__doc__)
    data_options(parser)
    group = parser.add_argument_group("network (defaults depend on the images: toy, small, or else the published recipe)")
    group.add_argument("--arch", choices=tuple(sdrnet.ARCHS))
    group.add_argument("--width", type=number(int, 1, 4096), help="channels of the stem and of the first stage")
    group.add_argument("--small-stem", action=argparse.BooleanOptionalAction, default=None, help="3x3 stride 1, no pooling")
    group.add_argument("--image-size", type=number(int, 8, 8192))
    group.add_argument("--blur", type=number(float, 0, 1), help="probability of blur in a view: 0.5, and 0 for small images")
    group.add_argument("--head", type=number(int, 4, 2 ** 20), help="width of the projector")
    group.add_argument("--init", help="start from these weights: simsiam.pt, or a torchvision ResNet state dict; none; default: with --clusters the simsiam.pt (byol.pt, mocov2.pt) in --out")
    group = parser.add_argument_group("SDR")
    group.add_argument("--clusters", help="clusters.npy of cluster.py; without it the largest network trains alone, which is SimSiam")
    group.add_argument("--groups", type=number(int, 1, 64), help="individual groups per stage; default: the fourth root of the number of clusters")
    group.add_argument("--shared", type=number(float, 0, 1), default=0.75, help="share of a stage's channels in its shared group")
    group.add_argument("--subnets", type=number(int, 1), help="m, sub-nets per step: 2")
    group.add_argument("--sub-batch", type=number(int, 1, 2 ** 20), help="images of all sub-nets together in a step, each draws its share from its cluster: 3B")
    group.add_argument("--shared-grad", action=argparse.BooleanOptionalAction, default=True, help="the sub-nets' losses train the shared groups too")
    group.add_argument("--distill", choices=("siamkd", "l2", "none"), default="none", help="from the largest network; the paper's is siamkd")
    group.add_argument("--kd-weight", type=number(float, 0), help="lambda, of --distill siamkd and l2: 1")
    group.add_argument("--phases", default="0,0,0,0,1", help="shares of the epochs: largest network alone, then g, g^2, g^3, g^4 sub-nets; the paper's progressive training: 1,1,1,1,4")
    group = parser.add_argument_group("neighbours of SDR over SimSiam")
    group.add_argument("--objective", choices=("simsiam", "byol", "mocov2"), default="simsiam")
    group.add_argument("--tau", type=number(float, 0, 1 - TINY), help="momentum of the target: byol 0.996, mocov2 0.999, 0.99 for toy images")
    group.add_argument("--queue", type=number(int, 1, 2 ** 24), help="keys in mocov2's queue: 65536, 4096 for small images")
    group.add_argument("--temperature", type=number(float, TINY), help="mocov2's T: 0.2")
    group.add_argument("--sizes", help="D,E: also train nested networks, the smallest of D blocks and E/8 of the channels per stage, as in 1,4")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(float, TINY, 1e6), help="of images drawn for the largest network")
    group.add_argument("--batch-size", type=number(int, 2, 2 ** 20), help="B, over all processes")
    group.add_argument("--lr", type=number(float, TINY))
    group.add_argument("--weight-decay", type=number(float, 0))
    group = common_options(parser)
    training_options(group)
    group.add_argument("--monitor-task", action="append", default=[], help="kNN accuracy on this task while training; repeatable")
    group.add_argument("--monitor-every", type=number(int, 1), default=10, help="epochs between them")
    group.add_argument("--collapse-std", type=number(float, 0), default=0.1, help="std * sqrt(d) below which features count as collapsed")
    group.add_argument("--stop-on-collapse", action="store_true")
    args = parser.parse_args(argv)
    if args.data == "toy":
        parser.idle(args, ("root", "download"), "with --data toy")
    if args.clusters is None and parser.given(args, OF_SUBNETS):       # no error: both stages may be given the same options
        say("warning: without --clusters these options mean nothing: " + ", ".join(parser.given(args, OF_SUBNETS)))
    try:
        args.phases = tuple(float(p) for p in args.phases.split(","))
        args.sizes = None if args.sizes is None else tuple(int(n) for n in args.sizes.split(","))
    except ValueError:
        raise InputError("--phases takes five numbers as in 1,1,1,1,4, --sizes two as in 1,4") from None
    if len(args.phases) != 5 or not all(0 <= p < math.inf for p in args.phases) or sum(args.phases) == 0:
        raise InputError("--phases takes five shares, none negative and not all 0")
    if args.clusters and not any(args.phases[1:]):
        raise InputError("--phases trains no sub-net: one of the last four shares must be positive")
    if args.sizes and len(args.sizes) != 2:
        raise InputError("--sizes takes two numbers, as in 1,4")
    if args.sizes and args.clusters:
        raise InputError("--sizes and --clusters: a network has sizes or paths")
    wrong = [f"--{k}" for k, used in (("tau", ("byol", "mocov2")), ("queue", ("mocov2",)), ("temperature", ("mocov2",))) if getattr(args, k) is not None and args.objective not in used]
    if wrong:
        raise InputError(f"{wrong[0]} is not an option of --objective {args.objective}")
    if args.distill == "none" and args.kd_weight is not None:
        raise InputError("--kd-weight weighs a distillation, and there is none: add --distill siamkd or l2")
    args.kd_weight = 1.0 if args.kd_weight is None else args.kd_weight
    return args


def load_clusters(path, images):
    """clusters.npy checked against this listing: int64 (N,), and k = g^4. Returns it and g. Raises InputError."""
    clusters = load_array(path, "i", 1)
    if len(clusters) != len(images):
        raise InputError(f"{path} has {len(clusters)} entries and --data {len(images)} images: it was made from another listing")
    about = note_beside(path)
    k, sha = about.get("k", int(clusters.max()) + 1), about.get("sha256")
    if not isinstance(k, int) or not 0 <= clusters.min() <= clusters.max() < k:
        raise InputError(f"{path} holds clusters {clusters.min()} to {clusters.max()}" + (f", but the .json beside it says k = {k}" if about else ""))
    if sha is None:
        say(f"warning: no .json beside it says of which images {path} was made, so only its length was checked")
    elif sha != images.fingerprint:
        raise InputError(f"{path} was made from another listing of images (names or seed differ): run cluster.py on this --data")
    g = round(k ** 0.25)
    if g ** 4 != k or k > len(clusters):
        raise InputError(f"{path} has {k} clusters for {len(clusters)} images, which is not g^4: 1, 16, 81, 256, ... sub-nets are possible")
    empty = np.setdiff1d(np.arange(k), clusters)
    if len(empty):
        raise InputError(f"{path}: cluster {empty[0]} has no image")
    return clusters.astype(np.int64), g


def fill_defaults(args, images):
    """Values in force: what was given, else the recipe for these images."""
    recipe = "toy" if args.data == "toy" else "small" if images.packed is not None else "large"
    values = {**RECIPES[recipe], **OBJECTIVES[args.objective], **({"tau": 0.99} if recipe == "toy" and args.objective != "simsiam" else {})}
    if recipe == "small":
        values.update(image_size=int(min(images.packed.shape[2:])))
    if recipe == "large":
        values.update({"byol": {"head": 4096}, "mocov2": {"queue": 65536}}.get(args.objective, {}),
                      lr=(0.03 if args.objective == "mocov2" else 0.05) * (args.batch_size or values["batch_size"]) / 256)
    if args.clusters:                                  # with 3B images for sub-nets beside B: as many images in all as SimSiam saw
        values.update(epochs=values["epochs"] / 4, lr=0.04 if recipe == "toy" else values["lr"])
    for key, value in values.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.image_size < 8:                            # of small images, when none was given
        raise InputError(f"the images of --data {args.data} are {args.image_size} pixels small: give --image-size, at least 8")
    if args.batch_size % world_size():
        raise InputError(f"--batch-size {args.batch_size} does not divide among {world_size()} processes")
    args.sub_batch = args.sub_batch or 3 * args.batch_size
    if args.clusters and (args.sub_batch % (args.subnets * world_size()) or args.sub_batch < 2 * args.subnets * world_size()):
        raise InputError(f"--sub-batch {args.sub_batch} does not divide among {args.subnets} sub-nets x {world_size()} processes with 2 images each: "
                         f"take a multiple of {args.subnets * world_size()}")


def initial_weights(model, path, args):
    """--init: a simsiam.pt (network and heads), or a torchvision ResNet's state dict (network). Prints what was loaded."""
    content = sdrnet.read(path)
    ours = isinstance(content, dict) and "format" in content
    if ours:
        content = sdrnet.load(path, ("simsiam", "sdrnet"))
    weights = content["backbone"] if ours else content
    try:
        weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
        model.net.load_state_dict(weights)
    except (AttributeError, RuntimeError) as error:    # no dict of names; the second line of torch's own names the first that is wrong
        raise InputError(f"{path} holds no weights, or those of another architecture than {args.arch} of width {args.width}"
                         f"{' with small stem' if args.small_stem else ''}: {str(error).splitlines()[-1].strip()[:200]}") from None
    heads = 0
    if ours:
        for name in HEADS:
            module, part = getattr(model, name), content["heads"].get(name)
            if isinstance(part, dict) and {k: getattr(v, "shape", None) for k, v in part.items()} == {k: v.shape for k, v in module.state_dict().items()}:
                module.load_state_dict(part)
                heads += len(part)
    say(f"{path}: loaded all {len(weights)} tensors of the network, {heads} of the heads")


@torch.no_grad()
def centroids_of(net, images, clusters, k, **options):
    """The mean feature of everything and, with it subtracted from normalised features, each cluster's normalised mean:
    (D,), (k, D). New images are assigned by these (`cluster.assign`)."""
    f = F.normalize(embed(net, images, what="centroids", **options))
    mean = f.mean(0)
    index = torch.from_numpy(clusters)
    sums = torch.zeros(k, f.shape[1]).index_add_(0, index, f - mean)
    return mean, F.normalize(sums)


def main():
    args = parse()
    device = start(args)
    images = open_images(args).pack()
    groups = 1
    clusters = None
    if args.clusters:
        clusters, groups = load_clusters(args.clusters, images)
        images.clusters = clusters
        if args.groups not in (None, groups):
            raise InputError(f"--groups {args.groups} does not fit {args.clusters}: its {groups ** 4} clusters are {groups}^4")
    fill_defaults(args, images)
    args.groups = groups
    tasks = open_tasks(args.monitor_task, args.seed)
    for task in tasks:
        task.train.pack(), task.test.pack()
    kind = "sdrnet" if clusters is not None else "datanet" if args.sizes else "simsiam"                 # byol.pt and mocov2.pt are of the same kind
    name, alone = args.objective if kind == "simsiam" else kind, os.path.join(args.out, f"{args.objective}.pt")
    final, last, older = (os.path.join(args.out, f"{name}{ending}.pt") for ending in ("", ".last", ".prev"))
    if clusters is not None and args.init is None and os.path.exists(alone):
        args.init = alone
    idle = set() if args.clusters else OF_SUBNETS
    config = {k: (list(v) if isinstance(v, tuple) else v) for k, v in vars(args).items() if k not in NOT_COMPARED | idle}
    config["images"] = images.fingerprint
    if clusters is not None:
        config["clusters_sha256"] = hashlib.sha256(clusters.tobytes()).hexdigest()

    net = SDRNet(args.arch, args.width, args.groups, args.shared, args.small_stem, args.sizes)
    model = SDR(net, args.layers, args.head, args.distill, args.kd_weight, args.shared_grad or bool(args.sizes), args.objective, args.tau, args.queue, args.temperature)
    if args.init not in (None, "none"):
        initial_weights(model, args.init, args)
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        if args.fresh and not restarted():
            for path in (final, last, older, last.replace(".last.pt", ".log.jsonl")):
                if os.path.exists(path):
                    os.replace(path, path + ".bak")
    if world_size() > 1:
        dist.barrier()
    if os.path.exists(final):
        same_run(sdrnet.load(final, (kind,))["origin"]["config"], config, final)
        say(f"{final} is finished; --fresh trains it anew")
        return
    model.to(device, memory_format=torch.channels_last)
    plan = Plan(len(images), args.batch_size, args.epochs, args.seed, clusters, groups, args.subnets, args.phases, args.sub_batch)
    say(f"{name}: {len(images):,} images of {args.data}, {args.arch} width {args.width} at {args.image_size} px, {plan.steps} steps of {args.batch_size}"
        + (f", {groups ** 4} sub-nets of {net.sub_features / net.features:.3f} width, phases end at {plan.phase_ends}" if clusters is not None else "")
        + f"; {device.type}, {world_size()} process(es), {torch.get_num_threads()} threads")
    say("values in force: " + " ".join(f"{k}={v}" for k, v in sorted(vars(args).items()) if k not in idle and v is not None and v is not False and v != []))
    seen, seconds = train(model, images, plan, args, device, (last, older), config, tasks)
    options = dict(size=args.image_size, device=device, amp=args.amp, workers=args.workers)
    calibrate(net, images, clusters, seed=args.seed, **options)
    more = {}
    if clusters is not None:
        more["feature_mean"], more["centroids"] = centroids_of(net, images, clusters, groups ** 4, **options)
        more["cluster_sizes"] = torch.from_numpy(np.bincount(clusters, minlength=groups ** 4))
    if rank() == 0:
        content = sdrnet.checkpoint(net, kind, **more, origin={"config": config, "images_seen": seen, "seconds": seconds, "bad_images": len(images.bad), "torch": str(torch.__version__)},
                                    heads={n: {k: v.cpu() for k, v in getattr(model, n).state_dict().items()} for n in HEADS})
        content["config"]["image_size"] = args.image_size
        sdrnet.save(final, content)
    say(f"wrote {final}: {seen:,} images seen, {clock(seconds)}" + (f"; {len(images.bad)} broken images skipped, see {images.list_file}" if images.bad else ""))


if __name__ == "__main__":
    run(main, "pretrain.py")
