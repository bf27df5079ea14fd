"""sdrnet.py - the SDRnet: one ResNet that holds g^4 sub-nets, a path each (SDR, AAAI 2022).

A stage ("SDR block") has its C channels split into a shared part and g individual groups.
A path picks ONE individual group in every stage; any group may follow any other:

              stage 0              stage 1              stage 2              stage 3
    stem ──┬─ shared ─────────┬─── shared ─────────┬─── shared ─────────┬─── shared ──┐
           ├─ group 0         ├─── group 0 ◀       ├─── group 0         ├─── group 0  ├─ pool ── f
           └─ group 1 ◀       └─── group 1         └─── group 1 ◀       └─── group 1 ◀┘

The marked path is (1, 0, 1, 1): with g = 2 its index is the binary number 1011 = 11 of 2^4 = 16.
W_i (paper) = the shared parts and the marked groups: sub-net i. W_0 = everything, the largest
network, a ResNet: its weights carry torchvision's names and, of its width and stem, load there.

    C = 64, shared 1/2       [ shared | group 0 | group 1 | ... ]     a sub-net's width
        g = 1                     32       32                              64
        g = 2                     32       16        16                    48 = 0.750 C
        g = 4                     32        8         8    8   8           40 = 0.625 C

The stem is common to all paths. In training a path may hold None: a stage of full width.

BatchNorm: in training a batch is normalised by its own statistics over all processes. Those for
inference belong to the PREFIX of a path: stage s holds g^(s+1) sets, so that all sub-nets can be
run as a tree, each prefix once. `recalibrate_bn` measures them after training.

SDR in your own loop:

    import torch
    from sdrnet import SDRNet, recalibrate_bn
    net = SDRNet("resnet18", width=16, groups=2)           # 16 sub-nets
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(4):
        everything, of_a_cluster = torch.randn(2, 64, 3, 32, 32)
        f_0 = net(everything)                              # (64, 128): W_0
        f_i = net(of_a_cluster, (1, 0, 1, 1))              # (64, 96): W_11
        loss = f_0.var() + f_i.var()                       # here stands your loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    recalibrate_bn(net, lambda prefix: [torch.randn(64, 3, 32, 32)])   # images for each prefix
    for path, f in net.tree(torch.randn(5, 3, 32, 32)):    # all sub-nets
        print(path, f.shape)
    plain = net.extract((1, 0, 1, 1))                      # torchvision's ResNet, equal outputs

As a script: features of any folder by any checkpoint of ours, float32 (N, D), and beside them
features.txt, the name of each row:

    python sdrnet.py runs/toy/simsiam.pt photos/ features.npy
    python sdrnet.py runs/toy/sdrnet.pt photos/ features.npy --path 0,1,1,0

Not known from the paper, so chosen here: the widths of the groups, the stem, BatchNorm.
"""
import argparse
import ctypes
import datetime
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms.v2 import functional as T

STAGES = 4
ARCHS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
         "resnet50": (Bottleneck, (3, 4, 6, 3))}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


# ------------------------------------------------------------------------------------ paths

def path_to_index(path, groups):
    """The digits of a path, or of the beginning of one, in base g, first stage first.

    path_to_index((1, 0, 1, 1), 2) is 11. Raises ValueError where a digit is not in 0 .. g-1."""
    index = 0
    for digit in path:
        if not 0 <= digit < groups:
            raise ValueError(f"path {tuple(path)}: each digit must lie in 0 .. {groups - 1}")
        index = index * groups + int(digit)
    return index


def index_to_path(index, groups):
    """The inverse of path_to_index for whole paths, four digits. ValueError for any other index."""
    if not 0 <= index < groups ** 4:
        raise ValueError(f"sub-net {index}: there are 0 to {groups ** 4 - 1}")
    return tuple(int(index) // groups ** power % groups for power in (3, 2, 1, 0))


def split(channels, groups, shared):
    """(shared channels, channels of a group): the shared part takes what does not divide."""
    group = int(channels * (1 - shared) / groups + 1e-9)
    return channels - groups * group, group


def slice_weight(weight, out=None, inp=None):
    """The part of a weight (O, I, ...) or vector (O,) that a path uses: of O `out`, of I `inp`,
    int64 indices, None for all. Gradients flow to that part alone."""
    if out is not None:
        weight = weight.index_select(0, out)
    if inp is not None:
        weight = weight.index_select(1, inp)
    return weight


# ------------------------------------------------------------------------------------ running

def number(kind, least, most=float("inf")):
    """A type for argparse: a number, kind int or float, from `least` to `most`; nan is none."""
    def read(text):
        value = kind(text)
        if not least <= value <= most or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least:g} to {most:g}")
        return value
    read.__name__ = kind.__name__                      # argparse says "invalid int value"
    return read


