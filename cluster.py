"""cluster.py - k balanced clusters of the images, in the feature space of a SimSiam network (SDR, section "clustering").

    python cluster.py                                            # runs/toy/simsiam.pt -> runs/toy/clusters.npy, k = 16
    python cluster.py --data photos/ --out runs/photos --k 256
    torchrun --nproc_per_node 8 cluster.py --data imagenet/train --out runs/in1k --k 256
    python cluster.py --features features.npy --k 256 --out runs/x        # any float32 (N, D) array, memory-mapped
    python cluster.py --retrieve toy:weaves --budget 1024                 # SEPT: a task's own images -> runs/toy/subset.npy

In the paper's terms: features F = [f1 ... fn] of a network pre-trained on everything, k learnable centroids C, scores
S = F^T C. The clusters' posterior U maximises

    Tr(U^T S) + eps H(U)     over U with rows summing to 1/n and columns to 1/k  (balanced),

whose solution is U_ij = exp(u_i + v_j + S_ij / eps), found by Sinkhorn-Knopp. C follows by SGD on the cross-entropy
between U and softmax(S / T). The two alternate, block by block; in the end each image goes to the centroid of its
highest score S (or, with --balanced, of its highest posterior U).

SEPT (AAAI 2023) pre-trains a network per task, on images like the task's. --retrieve: the task's training images, which
need no labels, claim in turn the most similar image of the pool (cosine) that none has taken, until there are --budget.

In:  <out>/simsiam.pt and --data, or --features (N, D)
Out: <out>/clusters.npy   int64 (N,): sub-net of each image of the sorted listing
     <out>/clusters.json  n, k, sha256 of the listing, the mean feature, and the figures printed
     <out>/centroids.npy  float32 (k, D), unit length, of features minus their mean
     <out>/clusters.png   a row per cluster: the images nearest to its centroid
     <out>/features.npy   float32 (N, D), with --save-features
     or with --retrieve   subset.npy, int64 (K,), sorted, for pretrain.py --subset; subset.json, of which listing;
                          subset.png, a row per target (the first column) with what it claimed first

Measured: 40,000 x 128 into 16 in 1.4 s on one CPU core; on the toy images the clusters' mutual information with the four
worlds is 0.92, 0.88 and 0.91 of the worlds' entropy (seeds 0, 1, 2).
"""
import argparse
import hashlib
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import sdrnet
from pretrain import (TINY, Parser, Signals, batches, common_options, computes_in_bf16, contact_sheet, data_options, embed, folder_listing, load_array, number, open_images, open_tasks,
                      rank, run, save_array, save_json, say, start)
from sdrnet import InputError, OwnError, world_size

DAMPING = 0.2                                          # share of a Sinkhorn step that the potentials take per block
SHEET = 10                                             # images per cluster, or per target, on the contact sheet
ENTRIES = 1 << 24                                      # similarities or candidates that retrieval holds at a time


class Features:
    """Rows of features, centred and of unit length, read block by block: works on an array larger than memory.

    Block b of n is every n-th row from b on, so that each block is a fair sample of a sorted listing; with several
    processes each holds its share of a block. Arithmetic is float64 where that is quick, else float32."""

    def __init__(self, array, k, device, rows=8192):
        self.array, self.device, self.count = array, device, len(array)
        self.blocks = max(1, round(len(array) / min(rows, max(len(array) / 32, 8 * k))))       # at least 32 steps an epoch, if k allows
        self.dtype = torch.float64 if array.shape[0] * array.shape[1] * k <= 2e9 else torch.float32
        total, finite = torch.zeros(array.shape[1], dtype=torch.float64), True
        for b in range(self.blocks):
            part = torch.from_numpy(np.ascontiguousarray(array[self.rows(b)]))
            finite = finite and bool(torch.isfinite(part).all())
            total += F.normalize(part.double()).sum(0)
            Signals.poll()
        total = torch.cat([total, torch.tensor([float(finite)], dtype=torch.float64)]).to(device)
        sdrnet.add_up(total)
        if total[-1] < world_size():
            raise InputError("the features hold values that are not finite")
        self.mean = (total[:-1] / self.count).to(self.dtype)

    def rows(self, b):
        """This process's rows of block b."""
        return np.arange(b, self.count, self.blocks)[rank()::world_size()] if world_size() > 1 else slice(b, None, self.blocks)

    def block(self, b):
        """(n, D): the centred, normalised features of this process's rows of block b."""
        part = torch.from_numpy(np.ascontiguousarray(self.array[self.rows(b)])).to(self.device, self.dtype)
        return F.normalize(F.normalize(part) - self.mean)


