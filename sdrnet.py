"""sdrnet.py - the SDRnet: one ResNet that holds g^4 sub-nets, a path each (SDR, AAAI 2022, arXiv 2205.13267).

A stage ("SDR block") has its C channels split into a shared group and g individual groups.
A path picks ONE individual group in every stage; any group may follow any other:

              stage 1              stage 2              stage 3              stage 4
    stem ──┬─ shared ─────────┬─── shared ─────────┬─── shared ─────────┬─── shared ──┐
           ├─ group 0         ├─── group 0 ◀       ├─── group 0         ├─── group 0  ├─ pool ─ f
           └─ group 1 ◀       └─── group 1         └─── group 1 ◀       └─── group 1 ◀┘

The marked path is (1, 0, 1, 1): with g = 2 its index is the binary number 1011 = 11 of 2^4 = 16.
W_i (paper) = the shared and the marked groups, sub-net i. W_0 (paper) = everything, the largest network,
which is a standard ResNet: its weights carry torchvision's names and load into torchvision's models.

Widths: of C channels each group has floor(C * (1 - shared) / g), the shared part is the rest;
channels lie [shared | group 0 | ... | group g-1]. With shared = 1/2:

    stage of ResNet-18, width 64   C     g = 1        g = 2       g = 4      sub-net with g = 4
    layer1                         64    32 + 1x32    32 + 2x16   32 + 4x8    40 = 0.625 C
    layer2                        128    64 + 1x64    64 + 2x32   64 + 4x16   80
    layer3                        256    128 + ...    128 + ...   128 + 4x32 160
    layer4                        512    256 + ...    256 + ...   256 + 4x64 320
A ResNet-50 splits `width` like this, and every other width, inner or output, in proportion.
The stem keeps its full width and is common to all paths. Where ResNet-18/34's first shortcut has no
projection, it selects the path's channels; in an extracted sub-net this is a 1x1 convolution of zeros and ones.

BatchNorm: scale and shift exist once and are sliced as weights are. In training each stream (the largest
network's batch; each sub-net's batch) is normalised by its own statistics over all processes. For inference,
statistics belong to the PREFIX of a path: stage s has g^s sets, so that all sub-nets can be run as a tree
(`walk`), each prefix once. They are measured after training (`collect`, then `finish_statistics`).

Sizes (DATA, CVPR 2022) are the other way to share weights: with sizes=(d, e) the network holds, in place of paths,
nested networks of many sizes. A size is a (depth, eighths) per stage: the first `depth` blocks and the first `eighths`/8
of the channels, from (d, e) to everything. It goes wherever a path goes: net(images, size), net.extract(size). Its
statistics for inference are slices of the largest network's, which do not suit it: measure an extracted one's anew.

    net = SDRNet("resnet18", width=64, groups=4)      # 256 sub-nets
    f0 = net(images)                                  # (B, 512) the largest network
    fi = net(images, path=(1, 0, 3, 2))               # (B, 320) one sub-net
    plain = net.extract((1, 0, 3, 2))                 # ResNet of plain torch layers, the same outputs
    for index, f in net.walk(images): ...             # all of them

This file is also all one needs to load a checkpoint elsewhere: `load_network("subnet.pt")`.
"""
import functools
import os
import zipfile
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

FORMAT = 1                                            # of checkpoints; raised when old files no longer load
ARCHS = {"resnet18": (False, (2, 2, 2, 2)), "resnet34": (False, (3, 4, 6, 3)), "resnet50": (True, (3, 4, 6, 3))}
STAGES = 4


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, which file, what to do; scripts print it
    as one line and exit with status 2."""


class OwnError(InputError):
    """Bad input that one process alone has met, which then says so. reason: without the file's name."""
    reason = ""


# ---------------------------------------------------------------------------- paths

def path_to_index(path, groups):
    """(d1, d2, d3, d4) -> d1*g^3 + d2*g^2 + d3*g + d4: the path's digits in base g, first stage first."""
    path = tuple(int(d) for d in path)
    if len(path) != STAGES or not all(0 <= d < groups for d in path):
        raise InputError(f"path {path} is not one of this network: it takes {STAGES} digits from 0 to {groups - 1}")
    return prefix_slot(path, groups)