class InputError(Exception):
    """What the user gave cannot be used. The message is the line: what, which file, what to do."""


def rank():
    """This process's number; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words):
    """print, on process 0 only."""
    if rank() == 0:
        print(*words, flush=True)


def progress(items, what, count):
    """Passes on `items`, `count` of them, and prints every 20 s how many are done."""
    began = shown = time.time()
    for done, item in enumerate(items):
        if time.time() - shown > 20:
            shown = time.time()
            print0(f"{what}: {done:,} of {count:,}, {shown - began:.0f} s")
        yield item


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CAUGHT = []                                            # those that came


def catch_signals(catch=True):
    """From here on signals are noted in CAUGHT, where training looks after each step: it saves and
    ends. catch False, where nothing is to be saved: they end the process at once. A SIGHUP that
    nohup has switched off stays so."""
    def note(number, frame):
        if rank() == 0 and not CAUGHT:
            os.write(2, b"stopping when this step is done\n")          # print might be under way
        CAUGHT.append(number)
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note if catch else signal.SIG_DFL)


def setup(device="auto", seed=0):
    """Device, process group (as torchrun's environment says), seed; returns the device. Signals end
    the process at once, until a training loop catches them.

    Raises InputError where a process finds no CUDA device of its own."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    catch_signals(False)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"--device cuda: torch finds {count} devices, one a process is needed")
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=7))    # tasks differ in length
    torch.manual_seed(seed)
    return torch.device(device)


def on_any(*flags):
    """For each flag whether it is set on any process, a list of bools: one small all-reduce."""
    table = torch.tensor([float(flag) for flag in flags])
    if world_size() > 1:
        table = table.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(table)
    return (table > 0).tolist()


@functools.cache
def has_bf16(device_type):
    """Whether this machine's "cpu" or "cuda" computes in bf16; emulated it would be slow."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device, amp="auto"):
    """bf16 autocast where the hardware has it and amp is "auto", else nothing: a context."""
    if amp == "auto" and has_bf16(device.type):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def toy_folder():
    """runs/toy, whose images process 0 has tests/toy.py draw where they are missing. From here on
    one thread, unless OMP_NUM_THREADS is set: a second gains little on so small a network.

    Raises InputError where tests/toy.py is not beside this file, or fails."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "toy.py")
    if rank() == 0 and not (os.path.isdir("runs/toy/images") and os.path.isdir("runs/toy/tasks")):
        if not os.path.exists(script):
            raise InputError(f"no images were given, and no {script} is there to draw toy images")
        print0("drawing toy images into runs/toy")
        if subprocess.run([sys.executable, script, "--out", "runs/toy"]).returncode:
            raise InputError(f"{script} could not draw toy images into runs/toy")
    if world_size() > 1:
        dist.barrier()
    return "runs/toy"


# ------------------------------------------------------------------------------------ BatchNorm

class AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradients of all flow back to each.
    dist.all_reduce itself has no gradient."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return AllReduce.apply(gradient.contiguous())


def sync_moments(x):
    """Mean m and (biased) variance v of each channel of x (B, C, ...) over all processes.

    Process r has n_r values of mean m_r and variance v_r:   N = sum n_r,   m = sum n_r m_r / N,
    v = sum n_r (v_r + (m_r - m)^2) / N.   Returns m (C,), v (C,), N, with gradient."""
    v_r, m_r = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    n_r = m_r.new_full((1,), x.numel() / x.shape[1])
    table = n_r.new_zeros(world_size(), 1 + 2 * x.shape[1])
    table[rank()] = torch.cat([n_r, m_r, v_r])         # so that the sum holds every process's row
    n, m, v = AllReduce.apply(table).split([1, x.shape[1], x.shape[1]], dim=1)
    mean = (n * m).sum(0) / n.sum()
    var = (n * (v + (m - mean) ** 2)).sum(0) / n.sum()
    return mean, var, n.sum()


