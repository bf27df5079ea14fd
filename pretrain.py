"""pretrain.py - SimSiam, then SDR: one supernet whose sub-nets are each trained on one cluster.

    torchrun pretrain.py                                     # toy images -> runs/toy/simsiam.pt
    torchrun pretrain.py --clusters runs/toy/clusters.npy    # 16 sub-nets -> runs/toy/sdrnet.pt
    python pretrain.py --data photos/ --out runs/photos      # your own folder, any depth
    torchrun --nproc_per_node 8 pretrain.py --data imagenet/train --out runs/in1k --workers 12
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
             pretrain.py --data imagenet/train --out runs/in1k --clusters runs/in1k/clusters.npy

In the paper's terms (SDR, AAAI 2022), for two views 1, 2 of an image, z = projector(f),
p = predictor(z), and sg(z) through which no gradient flows:

    D(p, z)      = -cos(p, sg(z))
    L_ssl(D; W)  = D(p_1, z_2)/2 + D(p_2, z_1)/2               SimSiam, images D, network W
    KD_i         = D(q(z_i1), z_02)/2 + D(q(z_i2), z_01)/2     SiamKD: W_0 teaches W_i through q
    L            = L_ssl(D_0; W_0) + mean over sampled i of [ L_ssl(D_i; W_i) + lambda KD_i ]

Without --clusters the first term alone: SimSiam. With it each step draws B images uniformly for
W_0, and m = 4 clusters in proportion to their sizes, B / 2 images of each for its sub-net. Training
is progressive: phase 0 W_0 alone, phase p = 1 .. 4 sub-nets whose last p stages are split. What is
not given is then as in the SimSiam run whose simsiam.pt it goes on from (the paper's starts from
scratch: --init none), at half its epochs and twice its rate; --objective and --subset come again.

In:   --data      a folder; default: toy images, which tests/toy.py draws into runs/toy/images
      --clusters  clusters.npy, int64 (N,), from cluster.py
Out:  <out>/images.txt     one name a line, sorted: line i is row i of every array
      <out>/simsiam.pt     (byol.pt) network and heads; beside it features.npy, float32 (N, D)
      <out>/sdrnet.pt      with --clusters: the same, and the statistics of all prefixes
      <out>/*.last.pt      the state that the same command goes on from, on a CPU bit for bit
      <out>/*.log.jsonl    the lines on the screen. Losses run from 0 to -1 (kd by l2: 4 to 0). std,
                           `feature_std`, is about 1, though features on one line have 1, too

Measured on one core of an AMD EPYC with bf16 units, torch 2.14: 20 epochs of SimSiam on toy images
in 2:00 minutes; 10 of SDR, four sub-nets of 32 images a step, in 3:50.

Deviations from SimSiam's code: hue turns about the grey axis of RGB and not in HSV; the cosine
falls every step, not every epoch; images that fit into memory are cropped without antialiasing.
Not known of SDR, so chosen here: sub-nets have heads of their own, copies of W_0's when they enter;
the teacher is normalised by the cluster's own batch, as its student is; q, a copy of the predictor,
has a constant rate as predictors do; B, m, lambda, the phases, and what "progressive" means
(--phases-literal: the other reading). The paper's sum over i is a mean. BYOL: views, SGD and rate
as SimSiam's; hidden layers of --head (BYOL's own: 4096).
"""
import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as T

import sdrnet
from sdrnet import InputError

# ------------------------------------------------------------------------------------ views
# Each view of each image has a row of numbers of its own, uniform in [0, 1), a function of (seed,
# step, position in the global batch, view). All of its augmentation follows from that row.
#
# What is drawn comes from np.random.default_rng([seed, stream, ...]). Streams: 0 views, 1 orders of
# epochs (sdrnet.permutation), 2 sub-nets and their images, 3 the anchor, 4 images for statistics.

TRIES = 10                                             # shapes of a crop, of which not all may fit
NUMBERS = 2 * TRIES + 2 + 1 + 9 + 1 + 2                # crop 2 TRIES + 2, flip, colour, grey, blur


def uniform_numbers(seed, step, rows):
    """float32 (rows, 2 views, NUMBERS), the rows of all processes."""
    rng = np.random.default_rng([seed, 0, step])
    return torch.from_numpy(rng.random((rows, 2, NUMBERS), dtype=np.float32))


