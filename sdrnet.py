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
A ResNet-50 splits the inner width of a block like this and its output at four times that.
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
import os

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


# ---------------------------------------------------------------------------- paths

def path_to_index(path, groups):
    """(d1, d2, d3, d4) -> d1*g^3 + d2*g^2 + d3*g + d4: the path's digits in base g, first stage first."""
    path = tuple(int(d) for d in path)
    if len(path) != STAGES or not all(0 <= d < groups for d in path):
        raise InputError(f"path {path} is not one of this network: it takes {STAGES} digits from 0 to {groups - 1}")
    return sum(d * groups ** (STAGES - 1 - s) for s, d in enumerate(path))


def index_to_path(index, groups):
    """The inverse of path_to_index."""
    if not 0 <= int(index) < groups ** STAGES:
        raise InputError(f"sub-net {index} does not exist: {groups} groups give sub-nets 0 to {groups ** STAGES - 1}")
    return tuple(int(index) // groups ** (STAGES - 1 - s) % groups for s in range(STAGES))


def prefix_slot(prefix, groups):
    """The row of a stage's statistics that belongs to a prefix: its digits read in base g. None for the largest
    network (prefix None) and for a size, which have no row."""
    if prefix is None or isinstance(prefix[0], tuple):
        return None
    slot = 0
    for d in prefix:
        slot = slot * groups + d
    return slot


# ---------------------------------------------------------------------------- slicing
# A cut says which channels a path uses: None for all of them, or (n, a, b) for channels [0, n) and [a, b).

def _runs(cut, size):
    """The runs of channels in a cut, as (place in the slice, place in the whole, length)."""
    return [(0, 0, size)] if cut is None else [(0, 0, cut[0]), (cut[0], cut[1], cut[2] - cut[1])]


def _blocks(tensor, out, inp):
    """Pairs of index tuples (in the slice, in the whole): the at most four blocks that a slice is made of."""
    for to, frm, n in _runs(out, tensor.shape[0]):
        rows = (slice(to, to + n),), (slice(frm, frm + n),)
        if tensor.dim() == 1:
            yield rows
            continue
        for to, frm, n in _runs(inp, tensor.shape[1]):
            yield rows[0] + (slice(to, to + n),), rows[1] + (slice(frm, frm + n),)


def take(tensor, out=None, inp=None):
    """tensor[out][:, inp], the part of a weight (O, I, ...) or vector (O,) that a path uses, as a dense copy."""
    shape = list(tensor.shape)
    for dim, cut in ((0, out), (1, inp)):
        if cut is not None:
            shape[dim] = cut[0] + cut[2] - cut[1]
    nhwc = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    part = torch.empty(shape, dtype=tensor.dtype, device=tensor.device,
                       memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    for to, frm in _blocks(tensor, out, inp):
        part[to] = tensor[frm]
    return part


class Cut(torch.autograd.Function):
    """One weight, sliced for several paths at once. Backward adds the paths' gradients into ONE tensor, in order:
    cheaper than a full-size gradient per slice, summed in the weight's own precision, the same on every run.
    Without shared_grad the block that all paths have in common (shared x shared, always the first) gets none."""

    @staticmethod
    def forward(ctx, weight, dtype, cuts, shared_grad):
        ctx.save_for_backward(weight)
        ctx.cuts, ctx.skip = cuts, 0 if shared_grad else 1
        cast = weight.to(dtype)
        return tuple(take(cast, out, inp) for out, inp in cuts)

    @staticmethod
    def backward(ctx, *grads):
        weight, = ctx.saved_tensors
        total = torch.zeros_like(weight)
        for (out, inp), grad in zip(ctx.cuts, grads):
            for to, frm in list(_blocks(weight, out, inp))[ctx.skip:]:
                total[frm] += grad[to]
        return total, None, None, None


def cut_all(weight, outs, inps=None, shared_grad=True):
    """[weight sliced for each stream]. A whole weight is returned as it is, so that autocast can cache its cast."""
    cuts = tuple(zip(outs, inps or [None] * len(outs)))
    if all(cut == (None, None) for cut in cuts):
        return [weight] * len(cuts)
    device = weight.device.type
    lower = weight.dim() > 1 and torch.is_autocast_enabled(device)
    return Cut.apply(weight, torch.get_autocast_dtype(device) if lower else weight.dtype, cuts, shared_grad)


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
    """Batch normalisation of several streams by their statistics over ALL processes: one all-reduce forward and
    one backward for all streams together, with gloo on CPU as with NCCL. (torch.nn.SyncBatchNorm needs CUDA.)

    Rank r has n_r values of a channel, of mean m_r and variance v_r:
        N = sum n_r,    m = sum n_r m_r / N,    v = sum n_r (v_r + (m_r - m)^2) / N
    y = w (x - m) / s + b with s = sqrt(v + eps), and m, v depend on every x:
        dx = w/s (dy - mean(dy) - xhat mean(dy xhat)), the means being over all processes.
    """

    @staticmethod
    def forward(ctx, eps, k, *args):
        """args: k inputs (B_i, C_i, ...), k scales and k shifts (C_i,) or None. Returns k outputs, k means, k variances."""
        xs, weights, biases = args[:k], args[k:2 * k], args[2 * k:]
        local = torch.cat([part for x in xs for mean, var in [moments(x)]
                           for part in (mean.new_tensor([x.numel() // x.shape[1]]), mean, var)])
        table = local.new_zeros(world_size(), local.numel())
        table[dist.get_rank() if world_size() > 1 else 0] = local     # each rank fills its own row: the sum is an exact gather
        add_up(table)
        outs, means, variances, ctx.totals = [], [], [], []
        for x, w, b, part in zip(xs, weights, biases, table.split([1 + 2 * x.shape[1] for x in xs], 1)):
            n, m, v = part.split([1, x.shape[1], x.shape[1]], 1)       # (ranks, 1), (ranks, C), (ranks, C)
            mean = (n * m).sum(0) / n.sum()
            var = (n * (v + (m - mean) ** 2)).sum(0) / n.sum()
            outs.append(F.batch_norm(x, mean, var, w, b, False, 0.0, eps))
            means, variances = means + [mean], variances + [var]
            ctx.totals.append(n.sum())
        ctx.eps, ctx.k, ctx.affine = eps, k, weights[0] is not None
        ctx.save_for_backward(*xs, *means, *variances, *(weights if ctx.affine else ()))
        ctx.mark_non_differentiable(*means, *variances)
        return (*outs, *means, *variances)

    @staticmethod
    def backward(ctx, *grads):
        k, saved = ctx.k, ctx.saved_tensors
        xs, means, variances = saved[:k], saved[k:2 * k], saved[2 * k:3 * k]
        weights = saved[3 * k:] if ctx.affine else [torch.ones_like(m) for m in means]
        local = []
        for x, dy, mean, var in zip(xs, grads, means, variances):
            local += torch.ops.aten.native_batch_norm_backward(        # sum(dy xhat), sum(dy) over this process
                dy, x, torch.ones_like(mean), mean, var, None, None, False, ctx.eps, [False, True, True])[1:]
        sums = add_up(torch.cat(local))
        dxs = []
        for i, (dw, db) in enumerate(zip(*[iter(sums.split([len(part) for part in local]))] * 2)):
            view = [1, -1] + [1] * (xs[i].dim() - 2)
            inv = torch.rsqrt(variances[i] + ctx.eps)
            scale = weights[i] * inv                   # dx = scale dy + slope x + shift, channel by channel
            slope = -scale * inv * dw / ctx.totals[i]
            shift = -scale * db / ctx.totals[i] - slope * means[i]
            dx = grads[i] * scale.view(view) + xs[i] * slope.view(view) + shift.view(view)
            dxs.append(dx.to(xs[i].dtype))
        # Scales and shifts get this process's share: DDP averages the gradients of parameters itself.
        dws, dbs = (local[0::2], local[1::2]) if ctx.affine else ([None] * k, [None] * k)
        return (None, None, *dxs, *dws, *dbs)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of several streams, for (B, C) and (B, C, H, W). Its state dict is torch's own; the statistics of
    prefixes (path_mean, path_var, each (g^s, C of a sub-net)) stand beside it and are saved apart.

    Modes: "batch"    each stream by its own batch, over all processes; what training uses
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

    def forward(self, xs, cuts=None, slots=None, mode="batch"):
        """xs: list of tensors. cuts: the channels each has (None: all). slots: the row of statistics of each."""
        cuts = cuts or [None] * len(xs)
        none = [None] * len(xs)
        weights, biases = [cut_all(p, cuts, None, self.shared_grad) for p in (self.weight, self.bias)] if self.affine else (none, none)
        if mode == "batch":
            return self._batch(xs, weights, biases, cuts)
        outs = []
        for i, x in enumerate(xs):
            if mode == "collect":
                mean, var = self._collect(x, cuts[i], slots and slots[i])
            else:
                mean, var = self.last if mode == "last" else self.statistics(cuts[i], slots and slots[i])
            outs.append(F.batch_norm(x, mean, var, weights[i], biases[i], False, 0.0, self.eps))
        return outs

    def _batch(self, xs, weights, biases, cuts):
        k, momentum = len(xs), self.momentum
        # torch's own kernel is quicker, but on CPU in fp32 its variance is good to 1e-5 only (seen with torch 2.15),
        # which shows as another loss on 1 process than on 2; in bf16 that does not matter.
        if world_size() > 1 or xs[0].device.type == "cpu" and xs[0].dtype == torch.float32:
            result = SyncedNorm.apply(self.eps, k, *xs, *weights, *biases)
            outs, means, variances = result[:k], result[k:2 * k], result[2 * k:]
            stats = {i: (means[i], variances[i]) for i in range(k)}
        else:
            outs, stats = [], {}
            for i, x in enumerate(xs):
                mean = var = None
                if cuts[i] is None:                    # momentum 1 makes torch write this batch's moments there
                    mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
                outs.append(F.batch_norm(x, mean, var, weights[i], biases[i], True, 1.0, self.eps))
                if mean is not None:
                    n = x.numel() // x.shape[1]
                    stats[i] = mean, var * ((n - 1) / n)
        for i in range(k):
            if cuts[i] is None:                        # a running average, for monitoring while training
                self.last = stats[i]
                self.running_mean.lerp_(stats[i][0], momentum)
                self.running_var.lerp_(stats[i][1], momentum)
        return list(outs)

    def _collect(self, x, cut, slot):
        mean, var = moments(x)
        rows = 1 if cut is None else len(self.path_mean)
        if self.sums is None:                          # count, sum, sum of squares: float64
            self.sums = torch.zeros(rows, 1 + 2 * x.shape[1], dtype=torch.float64, device=x.device)
        m, v, n = mean.double(), var.double(), x.numel() // x.shape[1]
        self.sums[slot or 0] += torch.cat([m.new_ones(1), m, v + m * m]) * n
        return mean, var

    def statistics(self, cut, slot):
        """(mean, variance) for inference: of the largest network (slot None), sliced for a size, or of a prefix's slot."""
        if slot is None:
            return take(self.running_mean, cut), take(self.running_var, cut)
        return self.path_mean[slot], self.path_var[slot]

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
                self.path_mean[slot] = take(self.running_mean, cut_of_slot(slot))
                self.path_var[slot] = take(self.running_var, cut_of_slot(slot))
        self.sums = None


# ---------------------------------------------------------------------------- networks

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
        if stride != 1 or bottleneck and inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), norm(out))
        elif inp != out:                               # only in an extracted ResNet-18/34: selects the path's channels
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, bias=False))

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
        self.groups, self.shared = groups, shared
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
        """(shared, group): channels in the shared part and in each of the g groups."""
        group = int(channels * (1 - self.shared) / self.groups)
        return channels - group * self.groups, group

    def sub_width(self, channels):
        return sum(self.split(channels))

    def cut(self, channels, digit):
        """The channels of a stage that a path with this digit, or a size with this (depth, eighths), uses there (None:
        the largest network)."""
        if digit is None:
            return None
        if isinstance(digit, tuple):
            n = channels * digit[1] // 8
            return n, n, n
        shared, group = self.split(channels)
        return shared, shared + digit * group, shared + (digit + 1) * group

    def sizes(self):
        """The (depth, eighths) that each stage may have, smallest first; any may follow any."""
        least, eighths = self.config["sizes"]
        return [[(d, e) for d in range(least, depth + 1) for e in range(eighths, 9)] for depth in ARCHS[self.config["arch"]][1]]

    # -- forward

    def _layer(self, conv, bn, xs, outs, inps, slots, mode):
        weights = cut_all(conv.weight, outs, inps, self.shared_grad)
        if mode == "saved":                            # BatchNorm folded into the convolution: one pass less
            ys = []
            for x, w, out, slot in zip(xs, weights, outs, slots):
                mean, var = bn.statistics(out, slot)
                scale = take(bn.weight, out) * torch.rsqrt(var + bn.eps)
                ys.append(F.conv2d(x, w * scale.view(-1, 1, 1, 1), take(bn.bias, out) - mean * scale, conv.stride, conv.padding))
            return ys
        ys = [F.conv2d(x, w, None, conv.stride, conv.padding) for x, w in zip(xs, weights)]
        return bn(ys, outs, slots, mode)

    def stem(self, x, mode="saved"):
        """Images (B, 3, H, W) -> (B, width, H', W'): common to all paths."""
        x, = self._layer(self.conv1, self.bn1, [x], [None], [None], [None], mode)
        return self.maxpool(F.relu(x))

    def stage(self, s, xs, prefixes, mode="saved"):
        """Stage s (0 to 3) of several streams, layer by layer, so that BatchNorm speaks once for all of them.

        xs: list of (B_i, C_i, H, W). prefixes: for each, the first s+1 digits of its path, or as many pairs of its
        size, or None for the largest network. Returns a list like xs."""
        slots = [prefix_slot(p, self.groups) for p in prefixes]
        digits = [None if p is None else p[s] for p in prefixes]
        before = [None if p is None or s == 0 else p[s - 1] for p in prefixes]
        blocks, done = self.stages()[s], {}
        inps, place = [self.cut(blocks[0].conv1.in_channels, d) for d in before], list(range(len(xs)))
        for depth, block in enumerate(blocks):
            live = [i for i, d in enumerate(digits) if not isinstance(d, tuple) or depth < d[0]]
            if len(live) < len(digits):                # sizes that end here: set their output aside
                done.update((place[i], xs[i]) for i in range(len(xs)) if i not in live)
                xs, inps, digits, slots, place = ([items[i] for i in live] for items in (xs, inps, digits, slots, place))
            if not live:
                break
            layers = block.layers()
            inner = [self.cut(layers[0][0].out_channels, d) for d in digits]
            outs = [self.cut(layers[-1][0].out_channels, d) for d in digits]
            ys, cuts = xs, inps
            for i, (conv, bn) in enumerate(layers):
                to = outs if i == len(layers) - 1 else inner
                ys = self._layer(conv, bn, ys if i == 0 else [F.relu(y) for y in ys], to, cuts, slots, mode)
                cuts = to
            if block.downsample is not None:
                xs = self._layer(block.downsample[0], block.downsample[1], xs, outs, inps, slots, mode)
            elif s == 0 and block is blocks[0]:        # the stem's full width: select the path's channels
                xs = [x if c is None else torch.cat([x[:, :c[0]], x[:, c[1]:c[2]]], 1) for x, c in zip(xs, outs)]
            xs, inps = [F.relu(y + x) for y, x in zip(ys, xs)], outs
        done.update(zip(place, xs))
        return [done[i] for i in range(len(done))]

    def streams(self, xs, paths, mode):
        """Stem outputs xs, a path each (None: the largest network) -> pooled features, a list of (B_i, D_i) in fp32."""
        for s in range(STAGES):
            xs = self.stage(s, xs, [None if p is None else p[:s + 1] for p in paths], mode)
        return [x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) for x in xs]

    def forward(self, x, path=None):
        """Images (B, 3, H, W) -> features (B, D) of the largest network, or of the sub-net of `path`, a path or a
        size, for inference."""
        return self.streams([self.stem(x)], [path], "saved")[0]

    def walk(self, x, indices=None):
        """Yields (index, features (B, D)) of all sub-nets, or those in `indices`, in order. Each prefix is computed
        once: of a ResNet-50's 256 paths this takes 0.3 of the multiply-adds of running them one by one."""
        wanted = {index_to_path(i, self.groups) for i in (range(self.groups ** STAGES) if indices is None else indices)}

        def grow(x, prefix):
            if len(prefix) == STAGES:
                yield path_to_index(prefix, self.groups), x.mean((2, 3), dtype=torch.float32)
                return
            for longer in sorted({p[:len(prefix) + 1] for p in wanted if p[:len(prefix)] == prefix}):
                yield from grow(self.stage(len(prefix), [x], [longer])[0], longer)
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
                bn.finish(lambda slot, c=bn.num_features: self.cut(c, slot % self.groups))

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
        sized = path is not None and isinstance(path[0], (tuple, list))
        if sized:
            digits = [tuple(pair) for pair in path]
            if "sizes" not in self.config or len(digits) != STAGES or not all(d in choices for d, choices in zip(digits, self.sizes())):
                raise InputError(f"size {digits} is not one of this network's")
            widths, depths = [stem * 2 ** s * e // 8 for s, (_, e) in enumerate(digits)], [d for d, _ in digits]
        else:
            digits = digits if path is None else index_to_path(path_to_index(path, self.groups), self.groups)
            widths = [stem * 2 ** s if d is None else self.sub_width(stem * 2 ** s) for s, d in enumerate(digits)]
        net = ResNet(self.config["arch"], widths, stem, self.config["small_stem"], depths=depths).to(self.conv1.weight)
        net.config["path"] = None if path is None or sized else list(digits)

        def copy(conv, bn, to_conv, to_bn, out, inp, slot):
            mean, var = bn.statistics(out, slot)
            to_conv.weight.copy_(take(conv.weight, out, inp))
            for to, value in ((to_bn.weight, take(bn.weight, out)), (to_bn.bias, take(bn.bias, out)),
                              (to_bn.running_mean, mean), (to_bn.running_var, var)):
                to.copy_(value)
        with torch.no_grad():
            copy(self.conv1, self.bn1, net.conv1, net.bn1, None, None, None)
            inp = None
            for s, (blocks, plain) in enumerate(zip(self.stages(), net.stages())):
                slot = None if path is None else prefix_slot(digits[:s + 1], self.groups)
                for block, to in zip(blocks, plain):
                    layers, entry = block.layers(), inp
                    out = self.cut(layers[-1][0].out_channels, digits[s])
                    for i, ((conv, bn), (to_conv, to_bn)) in enumerate(zip(layers, to.layers())):
                        width = out if i == len(layers) - 1 else self.cut(conv.out_channels, digits[s])
                        copy(conv, bn, to_conv, to_bn, width, inp, slot)
                        inp = width
                    if block.downsample is not None:
                        copy(*block.downsample, *to.downsample, out, entry, slot)
                    elif to.downsample is not None:    # the selection of channels, as a convolution of zeros and ones
                        to.downsample[0].weight.copy_(take(torch.eye(stem), out)[:, :, None, None])
        return net.eval()


# ---------------------------------------------------------------------------- checkpoints

def save(path, content):
    """Writes a checkpoint so that `path` is at every moment the old file or the new one, whole:
    temporary file, fsync, rename. Raises OSError with the file's name when the disk is full or read-only."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def load(path, kinds=None):
    """Reads a checkpoint without running code from it (weights_only). kinds: those that fit here, e.g. ("sdrnet",).
    Raises InputError, naming the file, for anything that is not a whole checkpoint of this project."""
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint {path}: run the stage before, or name the right file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                         # a broken zip or pickle fails in many ways
        raise InputError(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"format", "kind", "config"} <= set(content):
        raise InputError(f"{path} is not a checkpoint of this project (no format, kind and config in it)")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']!r}; this version reads format {FORMAT}")
    if kinds is not None and content["kind"] not in kinds:
        raise InputError(f"{path} holds a {content['kind']!r}, and {' or '.join(kinds)} is needed here")
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
    try:
        if not 0 < int(config.get("width", config.get("stem"))) <= 4096 or not 0 < config.get("groups", 1) <= 16 \
                or not all(0 < w <= 32768 for w in config.get("widths", ())) or not all(0 < d <= 36 for d in config.get("depths", ())):
            raise InputError("its widths, depths or groups are out of range")
        if content["kind"] == "subnet":
            net = ResNet(config["arch"], config["widths"], config["stem"], config["small_stem"], depths=config.get("depths"))
            net.config["path"] = config["path"]
        else:
            net = SDRNet(**{k: config[k] for k in ("arch", "width", "groups", "shared", "small_stem")}, sizes=config.get("sizes"))
        if not all(bool(torch.isfinite(v).all()) for v in weights.values()):
            raise InputError("it holds weights that are not finite")
        net.load_state_dict(weights, strict=True)
        if content["kind"] == "sdrnet":
            net.load_path_statistics(content["statistics"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path} does not fit its own architecture ({str(error).splitlines()[0][:150]})") from None
    return net.eval()


def load_network(path, kinds=None):
    """`load` and `network` in one: SDRNet or plain ResNet, ready for inference."""
    return network(load(path, kinds), path)