def batch_norm(x, weight, bias, eps):
    """x (B, C, ...) normalised by its batch over all processes, in fp32 at least.

    weight, bias: (C,) or None. Returns y like x, and the batch's mean and unbiased variance (C,).
    On one process torch's kernel does it; torch.nn.SyncBatchNorm refuses CPU tensors."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if world_size() == 1:
        mean = torch.zeros(x.shape[1], dtype=wide, device=x.device)
        var = torch.ones_like(mean)                    # momentum 1: the batch's are written there
        return F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps), mean, var
    mean, var, n = sync_moments(x.to(wide))
    scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = x * scale.view(shape) + shift.view(shape)
    return y.to(x.dtype), mean, var * n / (n - 1)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of the largest network or of a path, for (B, C) and (B, C, H, W): in training by
    the batch over all processes, else by the statistics kept. The state dict is torch's own; the
    statistics of prefixes, a row each, lie in prefix_mean and prefix_var, (rows, C'), or None."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.register_buffer("prefix_mean", None, persistent=False)
        self.register_buffer("prefix_var", None, persistent=False)

    def forward(self, x, out=None, row=None, track=True):
        """x: (B, C', ...), the channels `out` of C, None for all. row: the prefix whose statistics
        count, None for W_0's. track: whether they follow this batch (momentum None: average)."""
        weight, bias = slice_weight(self.weight, out), slice_weight(self.bias, out)
        if self.track_running_stats and not self.training:
            mean, var = self.statistics(out, row)
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        y, mean, var = batch_norm(x, weight, bias, self.eps)
        if self.track_running_stats and track:
            self.num_batches_tracked += 1
            rate = self.momentum or 1 / float(self.num_batches_tracked)
            for kept, new in zip(self.statistics(out, row), (mean, var)):      # a row's, or W_0's
                kept.lerp_(new.detach().to(kept), rate)
        return y

    def statistics(self, out=None, row=None):
        """(mean, variance) for inference. Raises ValueError where a prefix has none yet."""
        if row is None:
            return slice_weight(self.running_mean, out), slice_weight(self.running_var, out)
        if self.prefix_mean is None:
            raise ValueError("sub-nets have no statistics for inference yet: call recalibrate_bn")
        return self.prefix_mean[row], self.prefix_var[row]


# ------------------------------------------------------------------------------------ network

def resnet(arch, widths, stem, small_stem=False, norm_layer=nn.BatchNorm2d):
    """torchvision's ResNet of any width: images (B, 3, H, W) -> pooled features (B, D).

    arch: resnet18, resnet34, resnet50; widths: planes of the four stages, torchvision's being
    (64, 128, 256, 512), of which a bottleneck puts out four times as many; stem: channels of the
    first convolution; small_stem: 3x3 of stride 1 and no pooling, for small images. As in
    SimSiam's code each residual's last BatchNorm starts at 0. resnet(**net.config): one alike."""
    block, depths = ARCHS[arch]
    net = ResNet(block, (1, 1, 1, 1), norm_layer=norm_layer)
    net.inplanes = stem
    net.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
    if small_stem:
        net.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    net.bn1 = norm_layer(stem)
    for s, (planes, depth) in enumerate(zip(widths, depths)):
        stage = net._make_layer(block, planes, depth, stride=1 if s == 0 else 2)
        setattr(net, f"layer{s + 1}", stage)
    if block is BasicBlock and stem != widths[0]:      # a sub-net's: it takes channels of the stem,
        net.layer1[0].downsample = net.layer1[0].downsample[:1]        # which no BatchNorm touches
    net.fc = nn.Identity()
    net.features = widths[-1] * block.expansion
    net.config = dict(arch=arch, widths=list(widths), stem=stem, small_stem=small_stem)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, block):
            nn.init.zeros_((module.bn2 if block is BasicBlock else module.bn3).weight)
    return net


def residual_layers(block):
    """A torchvision block's branch, [(conv, bn), ...], and its shortcut, (conv[, bn]), or None."""
    branch = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if isinstance(block, Bottleneck):
        branch.append((block.conv3, block.bn3))
    return branch, None if block.downsample is None else tuple(block.downsample)


def conv_bn(x, conv, bn, out, inp, row, track):
    """A convolution and its BatchNorm along a path: x (B, I', H, W) -> (B, O', H', W').

    A strided 1x1 convolution reads every other pixel, and is given just these: on CPU the gradient
    of its weight was seen (torch 2.14, few channels) to write outside its memory."""
    stride = conv.stride
    if conv.kernel_size == (1, 1):
        x, stride = x[:, :, ::stride[0], ::stride[1]], 1
    weight = slice_weight(conv.weight, out, inp)
    return bn(F.conv2d(x, weight, None, stride, conv.padding), out, row, track)