def crop_boxes(u, height, width, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes: u (n, 22) uniform -> top, left, height, width, int64 (n, 4).

    u holds ten areas, ten aspect ratios and a place. The first of ten shapes that fits counts; if
    none does, the centre of the image."""
    target = height * width * (area[0] + (area[1] - area[0]) * u[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[:, TRIES:2 * TRIES])
    w = (target * aspect).sqrt().round()
    h = (target / aspect).sqrt().round()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)      # (n, 10)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * ratio[1])))
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width / ratio[0])))
    place = torch.where(found[:, None], u[:, 2 * TRIES:2 * TRIES + 2], 0.5)
    top = ((height - h + 1) * place[:, 0]).floor()
    left = ((width - w + 1) * place[:, 1]).floor()
    return torch.stack([top, left, h, w], 1).long()


def crop_batch(images, boxes, size):
    """images uint8 (n, 3, H, W), boxes (n, 4) -> float32 (n, 3, size, size) in [0, 1], bilinear.

    Boxes over twice `size` are sampled, not averaged; enlarged ones read half a pixel around."""
    height, width = images.shape[2:]
    top, left, h, w = boxes.to(images.device).float().unbind(1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)   # output place -> input place
    theta[:, 0, 0] = w / width
    theta[:, 0, 2] = (2 * left + w) / width - 1
    theta[:, 1, 1] = h / height
    theta[:, 1, 2] = (2 * top + h) / height - 1
    grid = F.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    x = images.float() / 255
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def grey(x):
    """Luma of RGB: (n, 3, H, W) -> (n, 1, H, W)."""
    return (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True)


def turn_hue(x, angle):
    """Turns RGB about its grey axis by `angle` (n, 1, 1, 1), radians: x (n, 3, H, W)."""
    mean = x.mean(1, keepdim=True)
    across = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)         # the grey axis times x
    return mean + angle.cos() * (x - mean) + angle.sin() * across


def colour_jitter(x, u):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8: x (n, 3, H, W) in [0, 1], changed in
    place; u (n, 9): jitter or not, four strengths, four that give the order by their ranks."""
    factor = 0.6 + 0.8 * u[:, 1:4]                                 # (n, 3)
    angle = 2 * math.pi * 0.2 * (u[:, 4:5] - 0.5)                  # a tenth of a circle at most
    strength = torch.cat([factor, angle], 1).to(x.device)          # (n, 4)
    order = u[:, 5:9].argsort(1)
    order[u[:, 0] >= 0.8] = -1
    for place in range(4):
        for change in range(4):        # u stays on the CPU: counting rows need not wait for a GPU
            rows = (order[:, place] == change).nonzero()[:, 0].to(x.device)
            part, f = x[rows], strength[rows, change].view(-1, 1, 1, 1)
            if change == 0:                                        # brightness
                part = f * part
            elif change == 1:                                      # contrast, about the mean grey
                part = f * part + (1 - f) * grey(part).mean((2, 3), keepdim=True)
            elif change == 2:                                      # saturation
                part = f * part + (1 - f) * grey(part)
            else:
                part = turn_hue(part, f)
            x[rows] = part.clamp_(0, 1)
    return x


def gaussian_blur(x, sigma, reach=6):
    """Blurs each image by its own sigma (n,) in pixels, cut off at `reach`: x (n, 3, H, W)."""
    n, channels, height, width = x.shape
    place = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-place ** 2 / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)   # (3n, 13)
    mode = "reflect" if min(height, width) > reach else "replicate"
    x = F.pad(x, (reach,) * 4, mode=mode).view(1, n * channels, height + 2 * reach, -1)
    x = F.conv2d(x, kernel[:, None, None], groups=n * channels)    # along rows, each its kernel
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return x.view(n, channels, height, width)


def make_views(x, u, blur):
    """SimSiam's augmentation after the crop: x float32 (n, 3, S, S) in [0, 1], u (n, NUMBERS).

    blur: its probability. Returns (n, 3, S, S), normalised; x is changed in place."""
    flip, colour, grey_or_not, blur_or_not = u[:, 2 * TRIES + 2:].split([1, 9, 1, 2], 1)
    x = colour_jitter(x, colour)
    rows = (grey_or_not[:, 0] < 0.2).nonzero()[:, 0].to(x.device)
    x[rows] = grey(x[rows]).expand(-1, 3, -1, -1)
    rows = (blur_or_not[:, 0] < blur).nonzero()[:, 0]
    if len(rows):
        sigma = (0.1 + 1.9 * blur_or_not[rows, 1]).to(x.device)
        rows = rows.to(x.device)
        x[rows] = gaussian_blur(x[rows], sigma)
    rows = (flip[:, 0] < 0.5).nonzero()[:, 0].to(x.device)
    x[rows] = x[rows].flip(3)
    return sdrnet.normalise(x)


# ------------------------------------------------------------------------------------ model