def posterior(scores, v, eps):
    """log of U's rows, each summing to 1: log softmax(S / eps + v). The row potential u_i is solved for exactly, so
    that the column potentials v (k,), kept in float64, are all the state that Sinkhorn-Knopp has."""
    return torch.log_softmax(scores / eps + v.to(scores.dtype), 1)


def sinkhorn(chunks, k, count, eps, v=None, tolerance=0.01, iterations=500):
    """Column potentials of the balanced assignment (equation above).

    chunks: () -> iterator of score blocks (n, k), all rows once per call. v: potentials to start from, float64 (k,).
    Each iteration sets the columns right given the rows: v_j -= log(k mass_j / N). In the log domain no eps
    overflows. Returns v, the largest relative error of a cluster's mass, and the iterations used."""
    first = next(iter(chunks()))
    v = torch.zeros(k, dtype=torch.float64, device=first.device) if v is None else v.clone()
    error = float("inf")
    for iteration in range(1, iterations + 1):
        mass = torch.zeros(k, dtype=torch.float64, device=v.device)
        for scores in chunks():
            mass += posterior(scores, v, eps).exp_().sum(0, dtype=torch.float64)
            Signals.poll()
        mass = sdrnet.add_up(mass) * k / count
        error = (mass - 1).abs().max().item()
        if error <= tolerance:
            break
        v -= torch.log(mass.clamp(min=1e-30))
    return v, error, iteration


def learn(features, k, *, eps, temperature, epochs, rate, seed):
    """Centroids (k, D) of unit length and potentials v (k,), by SGD on the cross-entropy -sum U log softmax(S / T).

    Block by block: S = F C^T; U from the potentials so far, which take a damped Sinkhorn step towards equal masses; the
    gradient mean_i (P_ij - U_ij) f_i / T with respect to c_j. The step is rate * k * T times that, so that at `rate` 1 a
    centroid moves about as far as by a k-means step on the block. Start: k random images. Prints the loss.

    Why damped: on the toy images, solving for equal masses before each epoch pulled centroids between the natural
    clusters (mean cosine 0.6 against 0.89 here and 0.93 by k-means). Why T = 1: the features are centred, so at a high
    temperature the P term nearly vanishes and c_j goes to the mean of its images; at T = 0.1 it is pushed beyond
    (0.70)."""
    rng = np.random.default_rng([seed, 3])
    picks = np.sort(rng.choice(features.count, k, replace=False))
    c = F.normalize(F.normalize(torch.from_numpy(np.ascontiguousarray(features.array[picks])).to(features.device, features.dtype)) - features.mean)
    v = torch.zeros(k, dtype=torch.float64, device=features.device)
    for epoch in range(epochs):
        began, loss, fit = time.time(), 0.0, 0.0
        step = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for b in rng.permutation(features.blocks):
            f = features.block(b)                      # (n, D)
            s = f @ c.T                                # (n, k) cosines
            u = posterior(s, v, eps).exp_()
            logp = torch.log_softmax(s / temperature, 1)
            gradient = (logp.exp() - u).T @ f          # (k, D)
            sums = torch.cat([gradient.flatten().double(), u.sum(0, dtype=torch.float64),
                              torch.stack([-(u * logp).sum(), s.max(1).values.sum(), s.new_tensor(float(len(s)))]).double()])
            gradient, mass, (ce, best, n) = sdrnet.add_up(sums).split([k * f.shape[1], k, 3])
            c = F.normalize(c - (step * k / n * gradient.view(k, -1)).to(c.dtype))
            v -= DAMPING * torch.log((mass * k / n).clamp(min=1e-3, max=1e3))
            loss, fit = loss + ce.item(), fit + best.item()
            Signals.poll()
        if epoch in (0, epochs - 1) or epoch % 5 == 4:
            say(f"  epoch {epoch + 1:3d} of {epochs}: cross-entropy {loss / features.count:.4f}, mean cosine to the nearest centroid "
                f"{fit / features.count:.4f}, {time.time() - began:.1f} s an epoch")
    return c, v