def pool(x):
    """(B, C, H, W) -> (B, C), in fp32 at least."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


class SDRNet(nn.Module):
    """The supernet W_0 and its g^4 sub-nets W_i, narrower ResNets made of slices of its weights.

    arch: resnet18, resnet34, resnet50; width: channels of the stem and planes of stage 0 (64 is
    torchvision's); groups: g; shared: share of a stage's channels that all paths use.
    SDRNet(**net.config) builds it again; net.resnet holds the weights; net.features is W_0's D."""

    def __init__(self, arch="resnet18", width=64, groups=4, shared=0.5, small_stem=False):
        super().__init__()
        self.config = dict(arch=arch, width=width, groups=groups, shared=shared,
                           small_stem=small_stem)
        self.groups, self.shared = groups, shared
        self.widths = [width * 2 ** s for s in range(STAGES)]
        self.resnet = resnet(arch, self.widths, width, small_stem, norm_layer=BatchNorm)
        self.features = self.resnet.features

    def channels(self, s, count, path):
        """Which of stage s's `count` channels (planes, or a bottleneck's outputs) a path uses:
        int64 indices, None for all."""
        if path is None or path[s] is None:
            return None
        shared, group = split(self.widths[s], self.groups, self.shared)
        times = count // self.widths[s]
        index = torch.arange(count, device=self.resnet.conv1.weight.device)
        parts = index.split([times * shared] + [times * group] * self.groups)
        return torch.cat([parts[0], parts[1 + path[s]]])

    def row(self, s, path):
        """The row of stage s's tables of statistics that a path uses, the index of its first s+1
        digits; None for W_0's. Raises ValueError where there is none."""
        if path is None:
            return None
        if None not in path[:s + 1]:
            return path_to_index(path[:s + 1], self.groups)
        if not self.training:
            raise ValueError(f"path {path}: a stage of full width has no statistics for inference")
        return None

    def blocks(self, s):
        """The blocks of stage s, 0 to 3."""
        return getattr(self.resnet, f"layer{s + 1}")

    def layers(self, s, path):
        """Stage s along a path. Yields for each block its branch, [(conv, bn, out, inp), ...], and
        its shortcut, the same or None; out, inp as `slice_weight` takes them."""
        inp = None                                     # the stem's channels: all
        if s > 0:
            inp = self.channels(s - 1, self.blocks(s)[0].conv1.in_channels, path)
        for block in self.blocks(s):
            entry, steps = inp, []
            branch, shortcut = residual_layers(block)
            for conv, bn in branch:
                out = self.channels(s, conv.out_channels, path)
                steps.append((conv, bn, out, inp))
                inp = out
            yield steps, None if shortcut is None else (*shortcut, out, entry)

    def stem(self, x, track=False):
        """Images (B, 3, H, W) -> (B, width, H', W')."""
        x = self.resnet.bn1(self.resnet.conv1(x), track=track)
        return self.resnet.maxpool(F.relu(x))

    def stage(self, s, x, path=None, track=False):
        """Stage s of W_0, or along a path whose first s+1 digits count.

        (B, C, H, W) -> (B, C', H', W')."""
        row = self.row(s, path)
        for b, (branch, shortcut) in enumerate(self.layers(s, path)):
            y = conv_bn(x, *branch[0], row, track)
            for layer in branch[1:]:
                y = conv_bn(F.relu(y), *layer, row, track)
            if shortcut is not None:
                x = conv_bn(x, *shortcut, row, track)
            elif s == 0 and b == 0:                    # the stem's full width: take the path's
                x = slice_weight(x, None, branch[-1][2])
            x = F.relu(x + y)
        return x

    def forward(self, x, path=None, track=True):
        """Normalised images (B, 3, H, W) -> features, fp32 (B, D) of W_0, (B, D') of a sub-net.

        path: None for W_0, else four of 0 .. g-1 or, in training, None for a stage of full width.
        In training by the batch's statistics, else by those measured for inference. track: whether
        W_0's follow its batch; a sub-net's forward moves none."""
        track = track and path is None
        x = self.stem(x, track)
        for s in range(STAGES):
            x = self.stage(s, x, path, track)
        return pool(x)

    def tree(self, x, prefix=()):
        """Yields (path, features fp32 (B, D')) of all sub-nets by index, each prefix run once.

        x: images (B, 3, H, W), or with a prefix what its stages have made of them."""
        if prefix == ():
            x = self.stem(x)
        if len(prefix) == STAGES:
            yield prefix, pool(x)
            return
        for digit in range(self.groups):
            path = prefix + (digit,)
            yield from self.tree(self.stage(len(prefix), x, path), path)

    @torch.no_grad()
    def extract(self, path=None, norm_layer=nn.BatchNorm2d):
        """The sub-net of a path (None: W_0) as torchvision's ResNet in eval mode, equal outputs.

        Where a BasicBlock's stage 0 takes channels of the stem, it has a 1x1 convolution of zeros
        and ones, without a BatchNorm: in train mode outputs are equal, too."""
        widths = self.widths
        if path is not None:
            widths = [sum(split(width, self.groups, self.shared)) for width in widths]
        plain = resnet(self.config["arch"], widths, self.config["width"],
                       self.config["small_stem"], norm_layer).to(self.resnet.conv1.weight.device)
        copy_layer((plain.conv1, plain.bn1), self.resnet.conv1, self.resnet.bn1)
        for s in range(STAGES):
            row, targets = self.row(s, path), getattr(plain, f"layer{s + 1}")
            for (branch, shortcut), block in zip(self.layers(s, path), targets):
                to_branch, to_shortcut = residual_layers(block)
                for to, layer in zip(to_branch, branch):
                    copy_layer(to, *layer, row)
                if shortcut is not None:
                    copy_layer(to_shortcut, *shortcut, row)
                elif to_shortcut is not None:
                    select_channels(to_shortcut[0], branch[-1][2])
        return plain.eval()

    def prefix_statistics(self):
        """{name of a BatchNorm: {"mean", "var"}}, (g^(s+1), C') each: what a checkpoint keeps
        beside the state dict. Empty before `recalibrate_bn`."""
        return {name: {"mean": bn.prefix_mean, "var": bn.prefix_var}
                for name, bn in self.resnet.named_modules()
                if isinstance(bn, BatchNorm) and bn.prefix_mean is not None}


def copy_layer(to, conv, bn, out=None, inp=None, row=None):
    """Copies what a path uses of a convolution and its BatchNorm into plain ones, `to`."""
    plain_conv, plain_bn = to
    plain_conv.weight.copy_(slice_weight(conv.weight, out, inp))
    plain_bn.weight.copy_(slice_weight(bn.weight, out))
    plain_bn.bias.copy_(slice_weight(bn.bias, out))
    mean, var = bn.statistics(out, row)
    plain_bn.running_mean, plain_bn.running_var = mean.clone(), var.clone()


def select_channels(conv, out):
    """Makes a 1x1 convolution pass on channels `out` of its input."""
    conv.weight.copy_(torch.eye(conv.in_channels)[out.cpu()][:, :, None, None])


@torch.no_grad()
def recalibrate_bn(net, images_of, prefixes=True):
    """Measures the statistics for inference: of W_0, then of every prefix, shorter ones first.

    images_of(prefix): batches (B, 3, S, S), of which each process gives its part, that suit a
    prefix, 1 to 4 digits, or () for W_0. The stage that a prefix ends in is normalised by the
    batch and averages its statistics over batches; those before use theirs. Ends in eval mode."""
    net.eval()
    average_statistics(net.resnet, (net(x) for x in images_of(())))
    if not prefixes:
        return
    began = time.time()
    for s in range(STAGES):
        for bn in batch_norms(net.blocks(s)):
            width = len(net.channels(s, bn.num_features, (0,) * STAGES))
            bn.prefix_mean = bn.weight.new_zeros(net.groups ** (s + 1), width)
            bn.prefix_var = torch.ones_like(bn.prefix_mean)
        for prefix in itertools.product(range(net.groups), repeat=s + 1):
            runs = (run_prefix(net, x, prefix) for x in images_of(prefix))
            average_statistics(net.blocks(s), runs)
        print0(f"statistics of the prefixes of {s + 1} digits: {time.time() - began:.0f} s")


def batch_norms(module):
    """All BatchNorms of ours in a module."""
    return [bn for bn in module.modules() if isinstance(bn, BatchNorm)]


def run_prefix(net, x, prefix):
    """The stages of a prefix on images."""
    x = net.stem(x)
    for s in range(len(prefix)):
        x = net.stage(s, x, prefix, track=True)


def average_statistics(module, runs):
    """Lets the BatchNorms of a module average their statistics over `runs`, a generator: taking its
    next item runs the module on a batch."""
    for bn in batch_norms(module):
        bn.train()
        bn.momentum = None
        bn.num_batches_tracked.zero_()
    for _ in runs:
        pass
    for bn in batch_norms(module):
        bn.eval()
        bn.momentum = 0.1


# ------------------------------------------------------------------------------------ files

def first_line(error):
    """The first line of an error's text, at most 150 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def save_file(path, write):
    """Has write(file) fill a binary file, then gives it its name: the whole file or none.

    Raises InputError, with the file's name, where the disk is full or not to be written."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:           # torch turns a full disk into the latter
        raise InputError(f"{path} cannot be written ({first_line(error)})") from None


def make_folder(path):
    """A folder and those above it, where missing. Raises InputError where that cannot be."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path} cannot be made ({error.strerror})") from None


def save_checkpoint(path, content):
    """Writes a dict of tensors and plain values as one file."""
    save_file(path, functools.partial(torch.save, content))


def save_json(path, content):
    """Writes a dict of plain values as indented JSON."""
    text = json.dumps(content, indent=1)
    save_file(path, lambda file: file.write(text.encode()))


def save_names(path, names):
    """Writes a listing, one name a line, in the bytes that the names have on disk."""
    text = "".join(f"{name}\n" for name in names)
    save_file(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def load_names(path):
    """What save_names wrote, as a list; a byte-order mark and Windows line ends are passed over."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [line.rstrip("\r\n") for line in file]


def read_torch_file(path):
    """What torch.save wrote, without running code from it. Raises InputError naming the file."""
    if not os.path.isfile(path):
        raise InputError(f"no file {path}: run the stage before, or name the right file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                         # a broken zip or pickle fails in many ways
        raise InputError(f"{path} is damaged or no tensor file ({type(error).__name__})") from None


def load_checkpoint(path, *kinds):
    """What save_checkpoint wrote: a dict. kinds: those that fit here, any if none is given.

    Raises InputError, with the file's name, where it is not there or no checkpoint of ours."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {"kind", "config"} <= set(content):
        raise InputError(f"{path} is not a checkpoint of this project: it names no kind and config")
    if kinds and content["kind"] not in kinds:
        raise InputError(f"{path} holds a {content['kind']}; {' or '.join(kinds)} is needed here")
    return content


def refuse_changes(old, new, path):
    """Raises InputError that names what differs between two runs' arguments, dicts."""
    changed = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise InputError(f"{path} was made with other arguments ({'; '.join(changed)}): give those "
                         "again, another --out, or --fresh")


def save_state(path, step, arguments, model, optimizer):
    """All that a training run needs to go on from `step`; process 0 writes it."""
    if rank() == 0:
        save_checkpoint(path, {"kind": "training", "config": arguments, "step": step,
                               "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def resume(path, arguments, model, optimizer):
    """Loads the state that `path` holds and returns its step; 0 where there is no such file.

    Raises InputError where it was made with other arguments."""
    if not any(on_any(os.path.exists(path))):          # all go on, or one says why it cannot
        return 0
    state = load_checkpoint(path, "training")
    refuse_changes(state["config"], arguments, path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print0(f"going on from {path}, step {state['step']:,}")
    return state["step"]


def load_network(path, norm_layer=nn.BatchNorm2d):
    """The network of a checkpoint in eval mode: an SDRNet, or of a subnet.pt torchvision's ResNet.

    norm_layer: the ResNet's. Raises InputError where a tensor is missing or of another shape."""
    content = load_checkpoint(path, "simsiam", "byol", "sdrnet", "subnet")
    try:
        if content["kind"] == "subnet":
            net = resnet(**content["config"], norm_layer=norm_layer)
            net.load_state_dict(content["backbone"])
        else:
            net = SDRNet(**content["config"])
            net.resnet.load_state_dict(content["backbone"])
            for name, kept in content["statistics"].items():
                bn = net.resnet.get_submodule(name)
                bn.prefix_mean, bn.prefix_var = kept["mean"], kept["var"]
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit its own config ({first_line(error)})") from None
    if not all(torch.isfinite(value).all() for value in (*net.parameters(), *net.buffers())):
        raise InputError(f"{path}: not all weights are finite: its training went astray")
    return net.eval()


def load_weights(net, path):
    """Loads a ResNet's weights, of ours or of another code base, into torchvision's names.

    They may lie under "backbone", "state_dict" or "model" and a prefix such as module.encoder_q.,
    in half precision, with a classifier or without. Returns "loaded N of N tensors ...". Raises
    InputError, naming a key, if one is missing, left over or misshapen: nothing loads in part."""
    state = read_torch_file(path)
    for key in ("backbone", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    items = state.items() if isinstance(state, dict) else ()
    state = {str(key): value for key, value in items if torch.is_tensor(value)}
    prefixes = [key.removesuffix("conv1.weight") for key in state if key.endswith("conv1.weight")]
    if not prefixes:
        raise InputError(f"{path} holds no ResNet's weights: no key ends in conv1.weight")
    wanted = {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}
    needed = [key for key in wanted if not key.endswith("num_batches_tracked")]

    def missing(prefix):
        return [prefix + key for key in needed if prefix + key not in state]
    prefix = min(prefixes, key=lambda prefix: len(missing(prefix)))
    wrong = [f"lacks {key}" for key in missing(prefix)]
    wrong += [f"holds {key}, which the network here lacks" for key in state
              if key.startswith(prefix + "layer") and key.removeprefix(prefix) not in wanted]
    if wrong:
        raise InputError(f"{path} {wrong[0]}: another architecture's?")
    found = {key: state[prefix + key] for key in wanted if prefix + key in state}
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            shapes = f"{tuple(value.shape)}, and {tuple(wanted[key].shape)} is needed"
            raise InputError(f"{path}: {prefix}{key} is {shapes}: another width, stem or network")
    net.load_state_dict(found, strict=False)           # strict but for fc and counters, as seen
    removed = f", prefix {prefix} removed" if prefix else ""
    counters = ", the rest being num_batches_tracked" if len(found) < len(wanted) else ""
    return f"{path}: loaded {len(found)} of {len(wanted)} tensors{counters}{removed}"


# ------------------------------------------------------------------------------------ images

def list_images(folder, leave_out=None):
    """Names of the images below a folder, relative to it, sorted: the order of all our arrays.

    Links are followed, each real folder once. Left out, in one line with their count: names that
    begin with a dot, files that are no images, the folder `leave_out` (our output).
    Raises InputError where no image is left."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder}")
    seen = {os.path.realpath(leave_out)} if leave_out else set()
    if os.path.realpath(folder) in seen:
        raise InputError(f"{folder} holds the images and the run's files: keep these elsewhere")
    names, left_out = [], []

    def unreadable(error):
        raise InputError(f"folder {error.filename} cannot be read ({error.strerror})")
    for where, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        folders.sort()                                 # of two links to a folder always the first
        real, inside = os.path.realpath(where), os.path.relpath(where, folder)
        if real in seen or os.path.basename(inside).startswith(".") and inside != ".":
            left_out.append(inside)
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            is_image = name.lower().endswith(SUFFIXES) and not name.startswith(".")
            place = os.path.normpath(os.path.join(inside, name))
            one_line = "\n" not in place and "\r" not in place         # in images.txt
            (names if is_image and one_line else left_out).append(place)
    if left_out:
        print0(f"{folder}: {len(left_out)} names left out (no image, begins with a dot, output, or "
               f"met before), such as {min(left_out)}")
    if not names:
        raise InputError(f"no images in {folder} (looked for {' '.join(SUFFIXES)} at any depth)")
    return sorted(names)


def read_rgb(path, turn=True):
    """An image file as PIL's, in RGB, its first frame; turned as its EXIF says, if `turn`.

    16 bits become 8, floating point from 0 to 1 becomes 0 to 255, what is transparent is white.
    Raises what PIL raises on a damaged file, and ValueError for values without a known range."""
    with Image.open(path) as image:
        if image.mode == "I" and image.format == "TIFF":
            raise ValueError("32-bit integers have no known range: save it with 8 bits")
        image = ImageOps.exif_transpose(image) if turn else image
        if image.mode[0] in "FI":
            values = np.asarray(image, np.float64)
            most = 1 if image.mode == "F" else 65535
            if not (values.min() >= 0 and values.max() <= most):
                raise ValueError(f"values from {values.min():g} to {values.max():g}, not from 0 to "
                                 f"{most}: save it with 8 bits")
            image = Image.fromarray((values * (255 / most)).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def center_crop(image, size):
    """uint8 (3, H, W) -> (3, size, size) for evaluation: the short side to `size`, above 64 pixels
    to 8/7 of it, then the centre."""
    short = size if size <= 64 else round(size * 8 / 7)
    longest = 4 * min(image.shape[1:])                 # of a panorama the middle
    image = T.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    return T.center_crop(T.resize(image, [short], antialias=True), [size, size])


class Images(Dataset):
    """Images of a folder by index: transform(uint8 (3, H, W)). Where one cannot be read, the
    sentence that says so, for `load_batches` to raise."""

    def __init__(self, folder, names, transform):
        self.folder, self.names, self.transform = folder, names, transform

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = os.path.join(self.folder, self.names[i])
        try:
            return self.transform(T.pil_to_tensor(read_rgb(path)))
        except Exception as error:                     # PIL raises nearly anything on a bad file
            return f"{path} cannot be read as an image ({first_line(error)}): mend or remove it"


def start_worker(_):
    """Loader workers leave signals to their parent, which ends them when it is done, and send
    tensors by name: an open file for each would be too many for the usual limit of 1,024."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)     # PR_SET_PDEATHSIG: end with the parent
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@functools.lru_cache(2)
def permutation(seed, epoch, count):
    """The order of the images in an epoch: int64 (count,). Kept, as it is asked image by image."""
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def load_batches(dataset, batches, workers=0):
    """Yields for each list of indices in `batches` the list of what the dataset holds there.

    Raises InputError where that is a sentence and no sample."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list,
                        worker_init_fn=start_worker)
    for samples in loader:
        for sample in samples:
            if isinstance(sample, str):
                raise InputError(sample)
        yield samples


def normalise(x):
    """RGB in [0, 1], (B, 3, H, W) -> what torchvision's networks take: ImageNet's mean and
    standard deviation become 0 and 1."""
    return T.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def embed(net, dataset, device, amp="auto", workers=0, batch=256):
    """Features of a dataset, row i being sample i: float32 (N, D) on process 0, on others None.

    net: images (B, 3, S, S) -> (B, D), in eval mode, D being net.features; dataset: uint8
    (3, S, S) each. In each round every process embeds one block."""
    blocks = [range(a, min(a + batch, len(dataset))) for a in range(0, len(dataset), batch)]
    loaded = load_batches(dataset, blocks[rank()::world_size()], workers)
    features = np.empty((len(dataset), net.features), np.float32) if rank() == 0 else None
    rounds = range(0, len(blocks), world_size())
    for first in progress(rounds, "rounds of features", len(rounds)):
        table = torch.zeros(world_size(), batch, net.features, device=device)
        if first + rank() < len(blocks):
            x = normalise(torch.stack(next(loaded)).to(device).float() / 255)
            with autocast(device, amp):
                table[rank(), :len(x)] = net(x).float()
        if world_size() > 1:                           # each block is on one process: a sum gathers
            dist.all_reduce(table)
        if rank() == 0:
            rows = features[first * batch:(first + world_size()) * batch]
            rows[:] = table.flatten(0, 1)[:len(rows)].cpu().numpy()
    return features


# ------------------------------------------------------------------------------------ command

def read_path(text, net):
    """"0,2,1,3" -> (0, 2, 1, 3). Raises InputError where the network has no such path."""
    if not isinstance(net, SDRNet) or not net.prefix_statistics():
        raise InputError(f"--path {text}: this checkpoint has no sub-nets; one of kind sdrnet has")
    digits = text.split(",")
    if len(digits) != STAGES or not all(d.isdecimal() and int(d) < net.groups for d in digits):
        raise InputError(f"--path {text}: four digits below {net.groups} are needed, as in 0,1,1,0")
    return tuple(int(d) for d in digits)


def main():
    parser = argparse.ArgumentParser(description="features of a folder by a checkpoint",
                                     allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("checkpoint", help="simsiam.pt, byol.pt, sdrnet.pt or subnet.pt")
    parser.add_argument("folder", help="images, at any depth")
    parser.add_argument("target", help="the .npy to write; the names go to a .txt beside it")
    parser.add_argument("--path", help="the sub-net of these digits, as in 0,2,1,3; default: W_0")
    parser.add_argument("--workers", type=number(int, 0), default=2, help="readers of images")
    parser.add_argument("--amp", choices=("auto", "off"), default="auto", help="off: no bf16")
    args = parser.parse_args()
    try:
        device = setup()
        if not args.target.endswith(".npy") or os.path.basename(args.target) == "images.npy":
            raise InputError(f"{args.target}: a name ending in .npy, not images.npy, is needed")
        net = load_network(args.checkpoint)
        if args.path is not None:
            path = read_path(args.path, net)           # or says that there are none
            net = net.extract(path)
        names = list_images(args.folder, leave_out=Path(args.checkpoint).absolute().parent)
        size = load_checkpoint(args.checkpoint)["image_size"]
        images = Images(args.folder, names, functools.partial(center_crop, size=size))
        listing = os.path.splitext(args.target)[0] + ".txt"
        if rank() == 0:                                # a wrong folder shows at once; until the
            save_names(listing, [])                    # features are there the listing fits none
        features = embed(net.to(device), images, device, args.amp, args.workers)
        if rank() == 0:
            save_file(args.target, functools.partial(np.save, arr=features))
            save_names(listing, names)
        print0(f"wrote {args.target}: {len(names):,} x {net.features}")
        if dist.is_initialized():                      # else gloo aborts one exit in six
            dist.destroy_process_group()
    except InputError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