def cosine_loss(p, z):
    """D(p, z) = -cos(p, sg(z)), the mean over rows in fp32 at least. p, z: (B, d)."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(wide), z.detach().to(wide), dim=1).mean()


def symmetric_loss(p, z):
    """L = D(p_1, z_2)/2 + D(p_2, z_1)/2. p, z: two views (B, d) each."""
    return cosine_loss(p[0], z[1]) / 2 + cosine_loss(p[1], z[0]) / 2


def feature_std(z):
    """std * sqrt(d) of unit z (B, d): about 1 in health, 0 when all features are one. After
    SimSiam's last BatchNorm, which makes their mean 0, at least 2 / sqrt(B): one against all."""
    z = F.normalize(z.detach().float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


def mlp(widths, last_norm=False):
    """Linear, BatchNorm, ReLU, ..., Linear; last_norm: and a BatchNorm without scale and shift, as
    SimSiam's projector ends in. Heads serve training alone: their norms keep no statistics."""
    layers = []
    for i, (inp, out) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        layers.append(nn.Linear(inp, out, bias=last and not last_norm))
        if not last:
            layers += [sdrnet.BatchNorm(out, track_running_stats=False), nn.ReLU(inplace=True)]
    if last_norm:
        layers.append(sdrnet.BatchNorm(widths[-1], affine=False, track_running_stats=False))
    return nn.Sequential(*layers)


class Projector(nn.Sequential):
    """An mlp whose first layer reads the last stage's channels of a path: f (B, D') -> z (B, d).

    columns: which of D those are, int64 (D',), None for all."""

    def forward(self, f, columns=None):
        z = F.linear(f, sdrnet.slice_weight(self[0].weight, None, columns))
        for layer in list(self)[1:]:
            z = layer(z)
        return z


class SDR(nn.Module):
    """The supernet and its heads; one forward is the loss of a step.

    net: SDRNet; layers, width: of the projector (SimSiam: 3, 2048); distill: siamkd, l2 or none;
    kd_weight: lambda; shared_heads: sub-nets use W_0's projector and predictor; objective: simsiam,
    or byol, whose targets come from a momentum copy (its own loss is 4 + 4 L: the same minima)."""

    def __init__(self, net, layers=3, width=2048, distill="siamkd", kd_weight=1.0,
                 shared_heads=False, objective="simsiam"):
        super().__init__()
        self.net, self.distill, self.kd_weight = net, distill, kd_weight
        widths, hidden = [net.features] + [width] * layers, width // 4
        if objective == "byol":
            widths, hidden = [net.features, width, 256], width
        self.projector = Projector(*mlp(widths, last_norm=objective == "simsiam"))
        self.predictor = mlp([widths[-1], hidden, widths[-1]])                # h
        self.sub_projector, self.sub_predictor = self.projector, self.predictor
        if not shared_heads:
            self.sub_projector = copy.deepcopy(self.projector)
            self.sub_predictor = copy.deepcopy(self.predictor)
        self.distiller = copy.deepcopy(self.predictor) if distill == "siamkd" else None   # q
        self.target = None
        if objective == "byol":
            online = nn.ModuleList([self.net, self.projector, self.sub_projector])
            self.target = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def enter_subnets(self):
        """When sub-nets begin to train: their heads, and q, start as copies of W_0's."""
        self.sub_projector.load_state_dict(self.projector.state_dict())
        self.sub_predictor.load_state_dict(self.predictor.state_dict())
        if self.distiller is not None:
            self.distiller.load_state_dict(self.predictor.state_dict())
        if self.target is not None:
            self.target[2].load_state_dict(self.target[1].state_dict())

    @torch.no_grad()
    def update_target(self, tau):
        """BYOL: target <- tau target + (1 - tau) online."""
        online = nn.ModuleList([self.net, self.projector, self.sub_projector])
        for kept, new in zip(self.target.parameters(), online.parameters()):
            kept.lerp_(new, 1 - tau)

    def targets(self, views, z, path=None, columns=None):
        """What the views' predictions aim at: SimSiam z itself, BYOL the momentum copy's."""
        if self.target is None:
            return z
        net, projector, sub_projector = self.target
        head = projector if path is None else sub_projector
        with torch.no_grad():
            return [head(net(v, path, track=False), columns) for v in views]

    def forward(self, x, subs=()):
        """x: two views (B, 3, S, S) of W_0's images; subs: [(path, two views (b, 3, S, S)), ...].

        Returns L and a dict of what to log, without gradient. Views are encoded one by one, each
        normalised by itself, as in SimSiam's code."""
        z_0 = [self.projector(self.net(v)) for v in x]                        # (B, d) each
        p_0 = [self.predictor(z) for z in z_0]
        loss_0 = symmetric_loss(p_0, self.targets(x, z_0))                    # L_ssl(D_0; W_0)
        log = {"loss": loss_0.detach(), "std": feature_std(z_0[0])}
        if not subs:
            return loss_0, log
        parts = [self.subnet_loss(path, views) for path, views in subs]
        loss_i, kd_i, std_i = (torch.stack(values) for values in zip(*parts)) # (m,) each
        log.update(sub_loss=loss_i.detach().mean(), kd=kd_i.detach().mean(), sub_std=std_i.min())
        return loss_0 + (loss_i + self.kd_weight * kd_i).mean(), log

    def subnet_loss(self, path, x_i):
        """L_ssl(D_i; W_i), KD_i and the std of z_i, for two views (b, 3, S, S) of a cluster."""
        columns = self.net.channels(sdrnet.STAGES - 1, self.net.features, path)
        z_i = [self.sub_projector(self.net(v, path), columns) for v in x_i]   # (b, d) each
        p_i = [self.sub_predictor(z) for z in z_i]
        loss_i = symmetric_loss(p_i, self.targets(x_i, z_i, path, columns))   # L_ssl(D_i; W_i)
        if self.distill == "none":
            return loss_i, torch.zeros_like(loss_i), feature_std(z_i[0])
        with torch.no_grad():              # the teacher, normalised by this same batch
            z_0i = [self.projector(self.net(v, track=False)) for v in x_i]
        if self.distill == "siamkd":
            kd_i = symmetric_loss([self.distiller(z) for z in z_i], z_0i)     # KD_i
        else:                              # L2: |unit z_i - unit z_0|^2 = 2 + 2 D, view by view
            kd_i = 2 + cosine_loss(z_i[0], z_0i[0]) + cosine_loss(z_i[1], z_0i[1])
        return loss_i, kd_i, feature_std(z_i[0])


# ------------------------------------------------------------------------------------ which images
# Functions of (seed, step) alone, the same on every process: neither a restart nor the number of
# processes changes what is drawn.

def phase_of(step, steps, phases):
    """0 .. 4: the phase that a step lies in. phases: the five shares of the steps."""
    ends = np.cumsum(phases) / sum(phases) * steps
    return int(np.searchsorted(ends.round(), step, side="right"))


def uniform_batch(step, seed, count, batch):
    """W_0's images, int64 (B,): the next of an endless sequence of epochs, each a permutation."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([sdrnet.permutation(seed, at // count, count)[at % count] for at in places])


def cluster_batches(step, seed, clusters, groups, phase, subnets, batch, literal=False):
    """[(path, images int64 (batch,)), ...]: a step's sub-nets and images of their clusters.

    clusters: int64 (N,). A sub-net is drawn as the one of a random image, so in proportion to its
    images, with replacement. Two readings of the paper's progressive training, phase p = 1 .. 4:
    - the last p stages are split, the others keep their full width (None), and a sub-net's images
      are those of all clusters that share its last p digits;
    - literal: complete paths, but only those whose first 4-p digits are an anchor's."""
    rng = np.random.default_rng([seed, 2, step])
    pool, key = np.arange(len(clusters)), clusters
    if literal:
        anchor = clusters[np.random.default_rng([seed, 3]).integers(len(clusters))]
        pool = np.flatnonzero(clusters // groups ** phase == anchor // groups ** phase)
    else:
        key = clusters % groups ** phase
    chosen = []
    for image in rng.choice(pool, subnets):
        path = sdrnet.index_to_path(clusters[image], groups)
        if not literal:
            path = (None,) * (sdrnet.STAGES - phase) + path[sdrnet.STAGES - phase:]
        members = np.flatnonzero(key == key[image])
        chosen.append((path, rng.choice(members, batch, replace=len(members) < batch)))
    return chosen


# ------------------------------------------------------------------------------------ loading

def two_crops(image, u, size):
    """uint8 (3, H, W), u (2, NUMBERS) -> its two views' crops, uint8 (2, 3, size, size)."""
    boxes = crop_boxes(torch.from_numpy(u), *image.shape[1:]).tolist()
    return torch.stack([T.resized_crop(image, *box, [size, size], antialias=True) for box in boxes])


class Crops(sdrnet.Images):
    """Items (image's index, its numbers (2, NUMBERS), size) -> two crops, uint8 (2, 3, S, S)."""

    def __getitem__(self, item):
        index, u, size = item
        self.transform = functools.partial(two_crops, u=u, size=size)
        return super().__getitem__(index)


def decode_all(folder, names, size, workers, most=2e9):
    """All images as uint8 (N, 3, H, W), or None where they differ in size, take more than `most`
    bytes, or are more than twice as large as `size`, so that cropping would have to average."""
    images = sdrnet.Images(folder, names, transform=torch.clone)
    first = next(sdrnet.load_batches(images, [[0]]))[0]
    if max(first.shape) > 2 * size or first.numel() * len(names) > most:
        return None
    pixels = torch.empty(len(names), *first.shape, dtype=torch.uint8)
    blocks = [range(a, min(a + 256, len(names))) for a in range(0, len(names), 256)]
    for block, samples in zip(blocks, sdrnet.load_batches(images, blocks, workers)):
        if any(sample.shape != first.shape for sample in samples):
            return None
        pixels[block.start:block.stop] = torch.stack(samples)
    return pixels


def step_parts(step, args, count, clusters, groups, steps):
    """This process's part of a step: [(path, images, numbers (n, 2, NUMBERS)), ...], W_0's first,
    whose path is None."""
    parts = [(None, uniform_batch(step, args.seed, count, args.batch_size))]
    phase = 0 if clusters is None else phase_of(step, steps, args.phases)
    if phase > 0:
        parts += cluster_batches(step, args.seed, clusters, groups, phase, args.subnets,
                                 args.sub_batch, args.phases_literal)
    sizes = [len(images) for _, images in parts]
    mine, u = [], uniform_numbers(args.seed, step, sum(sizes))
    for (path, images), numbers in zip(parts, u.split(sizes)):
        rows = np.array_split(np.arange(len(images)), sdrnet.world_size())[sdrnet.rank()]
        mine.append((path, images[rows], numbers[rows]))
    return mine


def training_batches(args, names, clusters, groups, pixels, first, steps, device):
    """Yields (step, two views of W_0's images, [(path, two views of a cluster's), ...]) from step
    `first` on. pixels: as `decode_all` returns them; None: loader workers read and crop ahead."""
    parts_of = functools.partial(step_parts, args=args, count=len(names), clusters=clusters,
                                 groups=groups, steps=steps)
    size = args.image_size
    if pixels is None:
        items = ([(i, row, size) for _, images, u in parts_of(step)
                  for i, row in zip(images, u.numpy())] for step in range(first, steps))
        loaded = sdrnet.load_batches(Crops(args.data, names, None), items, args.workers)
    for step in range(first, steps):
        paths, images, u = zip(*parts_of(step))
        sizes, u = [len(part) for part in images], torch.cat(u)
        if pixels is None:
            crops = (torch.stack(next(loaded)).to(device).float() / 255).unbind(1)
        else:
            batch = pixels[np.concatenate(images)].to(device)
            boxes = [crop_boxes(u[:, v], *batch.shape[2:]) for v in (0, 1)]
            crops = [crop_batch(batch, box, size) for box in boxes]
        views = [make_views(x.contiguous(), u[:, v], args.blur) for v, x in enumerate(crops)]
        pairs = list(zip(*(x.split(sizes) for x in views)))            # two views of each part
        yield step, pairs[0], list(zip(paths[1:], pairs[1:]))


# ------------------------------------------------------------------------------------ training

def make_optimizer(model, weight_decay):
    """SGD with momentum 0.9 and weight decay on everything, as in SimSiam's code. The learning rate
    of the predictors stays constant; see set_lr."""
    predictors = nn.ModuleList([model.predictor, model.sub_predictor, model.distiller])
    constant = {id(p) for p in predictors.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = [{"params": [p for p in trained if id(p) not in constant], "constant": False},
             {"params": [p for p in trained if id(p) in constant], "constant": True}]
    return torch.optim.SGD(rates, lr=0.1, momentum=0.9, weight_decay=weight_decay)


def set_lr(optimizer, base, step, steps):
    """One cosine from `base` to 0 over all steps, but for the predictors; returns the rate."""
    rate = base * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = base if group["constant"] else rate
    return rate


def train_step(model, optimizer, x, subs, device, amp):
    """One step of an SDR, or of DDP around one, on what SDR.forward takes. Returns what to log,
    {name: float}, means over the processes."""
    with sdrnet.autocast(device, amp):
        loss, log = model(x, subs)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    values = torch.stack([value.float() for value in log.values()])
    if sdrnet.world_size() > 1:
        dist.all_reduce(values)
    return dict(zip(log, (values / sdrnet.world_size()).tolist()))


def log_line(last, line):
    """A line of progress on the screen and, as JSON, in the log beside the state file `last`."""
    if sdrnet.rank() == 0:
        texts = (f"{value:.3f}" if isinstance(value, float) else value for value in line.values())
        print("  ".join(f"{key} {text}" for key, text in zip(line, texts)), flush=True)
        with open(last.replace(".last.pt", ".log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


def train(model, args, names, clusters, device, last, arguments):
    """The loop: from the state in the file `last`, if there is one, to the last step."""
    steps = max(1, round(args.epochs * len(names) / args.batch_size))
    per_epoch = max(1, len(names) // args.batch_size)
    optimizer = make_optimizer(model, args.weight_decay)
    first = sdrnet.resume(last, arguments, model, optimizer)
    pixels = decode_all(args.data, names, args.image_size, args.workers)
    groups = model.net.groups
    batches = training_batches(args, names, clusters, groups, pixels, first, steps, device)
    ddp = model
    if sdrnet.world_size() > 1:                        # phase 0 leaves the heads of sub-nets alone
        ddp = DistributedDataParallel(model, find_unused_parameters=clusters is not None,
                                      broadcast_buffers=False)         # equal on all anyway
    shown = saved = time.time()
    shown_step = first                                 # the rate is that since the last line
    sdrnet.catch_signals()
    for step, x, subs in batches:
        phase = 0 if clusters is None else phase_of(step, steps, args.phases)
        if subs and (step == 0 or phase_of(step - 1, steps, args.phases) == 0):
            model.enter_subnets()                      # a function of the step: resuming is exact
        rate = set_lr(optimizer, args.lr * args.batch_size / 256, step, steps)
        values = train_step(ddp, optimizer, x, subs, device, args.amp)
        if model.target is not None:                   # BYOL's tau rises from 0.996 to 1
            model.update_target(1 - 0.002 * (1 + math.cos(math.pi * step / steps)))
        if not math.isfinite(sum(values.values())):
            raise InputError(f"step {step:,}: not finite: {values}: start anew, --fresh, with a "
                             "lower --lr or --amp off")
        done, now = step + 1, time.time()
        epoch_ends = done % per_epoch == 0 or done == steps
        line_due = epoch_ends or now - shown > 60 or done == first + 10
        save_due = done == steps or now - saved > (60 if epoch_ends else 600)
        stop, show, save = sdrnet.on_any(bool(sdrnet.CAUGHT), line_due, save_due)
        if show:
            speed = (done - shown_step) / (now - shown)
            shown, shown_step = now, done
            log_line(last, {"step": done, "phase": phase,
                            "epoch": done * args.batch_size / len(names), "lr": rate, **values,
                            "steps/s": speed, "minutes left": (steps - done) / speed / 60})
            if min(values["std"], values.get("sub_std", 1.0)) < 0.5:
                sdrnet.print0("warning: std is far below 1: the features collapse; lower --lr")
        if args.monitor_task and done % max(1, steps // 10) == 0:
            monitor(model.net, args, done, device, last)
        if save or stop:
            saved = now
            sdrnet.save_state(last, done, arguments, model, optimizer)
        if stop:
            sdrnet.print0(f"stopped at step {done:,}: without --fresh the same command goes on")
            sys.exit(128 + max(sdrnet.CAUGHT, default=15))


def monitor(net, args, step, device, last):
    """kNN accuracy of W_0, by its running statistics, on the test images of args.monitor_task."""
    import route                                       # the one arrow to another stage
    net.eval()
    features = route.task_features(net, args.monitor_task, device, args.amp, args.workers)
    net.train()
    _, accuracy = route.knn_accuracy(*features, args.monitor_task)
    log_line(last, {"step": step, "task": args.monitor_task.name, "knn": accuracy})


# ------------------------------------------------------------------------------------ the end

def finish(model, kind, args, names, clusters, device, origin, final):
    """Statistics for inference, features.npy (SimSiam and BYOL), then the checkpoint `final`, whose
    existence so vouches for the rest."""
    sdrnet.catch_signals(False)                        # the last step is saved
    net, groups = model.net, model.net.groups
    crop = functools.partial(sdrnet.center_crop, size=args.image_size)
    images = sdrnet.Images(args.data, names, crop)
    lengths = range(1 if clusters is None else 1 + sdrnet.STAGES)
    prefixes = [p for n in lengths for p in itertools.product(range(groups), repeat=n)]
    batches = {p: calibration_batches(p, len(names), clusters, groups, args.seed) for p in prefixes}
    stream = sdrnet.load_batches(images, itertools.chain(*batches.values()), args.workers)

    def images_of(prefix):             # in the order of `prefixes`: workers start once, read ahead
        for samples in itertools.islice(stream, len(batches[prefix])):
            yield sdrnet.normalise(torch.stack(samples).to(device).float() / 255)
    sdrnet.recalibrate_bn(net, images_of, prefixes=clusters is not None)
    if clusters is None:
        features = sdrnet.embed(net, images, device, args.amp, args.workers)
    if sdrnet.rank() == 0:
        if clusters is None:
            write = functools.partial(np.save, arr=features)
            sdrnet.save_file(os.path.join(args.out, "features.npy"), write)
        heads = {name: head.state_dict() for name, head in model.named_children()
                 if name not in ("net", "target")}
        content = {"kind": kind, "config": net.config, "image_size": args.image_size,
                   "heads": heads, "backbone": net.resnet.state_dict(),
                   "statistics": net.prefix_statistics(), "origin": origin}
        sdrnet.save_file(final, functools.partial(torch.save, content))
    sdrnet.print0(f"wrote {final}")


def calibration_batches(prefix, images, clusters, groups, seed, count=512, batch=256):
    """Which images a prefix's statistics are measured on: half from the clusters whose paths begin
    with it, half from everywhere, since a task is wider than a cluster; for W_0, (), four times
    as many from everywhere. Returns this process's part of each batch, a list of int64 arrays."""
    rng = np.random.default_rng([seed, 4, *prefix])
    chosen = rng.integers(images, size=count if prefix else 4 * count)
    if prefix:
        below = groups ** (sdrnet.STAGES - len(prefix))
        members = np.flatnonzero(clusters // below == sdrnet.path_to_index(prefix, groups))
        if len(members):                               # an empty cluster's sub-net never trained
            chosen[::2] = rng.choice(members, len(chosen[::2]))
    return [block[sdrnet.rank()::sdrnet.world_size()] for block in chosen.reshape(-1, batch)]


# ------------------------------------------------------------------------------------ command

RECIPES = {                                            # where neither option nor --init says
    "toy": dict(arch="resnet18", width=16, small_stem=False, image_size=32, head=512, layers=2,
                epochs=20, batch_size=64, lr=0.24, weight_decay=5e-4, blur=0.0),
    "small": dict(arch="resnet18", width=64, small_stem=True, head=2048, layers=2,
                  epochs=200, batch_size=256, lr=0.03, weight_decay=5e-4, blur=0.0),
    "large": dict(arch="resnet50", width=64, small_stem=False, image_size=224, head=2048, layers=3,
                  epochs=100, batch_size=512, lr=0.05, weight_decay=1e-4, blur=0.5),
}
RUN_ONLY = ("data", "subset", "out", "init", "device", "workers", "fresh",
            "monitor_task")                            # may change in a run: images go by name
SDR_ONLY = ("shared", "subnets", "sub_batch", "distill", "kd_weight", "phases", "phases_literal",
            "shared_heads")                            # mean nothing without clusters


def read_phases(text):
    """"1,1,1,1,4" -> [1.0, 1.0, 1.0, 1.0, 4.0], a type for argparse."""
    shares = [float(share) for share in text.split(",")]
    if len(shares) != 5 or not all(0 <= s < math.inf for s in shares) or not any(shares[1:]):
        raise argparse.ArgumentTypeError(f"{text}: five shares are needed, none negative, one of "
                                         "the last four above 0, as in 1,1,1,1,4")
    return shares


def build_parser():
    """The options. Where no default is given, RECIPES hold it."""
    number = sdrnet.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    group = parser.add_argument_group("images and files")
    group.add_argument("--data", help="folder of images, at any depth; default: toy images")
    group.add_argument("--out", help="folder of this run's files; of toy images runs/toy")
    group.add_argument("--subset", help="an .npy of indices: train on these images of --data only")
    group.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()),
                       help="processes that read images; 0: this one does")
    group = parser.add_argument_group("network")
    group.add_argument("--arch", choices=sorted(sdrnet.ARCHS), help="paper: resnet50")
    group.add_argument("--width", type=number(int, 1), help="channels of the stem; paper: 64")
    group.add_argument("--small-stem", action=argparse.BooleanOptionalAction, default=None,
                       help="first convolution 3x3 of stride 1, no pooling; paper: no")
    group.add_argument("--image-size", type=number(int, 8), help="pixels a side; paper: 224")
    group.add_argument("--head", type=number(int, 4), help="projector's width; SimSiam: 2048")
    group = parser.add_argument_group("SDR")
    group.add_argument("--clusters", help="clusters.npy of cluster.py; without it SimSiam alone")
    group.add_argument("--shared", type=number(float, 0, 1), default=0.5,
                       help="share of a stage's channels that all paths use: 0.5; paper: not given")
    group.add_argument("--subnets", type=number(int, 1), default=4,
                       help="m, sub-nets drawn a step: 4; paper: not given")
    group.add_argument("--sub-batch", type=number(int, 2),
                       help="images of each sub-net: half of --batch-size; paper: not given")
    group.add_argument("--distill", choices=("siamkd", "l2", "none"), default="siamkd",
                       help="from W_0 to sub-nets; paper: siamkd")
    group.add_argument("--kd-weight", type=number(float, 0), default=1.0,
                       help="lambda: 1; paper: not given")
    group.add_argument("--phases", type=read_phases, default=[1.0, 1.0, 1.0, 1.0, 4.0],
                       help="shares of 0 to 4: 1,1,1,1,4; without: 0,0,0,0,1; paper: not given")
    group.add_argument("--phases-literal", action="store_true",
                       help="phase p trains complete paths that begin with an anchor's 4-p digits")
    group.add_argument("--shared-heads", action="store_true",
                       help="sub-nets use W_0's projector and predictor; paper: not given")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--objective", choices=("simsiam", "byol"), default="simsiam",
                       help="simsiam; the paper has both")
    group.add_argument("--init", help="start from ours, with its run's values, or from any ResNet; "
                       "none: at random, as the paper; with --clusters <out>/simsiam.pt")
    group.add_argument("--epochs", type=number(float, 1e-6),
                       help="of W_0; SimSiam: 100, SDR half of --init's; paper: not given")
    group.add_argument("--batch-size", type=number(int, 2), help="B; SimSiam: 512")
    group.add_argument("--lr", type=number(float, 1e-12), help="x B / 256; SimSiam 0.05, SDR twice")
    group.add_argument("--weight-decay", type=number(float, 0), help="SimSiam: 1e-4")
    group.add_argument("--blur", type=number(float, 0, 1), help="its probability; SimSiam: 0.5")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1),
                       help="of everything drawn: 0; with --init or --clusters 1")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                       help="auto: cuda where there is one")
    group.add_argument("--amp", choices=("auto", "off"), default="auto",
                       help="auto: bf16 where the hardware has it")
    group.add_argument("--fresh", action="store_true", help="start anew, over an earlier run")
    group.add_argument("--monitor-task", help="kNN accuracy on this task, a folder with train/ and "
                       "test/ of a folder a class, ten times a run")
    return parser


def earlier_values(path, sdr):
    """A recipe's values in the run that wrote `path`, as `default_values` says; {} if not ours."""
    content = sdrnet.read_torch_file(path)
    ours = isinstance(content, dict) and "kind" in content
    arguments = content.get("origin", {}).get("arguments", {}) if ours else {}
    complete = RECIPES["large"].keys() <= arguments.keys()
    values = {key: arguments[key] for key in RECIPES["large"]} if complete else {}
    if values and sdr and content["kind"] != "sdrnet":
        values |= {"epochs": values["epochs"] / 2, "lr": 2 * values["lr"]}
    return values


def default_values(args, names, recipe):
    """(where they are from, values): those of --init's run, for SDR that begins half its epochs and
    twice its rate; else the recipe given, else one by the median short side of fifty images."""
    if args.init not in (None, "none") and (values := earlier_values(args.init, args.clusters)):
        return f"of {args.init}", values
    if recipe in ("toy", "large"):
        return recipe, dict(RECIPES[recipe])
    some = names[::max(1, len(names) // 50)]
    sides = sdrnet.Images(args.data, some, transform=lambda image: min(image.shape[1:]))
    side = int(np.median(next(sdrnet.load_batches(sides, [range(len(some))]))))
    if side > 64 and recipe is None:
        return "large", dict(RECIPES["large"])
    return "small", {**RECIPES["small"], "image_size": min(64, max(8, side))}


def fill_defaults(args, names, recipe):
    """Fills in what was not given, by `default_values`; checks it. Raises InputError."""
    recipe, values = default_values(args, names, recipe)
    for key, value in values.items():
        if getattr(args, key, None) is None:           # `layers` has no option
            setattr(args, key, value)
    world = sdrnet.world_size()
    args.sub_batch = args.sub_batch or world * max(2, args.batch_size // world // 2)
    for option, value in (("--batch-size", args.batch_size), ("--sub-batch", args.sub_batch)):
        if value % world or value == world:
            raise InputError(f"{option} {value} does not divide among {world} processes, with two "
                             "images or more for each")
    if len(names) < 2:
        raise InputError(f"{args.data}: one image alone teaches nothing")
    known = {k: v for k, v in sorted(vars(args).items()) if args.clusters or k not in SDR_ONLY}
    sdrnet.print0(f"recipe {recipe}:", *(f"{key}={value}" for key, value in known.items()))


def fingerprint(data):
    """The first 16 digits of bytes' SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def load_indices(path, option):
    """An .npy of integers, int64 (N,). Raises InputError."""
    try:
        array = np.lib.format.open_memmap(path, "r")       # np.load would open an archive too
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{option} {path} is not there or no plain .npy "
                         f"({sdrnet.first_line(error)})") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0 or array.min() < 0:
        raise InputError(f"{option} {path} holds {array.dtype} of shape {array.shape}; integers "
                         "from 0 on, of one dimension, are needed")
    return array.astype(np.int64)


def load_clusters(path, names):
    """clusters.npy for these images: int64 (N,), and g. Raises InputError where it is of others."""
    clusters = load_indices(path, "--clusters")
    listing = os.path.join(os.path.dirname(path), "images.txt")
    if os.path.exists(listing):
        compare_listings(listing, names, "cluster these images")
    if len(clusters) != len(names):
        raise InputError(f"{path} has {len(clusters):,} rows, and there are {len(names):,} images: "
                         "it is of another folder, or of another --subset")
    groups = math.ceil((clusters.max() + 1) ** 0.25 - 1e-9)
    empty = groups ** sdrnet.STAGES - len(np.unique(clusters))
    if empty:
        sdrnet.print0(f"{path}: {empty} of {groups}^4 clusters hold no image; their sub-nets will "
                      "not train")
    return clusters, groups


def compare_listings(path, names, otherwise="give another --out, or --fresh"):
    """Raises InputError that names the first line in which a listing differs from `names`."""
    pairs = itertools.zip_longest(sdrnet.load_names(path), names, fillvalue="nothing")
    for line, (was, now) in enumerate(pairs, start=1):
        if was != now:
            raise InputError(f"{path} has {was} in line {line}, the images given {now}: name the "
                             f"folder and --subset that it is of, or {otherwise}")


def load_init(model, path):
    """--init: backbone, and where the file is of ours the heads of W_0, all of them."""
    message = sdrnet.load_weights(model.net.resnet, path)
    content = sdrnet.read_torch_file(path)
    heads = content.get("heads", {}) if "kind" in content else {}
    if heads:
        try:
            model.projector.load_state_dict(heads["projector"])
            model.predictor.load_state_dict(heads["predictor"])
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path}: its heads do not fit --head and --objective "
                             f"({sdrnet.first_line(error)})") from None
    if model.target is not None:
        model.update_target(tau=0.0)
    sdrnet.print0(message + (", and W_0's heads" if heads else "; heads start at random"))


def start_folder(args, names, arguments, final, last):
    """<out> and its images.txt; --fresh removes an earlier run's files. Returns False where the run
    is finished; raises InputError where its files are of other images or arguments."""
    listing = os.path.join(args.out, "images.txt")
    if sdrnet.rank() == 0 and args.fresh:
        old = [final, last, last.replace(".last.pt", ".log.jsonl"), listing]
        if not args.clusters:                          # images.txt would vouch for them
            old += [os.path.join(args.out, name) for name in ("features.npy", "clusters.npy")]
        for path in filter(os.path.exists, old):
            os.remove(path)
    if sdrnet.world_size() > 1:
        dist.barrier()
    if os.path.exists(listing):
        compare_listings(listing, names)
    if any(sdrnet.on_any(os.path.exists(final))):      # a process that lacks it says so
        origin = sdrnet.load_checkpoint(final).get("origin", {})
        sdrnet.refuse_changes(origin.get("arguments", {}), arguments, final)
        sdrnet.print0(f"{final} is finished; --fresh trains it anew")
        return False
    if sdrnet.rank() == 0:
        sdrnet.make_folder(args.out)
        sdrnet.save_names(listing, names)
    return True


def run(args):
    """The command, from the options on."""
    recipe, device = None, sdrnet.setup(args.device, args.seed)
    if args.data is None:
        args.data, args.out = os.path.join(sdrnet.toy_folder(), "images"), args.out or "runs/toy"
        recipe = "toy"
    elif args.out is None:
        raise InputError(f"--data {args.data} needs a folder of its own for its files: --out")
    names = sdrnet.list_images(args.data, leave_out=args.out)
    if args.subset:
        chosen = np.unique(load_indices(args.subset, "--subset"))
        if chosen[-1] >= len(names):
            raise InputError(f"--subset {args.subset}: index {chosen[-1]}, and {args.data} holds "
                             f"{len(names):,} images")
        names = [names[i] for i in chosen]
    clusters, groups, kind = None, 1, args.objective
    if args.clusters:
        kind = "sdrnet"
        clusters, groups = load_clusters(args.clusters, names)
        args.init = args.init or os.path.join(args.out, f"{args.objective}.pt")
    fill_defaults(args, names, recipe)
    if device.type == "cpu" and args.width > 16:
        sdrnet.print0("no GPU: should it take too long, the README has a small network's options")
    if args.clusters and sdrnet.split(args.width, groups, args.shared)[1] == 0:
        raise InputError(f"{args.clusters} needs {groups} groups a stage, and --width {args.width} "
                         f"with --shared {args.shared:g} has no channel for each")
    if args.monitor_task:
        import route
        args.monitor_task = route.open_task(args.monitor_task, args.image_size)
    left_out = RUN_ONLY if args.clusters else RUN_ONLY + SDR_ONLY
    arguments = {k: v for k, v in vars(args).items() if k not in left_out}
    listing = "\n".join(names).encode("utf-8", "surrogateescape")
    arguments |= {"images": fingerprint(listing), "init": None}        # files by what they hold
    if clusters is not None:
        arguments["clusters"] = fingerprint(clusters.tobytes())
    if args.init not in (None, "none"):
        arguments["init"] = fingerprint(np.fromfile(args.init, np.uint8))
    final, last = (os.path.join(args.out, kind + ending) for ending in (".pt", ".last.pt"))
    other = os.path.join(args.out, "byol.pt" if kind == "simsiam" else "simsiam.pt")
    if clusters is None and os.path.exists(other):
        raise InputError(f"{args.out}/features.npy is of {other}: give another --out")
    if not start_folder(args, names, arguments, final, last):
        return
    net = sdrnet.SDRNet(args.arch, args.width, groups, args.shared, args.small_stem)
    # Without sub-nets W_0 needs neither q nor heads for them.
    distill, one_set = (args.distill, args.shared_heads) if args.clusters else ("none", True)
    model = SDR(net, args.layers, args.head, distill, args.kd_weight, one_set, args.objective)
    if args.init not in (None, "none"):
        load_init(model, args.init)
    model.to(device)
    if args.amp == "auto" and sdrnet.has_bf16(device.type):
        model.to(memory_format=torch.channels_last)    # quicker in bf16, slower in fp32
    train(model, args, names, clusters, device, last, arguments)
    origin = {"command": " ".join(sys.argv), "arguments": arguments, "images": len(names),
              "torch": str(torch.__version__)}
    finish(model, kind, args, names, clusters, device, origin, final)


def main():
    parser = build_parser()
    args = parser.parse_args()
    changed = [name for name in SDR_ONLY if getattr(args, name) != parser.get_default(name)]
    if changed and args.clusters is None:
        parser.error(f"--{changed[0].replace('_', '-')} means nothing without --clusters")
    if args.seed is None:              # what goes on sees other views than the run before it saw
        args.seed = 1 if args.init or args.clusters else 0
    try:
        run(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