def index_to_path(index, groups):
    """The inverse of path_to_index."""
    if not 0 <= int(index) < groups ** STAGES:
        raise InputError(f"sub-net {index} does not exist: {groups} groups give sub-nets 0 to {groups ** STAGES - 1}")
    return tuple(int(index) // groups ** (STAGES - 1 - s) % groups for s in range(STAGES))


def prefix_slot(prefix, groups):
    """The row of a stage's statistics that belongs to a prefix: its digits read in base g."""
    return functools.reduce(lambda slot, d: slot * groups + d, prefix, 0)


# ---------------------------------------------------------------------------- slicing
# A cut says which channels m paths use: None for all of them (the largest network), or (shared, group, digits): channels
# [0, shared) and, for a path with digit d, [shared + d * group, shared + (d + 1) * group).
# Paths that run together lie side by side: activations are (B, m * C', H, W), weights (m * O', I', k, k), and the
# convolution has m groups. So a layer is ONE convolution and ONE BatchNorm whatever m is, and every channel's
# statistics are its own path's.

@functools.lru_cache(4096)
def _channels(cut, device):
    """The channels of each path, int64 (m, C')."""
    shared, group, digits = cut
    at = shared + torch.tensor(digits)[:, None] * group + torch.arange(group)
    return torch.cat([torch.arange(shared).expand(len(digits), -1), at], 1).to(device)


def _blocks(tensor, out, inp, p):
    """Pairs of index tuples (in the slice of path p, in the whole): the at most four blocks that a slice of a weight is
    made of. The first is what all paths have in common."""
    def runs(cut, size):
        if cut is None:
            return [(slice(0, size), slice(0, size))]
        shared, group, digits = cut
        at = shared + digits[p] * group
        return [(slice(0, shared), slice(0, shared)), (slice(shared, shared + group), slice(at, at + group))]
    columns = runs(inp, tensor.shape[1])
    return [((to, to2), (frm, frm2)) for to, frm in runs(out, tensor.shape[0]) for to2, frm2 in columns]


def take(tensor, out=None, inp=None):
    """The parts of a weight (O, I, ...) or vector (O,) that m paths use, as a dense copy (m, O', I', ...) or (m, O')."""
    if tensor.dim() == 1:
        return tensor[_channels(out, tensor.device)]
    m = len((out or inp)[2])
    shape = [m] + [size if cut is None else cut[0] + cut[1] for size, cut in zip(tensor.shape, (out, inp))] + list(tensor.shape[2:])
    if tensor.dim() == 4:                              # channels last, as convolutions like it
        part = tensor.new_empty([shape[i] for i in (0, 1, 3, 4, 2)]).permute(0, 1, 4, 2, 3)
    else:
        part = tensor.new_empty(shape)
    for p in range(m):
        for to, frm in _blocks(tensor, out, inp, p):
            part[(p, *to)] = tensor[frm]
    return part


class Cut(torch.autograd.Function):
    """`take` with a gradient: backward adds those of all paths into ONE tensor, in order, in the weight's own precision,
    the same on every run. Without shared_grad the block that all paths have in common gets none."""

    @staticmethod
    def forward(ctx, weight, dtype, out, inp, shared_grad):
        ctx.save_for_backward(weight)
        ctx.cuts, ctx.skip = (out, inp), 0 if shared_grad else 1
        return take(weight.to(dtype), out, inp)

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        total, (out, inp) = torch.zeros_like(weight), ctx.cuts
        if weight.dim() == 1:
            first = out[0] * ctx.skip
            total.index_add_(0, _channels(out, weight.device)[:, first:].flatten(), grad[:, first:].flatten())
            return total, None, None, None, None
        for p, part in enumerate(grad.to(weight.dtype)):
            for to, frm in _blocks(weight, out, inp, p)[ctx.skip:]:
                total[frm] += part[to]
        return total, None, None, None, None


def cut_weight(weight, out, inp=None, shared_grad=True):
    """A parameter sliced for m paths, (m, ...). A whole one is returned as it is, so that autocast can cache its cast."""
    if out is None and inp is None:
        return weight
    device = weight.device.type
    lower = weight.dim() > 1 and torch.is_autocast_enabled(device)
    return Cut.apply(weight, torch.get_autocast_dtype(device) if lower else weight.dtype, out, inp, shared_grad)


# ---------------------------------------------------------------------------- BatchNorm

def world_size():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(tensor):
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def moments(x):
    """Mean and (biased) variance of each channel of x (B, C) or (B, C, H, W), at least in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


class SyncedNorm(torch.autograd.Function):
    """Batch normalisation by the statistics over ALL processes: one all-reduce forward and one backward, with gloo on
    CPU as with NCCL. (torch.nn.SyncBatchNorm needs CUDA.)

    Rank r has n_r values of a channel, of mean m_r and variance v_r:
        N = sum n_r,    m = sum n_r m_r / N,    v = sum n_r (v_r + (m_r - m)^2) / N
    y = w (x - m) / s + b with s = sqrt(v + eps), and m, v depend on every x:
        dx = w/s (dy - mean(dy) - xhat mean(dy xhat)), the means being over all processes.
    """

    @staticmethod
    def forward(ctx, eps, x, weight, bias):
        """x: (B, C, ...); scale and shift: (C,) or None. Returns the output, and mean and variance (C,)."""
        mean, var = moments(x)
        local = torch.cat([mean.new_tensor([x.numel() // x.shape[1]]), mean, var])
        table = local.new_zeros(world_size(), local.numel())
        table[dist.get_rank() if world_size() > 1 else 0] = local     # each rank fills its own row: the sum is an exact gather
        n, m, v = add_up(table).split([1, x.shape[1], x.shape[1]], 1)  # (ranks, 1), (ranks, C), (ranks, C)
        mean = (n * m).sum(0) / n.sum()
        var = (n * (v + (m - mean) ** 2)).sum(0) / n.sum()
        ctx.eps, ctx.total, ctx.affine = eps, n.sum(), weight is not None
        ctx.save_for_backward(x, mean, var, weight if ctx.affine else torch.ones_like(mean))
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, mean, var, weight = ctx.saved_tensors
        _, dw, db = torch.ops.aten.native_batch_norm_backward(         # sum(dy xhat), sum(dy) over this process
            dy, x, torch.ones_like(mean), mean, var, None, None, False, ctx.eps, [False, True, True])
        sum_w, sum_b = add_up(torch.stack([dw, db]))
        inv = torch.rsqrt(var + ctx.eps)
        scale = weight * inv                           # dx = scale dy + slope x + shift, channel by channel
        slope = -scale * inv * sum_w / ctx.total
        shift = -scale * sum_b / ctx.total - slope * mean
        view = [1, -1] + [1] * (x.dim() - 2)
        dx = (dy * scale.view(view) + x * slope.view(view) + shift.view(view)).to(x.dtype)
        # Scale and shift get this process's share: DDP averages the gradients of parameters itself.
        return (None, dx, dw, db) if ctx.affine else (None, dx, None, None)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of the largest network or of m paths side by side, for (B, C) and (B, C, H, W). Its state dict is
    torch's own; the statistics of prefixes (path_mean, path_var, each (g^s, C of a sub-net)) are saved apart.

    Modes: "batch"    by the batch, over all processes; what training uses
           "last"     by the largest network's most recent batch, without gradient: how it sees other images now
           "collect"  by this process's batch, whose moments are added up for `finish`
           "saved"    by the statistics kept for inference
    """
    shared_grad = True

    def __init__(self, channels, affine=True, groups=None):
        super().__init__(channels, affine=affine)
        if groups is not None:                         # (sets of statistics, width of a sub-net)
            self.register_buffer("path_mean", torch.zeros(groups), persistent=False)
            self.register_buffer("path_var", torch.ones(groups), persistent=False)
        self.last, self.sums = None, None

    def scale_and_shift(self, cut=None, m=None):
        """Both (C,), or of m paths side by side (m * C',): sliced by `cut`, or where there is none repeated."""
        if cut is None:
            return [p if m is None or p is None else p.repeat(m) for p in (self.weight, self.bias)]
        return [cut_weight(p, cut, None, self.shared_grad).flatten() for p in (self.weight, self.bias)]

    def statistics(self, cut=None, slots=None, mode="saved"):
        """(mean, variance) that do not depend on the batch: of the largest network (slots None), sliced for a size, or of
        prefixes' slots."""
        if mode == "last":
            return self.last
        both = (self.running_mean, self.running_var) if slots is None else (self.path_mean[slots].flatten(), self.path_var[slots].flatten())
        return both if slots is not None or cut is None else tuple(take(s, cut).flatten() for s in both)

    def forward(self, x, cut=None, slots=None, mode="batch", m=None):
        """x: (B, C, ...) of the largest network, or (B, m * C', ...) of m paths whose channels are `cut` (None: all) and
        whose rows of statistics are `slots`."""
        weight, bias = self.scale_and_shift(cut, m)
        if mode == "batch":
            return self._batch(x, weight, bias, largest=cut is None and m is None)
        mean, var = self._collect(x, slots) if mode == "collect" else self.statistics(cut, slots, mode)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _batch(self, x, weight, bias, largest):
        # torch's own kernel is quicker, but on CPU in fp32 its variance is good to 1e-5 only (seen with torch 2.15),
        # which shows as another loss on 1 process than on 2; in bf16 that does not matter.
        if world_size() > 1 or x.device.type == "cpu" and x.dtype == torch.float32:
            y, mean, var = SyncedNorm.apply(self.eps, x, weight, bias)
        else:                                          # momentum 1 makes torch write this batch's moments there
            mean, var = (torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)) if largest else (None, None)
            y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)
            n = x.numel() // x.shape[1]
            var = var * ((n - 1) / n) if largest else None
        if largest:                                    # and a running average, for monitoring while training
            self.last = mean, var
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return y

    def _collect(self, x, slots):
        mean, var = moments(x)
        n, (m, v) = x.numel() // x.shape[1], (s.double().view(len(slots or [0]), -1) for s in (mean, var))      # (m, C') each
        if self.sums is None:                          # count, sum, sum of squares: float64
            self.sums = torch.zeros(1 if slots is None else len(self.path_mean), 1 + 2 * m.shape[1], dtype=torch.float64, device=x.device)
        for p, slot in enumerate(slots or [0]):
            self.sums[slot] += torch.cat([m.new_ones(1), m[p], v[p] + m[p] * m[p]]) * n
        return mean, var

    def finish(self, cut_of_slot=None):
        """Turns what `collect` added up, on all processes, into the statistics for inference."""
        kept = self.running_mean[None] if cut_of_slot is None else self.path_mean
        if self.sums is None:                          # no batch came to this process
            self.sums = torch.zeros(len(kept), 1 + 2 * kept.shape[1], dtype=torch.float64, device=kept.device)
        n, s, ss = add_up(self.sums).split([1, kept.shape[1], kept.shape[1]], 1)
        mean = s / n.clamp(min=1)
        var = (ss / n.clamp(min=1) - mean ** 2).clamp(min=0)
        if cut_of_slot is None:
            self.running_mean.copy_(mean[0])
            self.running_var.copy_(var[0])
        else:
            self.path_mean.copy_(mean)
            self.path_var.copy_(var)
            for slot in (n[:, 0] < 2).nonzero().flatten().tolist():    # nothing to measure: the largest network's
                self.path_mean[slot] = take(self.running_mean, cut_of_slot(slot))[0]
                self.path_var[slot] = take(self.running_var, cut_of_slot(slot))[0]
        self.sums = None