def tree_order(centroids, g):
    """A permutation of k = g^4 centroids such that similar ones share the first digits of their path: split into g
    equal groups, each again, and so on; balanced k-means, each step solved exactly as an assignment problem."""
    def split(index, parts):
        if parts == 1 or g == 1:
            return list(index)
        x, size = centroids[index], len(index) // g
        middle = x[np.linspace(0, len(x) - 1, g).astype(int)]
        for _ in range(20):
            rows, columns = linear_sum_assignment(-(x @ middle.T).repeat(size, axis=1))
            group = columns // size
            middle = np.stack([x[group == j].mean(0) for j in range(g)])
        return [i for j in range(g) for i in split(index[group == j], parts // g)]
    return np.array(split(np.arange(len(centroids)), len(centroids)))


def assign(features, centroids, mean):
    """Clusters of new images: features (n, D) of the network that clustered -> int64 (n,), highest score S."""
    f = F.normalize(F.normalize(features.double()) - mean.double())
    return (f @ centroids.double().T).argmax(1)


def fill_empty(clusters, best, k):
    """No cluster is left empty: each empty one, in order, takes the image that its own centroid scores highest among
    the images of clusters that have at least two. best: (k, candidates) image indices, highest score first."""
    sizes, moved = np.bincount(clusters, minlength=k), 0
    for j in np.flatnonzero(sizes == 0):
        image = next((i for i in best[j] if sizes[clusters[i]] > 1), None)
        if image is None:
            image = np.flatnonzero(sizes[clusters] > 1)[0]
        sizes[clusters[image]] -= 1
        clusters[image], sizes[j], moved = j, 1, moved + 1
    return moved


def cluster(array, k, device, *, eps=0.05, temperature=1.0, epochs=20, rate=1.0, seed=0, balanced=False, order="tree"):
    """The whole stage on an array (N, D). Returns clusters int64 (N,), centroids float32 (k, D), mean float32 (D,),
    nearest (k, 64) images of each centroid, and a dict of figures."""
    began = time.time()
    features = Features(array, k, device)
    c, v = learn(features, k, eps=eps, temperature=temperature, epochs=epochs, rate=rate, seed=seed)
    if order == "tree" and round(k ** 0.25) ** 4 == k:
        permutation = torch.from_numpy(tree_order(c.double().cpu().numpy(), round(k ** 0.25)))
        c, v = c[permutation], v[permutation.to(v.device)]
    keep = features.count * k * 4 // world_size() <= 2 << 30           # S in memory, or computed anew each time
    kept = [(features.block(b) @ c.T).to(torch.float32 if features.dtype == torch.float32 else torch.float64) for b in range(features.blocks)] if keep else None
    chunks = lambda: iter(kept) if keep else (features.block(b) @ c.T for b in range(features.blocks))
    v, error, iterations = sinkhorn(chunks, k, features.count, eps, v)

    sharp = eps / 4 if balanced else eps               # U's argmax is balanced as far as U is hard
    w = sinkhorn(chunks, k, features.count, sharp, v * eps / sharp)[0] if balanced else v

    clusters = torch.zeros(features.count, dtype=torch.int64, device=device)
    top = min(64, features.count)
    near_score = torch.full((k, top), -2.0, dtype=torch.float64, device=device)
    near = torch.zeros(k, top, dtype=torch.int64, device=device)
    figures = torch.zeros(2, dtype=torch.float64, device=device)
    for b, s in enumerate(chunks()):
        rows = torch.from_numpy(np.arange(features.count)[features.rows(b)]).to(device)
        logu = posterior(s, v, eps)
        clusters[rows] = (posterior(s, w, sharp) if balanced else s).argmax(1)
        u = logu.exp()
        figures += torch.stack([(u * s).sum().double() - eps * (u * logu).sum().double(),                 # Tr(U^T S) + eps H(U), times N
                                s.gather(1, clusters[rows, None]).sum().double()])
        both_score, both = torch.cat([near_score, s.T.double()], 1), torch.cat([near, rows.expand(k, -1)], 1)
        near_score, place = both_score.topk(top, 1)
        near = both.gather(1, place)
        Signals.poll()
    sdrnet.add_up(clusters), sdrnet.add_up(figures)
    if world_size() > 1:                               # the nearest of all processes' nearest
        table = torch.zeros(world_size(), 2, k, top, dtype=torch.float64, device=device)
        table[rank(), 0], table[rank(), 1] = near_score, near.double()
        sdrnet.add_up(table)
        both_score, both = table[:, 0].transpose(0, 1).flatten(1), table[:, 1].transpose(0, 1).flatten(1).long()
        near = both.gather(1, both_score.topk(top, 1).indices)
    clusters, near = clusters.cpu().numpy(), near.cpu().numpy()
    moved = fill_empty(clusters, near, k)
    sizes = np.bincount(clusters, minlength=k)
    about = {"n": features.count, "k": k, "eps": eps, "temperature": temperature, "epochs": epochs, "rate": rate, "seed": seed, "balanced": balanced, "order": order,
             "marginal_error": error, "sinkhorn_iterations": iterations, "objective": figures[0].item() / features.count,
             "mean_cosine": figures[1].item() / features.count, "moved_to_empty": moved,
             "sizes": sizes.tolist(), "seconds": round(time.time() - began, 2)}
    say(f"Sinkhorn: marginal error {100 * error:.2f} % of a cluster's mass after {iterations} iterations; objective Tr(U'S) + eps H(U) = {about['objective']:.4f}")
    say(f"mean cosine to the assigned centroid {about['mean_cosine']:.4f}; sizes {sizes.min()} to {sizes.max()}, median {int(np.median(sizes))}"
        + (f"; {moved} empty clusters were given their nearest image" if moved else "") + f"; {about['seconds']:.1f} s")
    return clusters, c.float().cpu().numpy(), features.mean.float().cpu().numpy(), near, about


# ---------------------------------------------------------------------------- SEPT: retrieval

def candidates(pool, targets, m, taken, rows=2048):
    """For each target the untaken images that are certainly its most similar, at most m: T pairs (indices, cosines).

    pool: (N, D) array, maybe memory-mapped; targets: (T, D); taken: bool (N,). The most similar first, by cosine in
    float64; ties: the lowest index. Memory: ENTRIES similarities and T x m candidates. Each process reads its blocks.

    In bf16, where the machine has it, each target a and image b of unit length get an upper bound of <a - c, b - c> +
    <c, b>, c being the targets' mean. The m highest bounds are measured in float64: an image whose cosine reaches the
    m-th bound cannot be beaten by one outside."""
    device = targets.device
    low = torch.bfloat16 if device.type == "cpu" and computes_in_bf16("cpu") else torch.float32
    exact = F.normalize(targets.double())
    centre = exact.mean(0)
    moved = (exact - centre).float()
    slack = moved.norm(dim=1).max() * (2.0 ** -7 if low == torch.bfloat16 else targets.shape[1] * 2.0 ** -23)         # of rounding a, b and their product
    front, centre32 = moved.to(low), centre.float()
    free = int((~taken).sum())
    rows, m = max(64, min(rows, ENTRIES // len(targets))), min(m, free)
    best, index = torch.full((len(targets), m), -math.inf, device=device), torch.zeros(len(targets), m, dtype=torch.int64, device=device)
    found, count = [], 0
    for first in range(rank() * rows, len(pool), rows * world_size()):
        b = F.normalize(torch.from_numpy(np.array(pool[first:first + rows], np.float32)).to(device))
        around = b - centre32
        column = b @ centre32 + slack * around.norm(dim=1) + 2e-6 + targets.shape[1] * 2.0 ** -24                     # ... and of b and <c, b>
        if not torch.isfinite(column).all():
            raise OwnError("the features hold values that are not finite")
        column[torch.from_numpy(taken[first:first + rows]).to(device)] = -math.inf
        bound = (front @ around.to(low).T).float().add_(column)        # (T, rows)
        bar = best[:, -1:] if first >= rows * world_size() else bound.topk(min(m, bound.shape[1]), 1).values[:, -1:]
        hits = torch.from_numpy(np.flatnonzero((bound >= bar).cpu().numpy())).to(device)         # quicker than torch's nonzero
        found.append((hits // bound.shape[1], hits % bound.shape[1] + first, bound.view(-1)[hits]))
        count += len(hits)
        if count >= len(targets) * m:
            best, index, found, count = *keep_best(best, index, found), [], 0
        Signals.poll()
    best, index = keep_best(best, index, found) if found else (best, index)
    if world_size() > 1:                               # the best of all processes' best
        tables = torch.zeros(world_size(), 2, *best.shape, dtype=torch.float64, device=device)
        tables[rank(), 0], tables[rank(), 1] = best, index
        best, index = sdrnet.add_up(tables).permute(1, 2, 0, 3).flatten(2)
        best, place = best.topk(m, 1)
        index = index.gather(1, place).long()
    last, lists = best[:, -1].double() + exact @ centre - centre @ centre, []          # of an outside image's cosine
    if m == free:
        last[:] = -math.inf
    for a, i, bar in zip(exact, index.cpu().numpy(), last):
        b = torch.from_numpy(pool[i]).to(device, torch.float64)
        cosine = (b * a).sum(1) / (b * b).sum(1).sqrt().clamp(min=1e-12)
        certain = (cosine >= bar).cpu().numpy()
        i, cosine = i[certain], cosine.cpu().numpy()[certain]
        order = np.lexsort((i, -cosine))
        lists.append((i[order], cosine[order]))
    return lists


def keep_best(best, index, found):
    """(bounds, indices), both (T, m): the m highest per target of these and of `found`, [(target, index, bound), ...]."""
    row, place, bound = (torch.cat(parts) for parts in zip(*found))
    row, order = row.sort(stable=True)
    nth = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)      # its number among its target's
    width = int(nth.max()) + 1 if len(row) else 0
    more, where = best.new_full((len(best), width), -math.inf), index.new_zeros(len(best), width)
    more[row, nth], where[row, nth] = bound[order], place[order]
    best, chosen = torch.cat([best, more], 1).topk(best.shape[1], 1)
    return best, torch.cat([index, where], 1).gather(1, chosen)


def retrieve(pool, targets, budget, taken=None):
    """SEPT's round-robin: targets (T, D), in order, each claim the most similar image of pool (N, D) that is not taken,
    again and again, until there are `budget`. Returns int64 (K,), claim j being target j % T's, and its cosines.

    A target whose list of candidates is used up gets one twice as long; so do those that will not last either, in the
    same pass over the pool, as memory allows."""
    taken = np.zeros(len(pool), bool) if taken is None else taken.copy()
    count, claims, cosines = len(targets), np.zeros(budget, np.int64), np.zeros(budget)
    lists, at, length = [(np.zeros(0, np.int64), None)] * count, [0] * count, np.full(count, 4 * math.ceil(budget / count) + 32)
    for j in range(budget):
        t = j % count
        while True:
            images, similar = lists[t]
            while at[t] < len(images) and taken[images[at[t]]]:
                at[t] += 1
            if at[t] < len(images):
                break
            rounds, m = math.ceil((budget - j) / count), int(length[t])
            short = [t] + [i for i in range(count) if i != t and np.count_nonzero(~taken[lists[i][0]]) < rounds]
            short = np.sort(short[:max(1, ENTRIES // m)])
            for i, found in zip(short, candidates(pool, targets[short], m, taken)):
                lists[i], at[i] = found, 0
            length[short] = 2 * m
        claims[j], cosines[j] = images[at[t]], similar[at[t]]
        taken[claims[j]] = True
    return claims, cosines


def target_images(name, seed):
    """The images that --retrieve names: a toy task's or a task folder's training images, or all those of a folder."""
    if name.startswith("toy:"):
        return open_tasks([name], seed)[0].train
    if not os.path.isdir(name):
        raise InputError(f"--retrieve {name}: no such folder; it takes a task's folder with train/, a folder of images, or toy:WORLD")
    return folder_listing(os.path.join(name, "train") if os.path.isdir(os.path.join(name, "train")) else name)


def same_pixels(images, targets, size, workers):
    """float32 (N,): 1 where an image equals one of the targets, pixel by pixel as the network sees them, for the images of
    this process; 0 elsewhere."""
    def digests(listing, mine):
        for block, pixels in batches(listing, size, workers=workers, mine=mine):
            yield from zip(block, (hashlib.sha256(p.numpy().tobytes()).digest() for p in pixels))
            Signals.poll()
    known = {digest for _, digest in digests(targets, False)}
    same = torch.zeros(len(images))
    for i, digest in digests(images, True):
        same[i] = digest in known
    return same


def sept(args, array, images, targets, net, size, device):
    """--retrieve: from features (N, D) to subset.npy and the contact sheet."""
    began, taken = time.time(), np.zeros(len(array), bool)
    listing = np.unique(load_array(args.subset, "i", 1)) if args.subset else np.arange(len(array))
    if len(listing) != len(array):
        raise InputError(f"{args.subset} names {len(listing)} images and {args.features} has {len(array)} rows")
    f = embed(net, targets, size=size, device=device, amp=args.amp, workers=args.workers)
    if f.shape[1] != array.shape[1]:
        raise InputError(f"{args.features} has {array.shape[1]} features an image and the checkpoint's network {f.shape[1]}: name the one that made them with --checkpoint")
    if args.drop_duplicates:
        if images is None:
            raise InputError("--drop-duplicates compares pixels: name the images of --features with --data")
        taken = sdrnet.add_up(same_pixels(images, targets, size, args.workers).to(device)).cpu().numpy() > 0
        say(f"{taken.sum():,} of the {len(images):,} images equal a target, pixel by pixel, and are left out")
        if args.budget > (~taken).sum():
            raise InputError(f"--budget {args.budget}: there are {(~taken).sum():,} images to retrieve from")
    claims, cosines = retrieve(array, f.to(device), args.budget, taken)
    say(f"{args.budget:,} of {len(array):,} images for {len(targets):,} targets of {args.retrieve}: mean cosine {cosines.mean():.4f}, least {cosines.min():.4f}; {time.time() - began:.1f} s")
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        if images is not None:
            both = argparse.Namespace(pixels=lambda i: images.pixels(i) if i < len(images) else targets.pixels(i - len(images)))
            shown = np.unique(np.linspace(0, len(targets) - 1, 12).astype(int))
            contact_sheet(both, [[len(images) + t, *claims[t::len(targets)][:SHEET]] for t in shown], os.path.join(args.out, "subset.png"))
        save_array(os.path.join(args.out, "subset.npy"), listing[np.sort(claims)])
        save_json(os.path.join(args.out, "subset.json"), {"targets": args.retrieve, "budget": args.budget, "sha256": None if images is None else images.whole})
        say(f"wrote {os.path.join(args.out, 'subset.npy')} ({args.budget},)" + (", subset.png" if images is not None else ""))


def parse(argv=None):
    parser = Parser(__doc__)
    data_options(parser)
    group = parser.add_argument_group("features")
    group.add_argument("--checkpoint", help="simsiam.pt, byol.pt, mocov2.pt, or sdrnet.pt (its largest network); default: the first of the three in --out")
    group.add_argument("--features", help="use these instead: float32 .npy (N, D); --data then only makes the contact sheet and the listing's hash")
    group.add_argument("--save-features", action="store_true", help="write <out>/features.npy")
    group = parser.add_argument_group("clustering")
    group.add_argument("--k", type=number(int, 1), default=None, help="number of clusters, g^4 for a later SDR; default: 16 for toy, else 256")
    group.add_argument("--eps", type=number(float, 1e-4, 1e4), default=0.05, help="entropy's weight: small is hard, large is soft")
    group.add_argument("--temperature", type=number(float, TINY), default=1.0, help="T of the softmax of cosines; see learn()")
    group.add_argument("--epochs", type=number(int, 1), help="passes of SGD over the features: 20, and 6 from 100,000 images on, where they did no worse")
    group.add_argument("--rate", type=number(float, TINY), default=1.0, help="learning rate, 1 being about a k-means step per block")
    group.add_argument("--balanced", action="store_true", help="assign by the posterior U, nearly equal sizes, instead of by S")
    group.add_argument("--order", choices=("tree", "none"), default="tree", help="tree: similar clusters share the first groups of their path")
    group = parser.add_argument_group("retrieval (SEPT), in place of clustering")
    group.add_argument("--retrieve", metavar="TASK", help="toy:WORLD, a task's folder (its train/), or a folder of images: the targets")
    group.add_argument("--budget", type=number(int, 1), help="K, images to retrieve from the pool --data, or --features")
    group.add_argument("--drop-duplicates", action="store_true", help="leave out images that equal a target, pixel by pixel as the network sees them")
    common_options(parser)
    args = parser.parse_args(argv)
    if (args.retrieve is None) != (args.budget is None) or args.drop_duplicates and args.retrieve is None:
        raise InputError("--retrieve TASK and --budget K go together, and --drop-duplicates with them")
    if args.data == "toy":
        parser.idle(args, ("root", "download"), "with --data toy")
    if args.retrieve:
        parser.idle(args, ("k", "eps", "temperature", "epochs", "rate", "balanced", "order", "save_features"), "with --retrieve")
    elif args.features:
        parser.idle(args, ("checkpoint", "save_features", *(["subset"] if args.data == "toy" else [])), "with --features")
    return args


def main():
    args = parse()
    device = start(args)
    k = args.k or (16 if args.data == "toy" else 256)
    images = None
    if args.features is None or args.data != "toy":
        images = open_images(args).pack()
    if args.features is not None:
        array = load_array(args.features, "f", 2, mmap_mode="r")
        if images is not None and len(images) != len(array):
            raise InputError(f"{args.features} has {len(array)} rows and --data {len(images)} images")
    if args.features is None or args.retrieve:
        own = [os.path.join(args.out, f"{name}.pt") for name in ("simsiam", "byol", "mocov2")]
        source = args.checkpoint or next(filter(os.path.exists, own), own[0])
        content = sdrnet.load(source, ("simsiam", "sdrnet"))
        net = sdrnet.network(content, source).to(device, memory_format=torch.channels_last)
    count = len(array) if args.features is not None else len(images)
    if args.retrieve:
        targets = target_images(args.retrieve, args.seed).pack()
        if args.budget > count:
            raise InputError(f"--budget {args.budget}: there are {count:,} images to retrieve from")
    elif k > count:
        raise InputError(f"--k {k} clusters cannot be made of {count} images")
    elif round(k ** 0.25) ** 4 != k:
        say(f"warning: {k} is not 1, 16, 81, 256, ...: pretrain.py takes g^4 clusters")
    if args.features is None:
        say(f"features of {count:,} images by {source}")
        array = embed(net, images, size=content["config"]["image_size"], device=device, amp=args.amp, workers=args.workers).numpy()
    if args.retrieve:
        return sept(args, array, images, targets, net, content["config"]["image_size"], device)
    clusters, centroids, mean, near, about = cluster(array, k, device, eps=args.eps, temperature=args.temperature, epochs=args.epochs or (20 if count < 100_000 else 6), rate=args.rate,
                                                     seed=args.seed, balanced=args.balanced, order=args.order)
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        path = lambda name: os.path.join(args.out, name)
        about.update(sha256=None if images is None else images.fingerprint, features=args.features or source, mean=mean.tolist())
        if args.save_features:
            save_array(path("features.npy"), array.astype(np.float32))
        save_array(path("centroids.npy"), centroids)
        if images is not None:
            contact_sheet(images, [[i for i in row if clusters[i] == j][:SHEET] for j, row in enumerate(near)], path("clusters.png"))
        save_array(path("clusters.npy"), clusters)
        save_json(path("clusters.json"), about)
        say(f"wrote {path('clusters.npy')} ({count},), centroids.npy {centroids.shape}, clusters.json" + (", clusters.png" if images is not None else ""))


if __name__ == "__main__":
    run(main, "cluster.py")