# ---------------------------------------------------------------------------- networks

def convolve(x, weight, bias, stride, padding=0, groups=1):
    """torch's 2-d convolution. A strided 1x1 one of few channels is given every other pixel instead: on CPU in channels_last,
    with fewer channels in than a vector has places (8 with AVX2, 16 with AVX-512) and one group, the gradient of its weights
    writes beyond its memory (seen with torch 2.15, maps from 8 and 72 pixels on; the process dies, or does later)."""
    if weight.shape[-1] == 1 and max(stride) > 1 and weight.shape[1] < 16 and groups == 1:
        x, stride = x[..., ::stride[0], ::stride[1]], (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


class Shortcut(nn.Conv2d):
    """The 1x1 convolution of a block's shortcut, by `convolve`."""

    def forward(self, x):
        return convolve(x, self.weight, None, self.stride)


class Block(nn.Module):
    """A residual block under torchvision's names: conv1, bn1, conv2, bn2[, conv3, bn3][, downsample.0, downsample.1].
    inner: width inside; out: width of the output; the stride sits in the first 3x3 convolution."""

    def __init__(self, inp, inner, out, stride, bottleneck, norm):
        super().__init__()
        shapes = [(inp, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)] if bottleneck else \
                 [(inp, inner, 3, stride), (inner, out, 3, 1)]
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", norm(b))
        self.depth = len(shapes)
        self.downsample = None
        if stride != 1 or inp != out:                  # without BatchNorm only in an extracted ResNet-18/34: selects the path's channels
            self.downsample = nn.Sequential(Shortcut(inp, out, 1, stride, bias=False), *([norm(out)] if stride != 1 or bottleneck else []))

    def layers(self):
        """The (convolution, BatchNorm) pairs of the main branch, in order."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in range(1, self.depth + 1)]

    def forward(self, x):
        y = x
        for i, (conv, bn) in enumerate(self.layers()):
            y = bn(conv(y)) if i == 0 else bn(conv(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A plain ResNet-18/34/50 under torchvision's names, of any width: what `SDRNet.extract` returns.

    arch: resnet18, resnet34 or resnet50. widths: inner width of the four stages. stem: width of the stem.
    small_stem: 3x3 stride 1 without pooling, for small images. depths: blocks of the stages (None: arch's).
    forward: images (B, 3, H, W) -> features (B, D), the average over positions; D = widths[3], times 4 for resnet50.
    """

    def __init__(self, arch, widths, stem, small_stem=False, norm=nn.BatchNorm2d, depths=None):
        super().__init__()
        bottleneck, depths = ARCHS[arch][0], depths or ARCHS[arch][1]
        self.expansion = 4 if bottleneck else 1
        self.config = {"arch": arch, "widths": list(widths), "stem": stem, "small_stem": small_stem, "depths": list(depths)}
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False) if small_stem else nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = norm(stem)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        inp = stem
        for s, (width, depth) in enumerate(zip(widths, depths)):
            make = norm if norm is nn.BatchNorm2d else (lambda channels, stage=s: norm(channels, stage))
            out, blocks = width * self.expansion, []
            for i in range(depth):
                blocks.append(Block(inp if i == 0 else out, width, out, 2 if i == 0 and s > 0 else 1, bottleneck, make))
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
            inp = out
        self.features = inp
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):            # every block starts as the identity
                nn.init.zeros_(module.layers()[-1][1].weight)

    def stages(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = stage(x)
        return x.mean((2, 3))


class SDRNet(ResNet):
    """The supernet. groups: g, individual groups per stage; shared: share of a stage's channels in its shared group.

    Raises InputError where a group would have no channel. The largest network's features are (B, self.features),
    a sub-net's (B, self.sub_features). shared_grad: whether sub-nets' losses train the shared groups too.
    """
    shared_grad = True

    def __init__(self, arch="resnet18", width=64, groups=4, shared=0.5, small_stem=False, sizes=None):
        self.groups, self.shared, self.width = groups, shared, width
        if arch not in ARCHS:
            raise InputError(f"arch {arch!r} is not one of {', '.join(ARCHS)}")
        if not (0 <= shared < 1 and groups >= 1 and int(width * (1 - shared) / groups) >= 1):
            raise InputError(f"width {width} cannot be split into a shared part of {shared} and {groups} groups of at least 1 channel")
        if sizes and not (1 <= sizes[0] <= min(ARCHS[arch][1]) and 1 <= sizes[1] <= 8 and width % 8 == 0):
            raise InputError(f"{arch} of width {width} has no sizes from {sizes[0]} block(s) and {sizes[1]} eighths of the channels on: "
                             f"at most {min(ARCHS[arch][1])} and 8, of a width that 8 divides")

        def norm(channels, stage=None):                # the stem (stage None) has one set of statistics
            return BatchNorm(channels, groups=None if stage is None else (groups ** (stage + 1), self.sub_width(channels)))
        super().__init__(arch, [width * 2 ** s for s in range(STAGES)], width, small_stem, norm)
        self.config = {"arch": arch, "width": width, "groups": groups, "shared": shared, "small_stem": small_stem, **({"sizes": list(sizes)} if sizes else {})}
        self.sub_features = self.sub_width(self.features)

    # -- which channels

    def split(self, channels):
        """(shared, group): channels in the shared part and in each of the g groups. A ResNet-50's are multiples of those of
        `width`: else a block's output, where g divides it better, would not be four times its inner width."""
        unit = self.width if self.expansion > 1 else channels
        group = int(unit * (1 - self.shared) / self.groups) * (channels // unit)
        return channels - group * self.groups, group

    def sub_width(self, channels):
        return sum(self.split(channels))

    def cut(self, channels, digits):
        """The channels of a stage that paths with these digits there use, or one size with [(depth, eighths)] there
        (None: the largest network); see `take`."""
        if digits is None:
            return None
        if isinstance(digits[0], tuple):
            return channels * digits[0][1] // 8, 0, (0,)
        return (*self.split(channels), tuple(int(d) for d in digits))

    def sizes(self):
        """The (depth, eighths) that each stage may have, smallest first; any may follow any."""
        least, eighths = self.config["sizes"]
        return [[(d, e) for d in range(least, depth + 1) for e in range(eighths, 9)] for depth in ARCHS[self.config["arch"]][1]]

    # -- forward

    def _layer(self, conv, bn, x, out, inp, slots, mode):
        """Convolution and BatchNorm, of the largest network or of m paths side by side."""
        weight = cut_weight(conv.weight, out, inp, self.shared_grad).flatten(0, -4)    # (m * O', I', k, k)
        m = 1 if out is None else len(out[2])
        if mode in ("saved", "last"):                  # statistics are known: folded into the convolution, one pass less
            mean, var = bn.statistics(out, slots, mode)
            scale, shift = bn.scale_and_shift(out)
            scale = scale * torch.rsqrt(var + bn.eps)
            return convolve(x, weight * scale.view(-1, 1, 1, 1), shift - mean * scale, conv.stride, conv.padding, m)
        return bn(convolve(x, weight, None, conv.stride, conv.padding, m), out, slots, mode)

    def stem(self, x, mode="saved"):
        """Images (B, 3, H, W) -> (B, width, H', W'): common to all paths."""
        return self.maxpool(F.relu_(self._layer(self.conv1, self.bn1, x, None, None, None, mode)))

    def stage(self, s, x, prefixes=None, mode="saved"):
        """Stage s (0 to 3) of the largest network, x (B, C, H, W), or of m paths side by side, x (B, m * C', H, W).
        prefixes: the first s+1 digits of each path, or [as many pairs of one size]. Returns a tensor like x."""
        slots, digits, inp = None, None, None
        blocks = self.stages()[s]
        if prefixes is not None:
            digits = [p[s] for p in prefixes]
            if isinstance(digits[0], tuple):
                blocks = blocks[:digits[0][0]]
            else:
                slots = [prefix_slot(p, self.groups) for p in prefixes]
            inp = None if s == 0 else self.cut(blocks[0].conv1.in_channels, [p[s - 1] for p in prefixes])
        for block in blocks:
            y, cut = x, inp
            for i, (conv, bn) in enumerate(block.layers()):
                out = self.cut(conv.out_channels, digits)
                y, cut = self._layer(conv, bn, y if i == 0 else F.relu_(y), out, cut, slots, mode), out
            if block.downsample is not None:
                x = self._layer(*block.downsample, x, out, inp, slots, mode)
            elif s == 0 and block is blocks[0] and out is not None:    # the stem's full width: select the paths' channels
                x = torch.cat([part[:, c] for part, c in zip(x.chunk(len(digits), 1), _channels(out, x.device))], 1)
            x, inp = F.relu_(y.add_(x)), out           # in place: BatchNorm's backward needs its input only
        return x

    def trunk(self, x, paths=None, mode="saved"):
        """Stem outputs (B, C, H, W) -> pooled features of the largest network, (B, D) in fp32. With m paths, outputs
        (m * B, C, H, W), the images of one path after those of another -> (B, m, D')."""
        if paths is not None:                          # side by side, channels last: (B, m * C, H, W)
            x = x.unflatten(0, (len(paths), -1)).permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)
        for s in range(STAGES):
            x = self.stage(s, x, None if paths is None else [p[:s + 1] for p in paths], mode)
        f = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return f if paths is None else f.unflatten(1, (len(paths), -1))

    def forward(self, x, path=None):
        """Images (B, 3, H, W) -> features (B, D) of the largest network, or of the sub-net of `path`, a path or a size,
        for inference."""
        return self.trunk(self.stem(x)) if path is None else self.trunk(self.stem(x), [path])[:, 0]

    def walk(self, x, indices=None):
        """Yields (index, features (B, D)) of all sub-nets, or those in `indices`, in order. Each prefix is computed
        once: of a ResNet-50's 256 paths this takes 0.3 of the multiply-adds of running them one by one."""
        wanted = {index_to_path(i, self.groups) for i in (range(self.groups ** STAGES) if indices is None else indices)}

        def grow(x, prefix):
            if len(prefix) == STAGES:
                yield path_to_index(prefix, self.groups), x.mean((2, 3), dtype=torch.float32)
                return
            for longer in sorted({p[:len(prefix) + 1] for p in wanted if p[:len(prefix)] == prefix}):
                yield from grow(self.stage(len(prefix), x, [longer]), longer)
        yield from grow(self.stem(x), ())

    # -- statistics for inference

    def finish_statistics(self, stage=None):
        """Ends a round of "collect" runs: of the largest network (None), or of the prefixes of one stage."""
        if stage is None:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.finish()
            return
        for block in self.stages()[stage]:
            for bn in [bn for _, bn in block.layers()] + ([] if block.downsample is None else [block.downsample[1]]):
                bn.finish(lambda slot, c=bn.num_features: self.cut(c, [slot % self.groups]))

    def path_statistics(self):
        """{name: (means, variances)}, each (g^s, C): what a checkpoint keeps beside the state dict."""
        return {name: {"mean": m.path_mean.clone(), "var": m.path_var.clone()} for name, m in self.named_modules()
                if isinstance(m, BatchNorm) and hasattr(m, "path_mean")}

    def load_path_statistics(self, tables):
        own = self.path_statistics()
        if set(tables) != set(own) or any(tables[n][k].shape != own[n][k].shape for n in own for k in ("mean", "var")):
            raise InputError("its statistics of sub-nets are not those of this architecture")
        for name, table in tables.items():
            module = self.get_submodule(name)
            module.path_mean.copy_(table["mean"])
            module.path_var.copy_(table["var"])

    # -- one sub-net by itself

    def extract(self, path=None):
        """The sub-net of `path` (a path, a size, or None: the largest network) as a plain, dense ResNet in eval mode,
        equal outputs."""
        stem, digits, depths = self.config["width"], [None] * STAGES, None
        widths, sized = [stem * 2 ** s for s in range(STAGES)], path is not None and isinstance(path[0], (tuple, list))
        if sized:
            digits = [[tuple(pair)] for pair in path]
            if "sizes" not in self.config or len(digits) != STAGES or not all(d in choices for (d,), choices in zip(digits, self.sizes())):
                raise InputError(f"size {[d for d, in digits]} is not one of this network's")
            widths, depths = [w * e // 8 for w, ((_, e),) in zip(widths, digits)], [depth for (depth, _), in digits]
        elif path is not None:
            digits = [[d] for d in index_to_path(path_to_index(path, self.groups), self.groups)]
            widths = [self.sub_width(w) for w in widths]
        net = ResNet(self.config["arch"], widths, stem, self.config["small_stem"], depths=depths).to(self.conv1.weight)
        net.config["path"] = None if path is None or sized else [d for d, in digits]

        def copy(conv, bn, to_conv, to_bn, out, inp, slots):
            to_conv.weight.copy_(cut_weight(conv.weight, out, inp).flatten(0, -4))
            for to, value in zip((to_bn.weight, to_bn.bias, to_bn.running_mean, to_bn.running_var),
                                 (*bn.scale_and_shift(out), *bn.statistics(out, slots))):
                to.copy_(value)
        with torch.no_grad():
            copy(self.conv1, self.bn1, net.conv1, net.bn1, None, None, None)
            inp = None
            for s, (blocks, plain) in enumerate(zip(self.stages(), net.stages())):
                slots = None if path is None or sized else [prefix_slot([d for d, in digits[:s + 1]], self.groups)]
                for block, to in zip(blocks, plain):
                    entry = inp
                    for (conv, bn), (to_conv, to_bn) in zip(block.layers(), to.layers()):
                        out = self.cut(conv.out_channels, digits[s])
                        copy(conv, bn, to_conv, to_bn, out, inp, slots)
                        inp = out
                    if block.downsample is not None:
                        copy(*block.downsample, *to.downsample, out, entry, slots)
                    elif to.downsample is not None:    # the selection of channels, as a convolution of zeros and ones
                        to.downsample[0].weight.copy_(take(torch.eye(stem), out)[0, :, :, None, None])
        return net.eval()


# ---------------------------------------------------------------------------- checkpoints

@contextmanager
def whole(path):
    """A binary file to write, which `path` then is: at every moment the old file or the new one, whole. Temporary file,
    fsync, rename. Raises OSError with the file's name when the disk is full or read-only."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = error if isinstance(error, OSError) else error.__context__        # torch hides the disk's error behind its own
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        raise


def save(path, content):
    """Writes a checkpoint, whole or not at all (see `whole`)."""
    with whole(path) as file:
        torch.save(content, file)


def read(path):
    """What torch.save wrote to a file, without running code from it (weights_only). Raises InputError, naming the file,
    if a single bit of it has changed: torch itself does not look at the checksums in the file."""
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint {path}: run the stage before, or name the right file")
    try:
        if zipfile.is_zipfile(path):                   # torch's files before 1.6 are not, and have no checksums
            with zipfile.ZipFile(path) as parts:
                if any(part.compress_type for part in parts.infolist()) or parts.testzip():        # torch stores, so what is compressed is not its work
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                         # a broken zip or pickle fails in many ways
        raise InputError(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})") from None


class Content(dict):
    """What a checkpoint holds: a value that is missing is an InputError that names the file."""
    path = ""

    def __missing__(self, key):
        raise InputError(f"{self.path} holds no {key!r}: it is damaged, or of another stage")


TYPES = {"config": dict, "backbone": dict, "heads": dict, "statistics": dict, "origin": dict, "model": dict, "optimizer": dict, "kind": str, "format": int,
         "step": int, "centroids": torch.Tensor, "feature_mean": torch.Tensor}


def load(path, kinds=None):
    """Reads a checkpoint (see `read`). kinds: those that fit here, e.g. ("sdrnet",).
    Raises InputError, naming the file, for anything that is not a whole checkpoint of this project."""
    content = read(path)
    if not isinstance(content, dict) or not {"format", "kind", "config"} <= set(content):
        raise InputError(f"{path} is not a checkpoint of this project (no format, kind and config in it)")
    wrong = [k for k, kind in TYPES.items() if not isinstance(content.get(k, kind()), kind)]
    wrong += ["origin"] if not wrong and not isinstance(content.get("origin", {}).get("config", {}), dict) else []
    if wrong:
        raise InputError(f"{path} is damaged: its {wrong[0]} is not what it should be")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']!r}; this version reads format {FORMAT}")
    if kinds is not None and content["kind"] not in kinds:
        raise InputError(f"{path} holds a {content['kind']!r}, and {' or '.join(kinds)} is needed here")
    content = Content({k: Content(v) if k in ("config", "origin") else v for k, v in content.items()})
    for part in (content, *content.values()):
        if isinstance(part, Content):
            part.path = path
    return content


def checkpoint(net, kind, **more):
    """The dict that describes a network: format, kind, config, backbone (torchvision's names), statistics."""
    content = {"format": FORMAT, "kind": kind, "config": dict(net.config), **more,
               "backbone": {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}}
    if kind == "sdrnet":
        content["statistics"] = {n: {k: v.cpu() for k, v in t.items()} for n, t in net.path_statistics().items()}
    return content


def network(content, path="checkpoint"):
    """The network that `load` found: an SDRNet, or for a subnet a plain ResNet; in eval mode, every tensor loaded."""
    config, weights = content["config"], content.get("backbone")

    def make():
        if content["kind"] == "subnet":
            return ResNet(config["arch"], config["widths"], config["stem"], config["small_stem"], depths=config.get("depths"))
        return SDRNet(**{k: config[k] for k in ("arch", "width", "groups", "shared", "small_stem")}, sizes=config.get("sizes"))
    try:
        if not 0 < int(config.get("width", config.get("stem"))) <= 4096 or not 0 < config.get("groups", 1) <= 16 \
                or not all(0 < w <= 32768 for w in config.get("widths", ())) or not all(0 < d <= 36 for d in config.get("depths", ())) \
                or not 8 <= config.get("image_size", 8) + 0 <= 8192:
            raise InputError("its widths, depths, groups or image size are out of range")
        with torch.device("meta"):                     # before any memory is taken for what a file only claims to hold
            shapes = {k: v.shape for k, v in make().state_dict().items()}
        wrong = [k for k in sorted(set(shapes) | set(weights)) if k not in weights or shapes.get(k) != weights[k].shape]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing, too much, or of another shape")
        net = make()
        if content["kind"] == "subnet":
            net.config["path"] = config["path"]
        if not all(bool(torch.isfinite(v).all()) for v in weights.values()):
            raise InputError("it holds weights that are not finite")
        net.load_state_dict(weights, strict=True)
        if content["kind"] == "sdrnet":
            net.load_path_statistics(content["statistics"])
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} does not fit its own architecture ({str(error).splitlines()[0][:150] if str(error) else type(error).__name__})") from None
    return net.eval()


def load_network(path, kinds=None):
    """`load` and `network` in one: SDRNet or plain ResNet, ready for inference."""
    return network(load(path, kinds), path)
