"""cluster.py - k balanced clusters of images, in the feature space of a SimSiam network.

    python cluster.py                                        # runs/toy/features.npy, k = 16
    python cluster.py --out runs/photos --data photos/ --k 256
    python cluster.py --features features.npy --out runs/mine --k 100     # any float (N, D) array

In the paper's terms (SDR, AAAI 2022): features F = [f_1 ... f_n], k learnable centroids C, scores
S = F^T C. The clusters' posterior U maximises

    Tr(U^T S) + eps H(U)   over U whose rows each sum to 1/n and whose columns each to 1/k,

so U_ij = exp(u_i + v_j + S_ij / eps), found by Sinkhorn-Knopp. C is learned by SGD on the
cross-entropy between U and softmax(S / T). The two alternate, an epoch each; at last each image
goes to the cluster of its highest score S. Here f is unit, less the mean, unit again; c is unit.

In:   <out>/features.npy, float (N, D), or --features; for the picture images.txt beside it, --data
Out:  <out>/clusters.npy    int64 (N,): the cluster of each image; cluster i trains sub-net i
      <out>/centroids.npy   float32 (k, D), a centroid a row
      <out>/clusters.json   sizes, objective, protocol, and the mean to take off other unit features
      <out>/clusters.png    a row a cluster, 24 at most: index, size, images nearest its centroid

Measured on one core (AMD EPYC, AVX2, torch 2.14): 4,096 x 128 into 16 in 4 s; sizes 219 to 301.

Not known from the paper, so chosen here: eps, T, SGD's values, epochs, and the order: clusters are
numbered as the leaves of a tree, so that those whose index ends in equal base-g digits are alike.
"""
import argparse
import functools
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps


class InputError(Exception):
    """What the user gave cannot be used. The message is the line: what, which file, what to do."""


# ------------------------------------------------------------------------------------ method

def sinkhorn(S, eps, v, tolerance=0.01, max_rounds=1000, chunk=4096):
    """The balanced posterior of scores S (n, k): U (n, k), whose rows here sum to 1.

    v: float64 (k,), column potentials to start from. Each round solves the rows exactly, and then
    v_j -= log(k mass_j / n): in the log domain nothing overflows. Ends when each column's mass is
    within `tolerance`, a share, of n/k. Returns U, v, the largest error and the rounds."""
    n, k = S.shape
    for rounds in range(1, max_rounds + 1):
        mass = torch.zeros(k, dtype=torch.float64, device=S.device)
        for part in S.split(chunk):
            mass += torch.softmax(part / eps + v.to(S.dtype), dim=1).sum(0, dtype=torch.float64)
        error = (mass * k / n - 1).abs().max().item()
        if error <= tolerance or rounds == max_rounds:
            break
        v = v - torch.log((mass * k / n).clamp(min=1e-30))
    U = [torch.softmax(part / eps + v.to(S.dtype), dim=1) for part in S.split(chunk)]
    return torch.cat(U), v, error, rounds


def learn_centroids(f, k, eps=0.05, T=0.1, epochs=10, lr=0.1, batch=256, seed=0, chunk=8192):
    """Centroids C (k, D) of unit length, by alternation, from k random rows on; prints each epoch.

    f: features (N, D), centred and of unit length: a tensor, or what gives such rows when indexed
    by a slice or an array. An epoch: U by Sinkhorn on all of S = F^T C, then SGD on the
    cross-entropy -sum U log softmax(S / T) over shuffled rows, C renormalised each step."""
    rng = np.random.default_rng(seed)
    C = f[np.sort(rng.choice(len(f), k, replace=False))].clone().requires_grad_()
    optimizer = torch.optim.SGD([C], lr=lr, momentum=0.9)
    v = torch.zeros(k, dtype=torch.float64, device=C.device)
    for epoch in range(epochs):
        with torch.no_grad():                          # scores(), so that this lifts alone
            S = torch.cat([f[a:a + chunk] @ C.T for a in range(0, len(f), chunk)])     # (N, k)
        U, v, error, rounds = sinkhorn(S, eps, v)
        order, total = rng.permutation(len(f)), 0.0
        for a in range(0, len(f), batch):
            chosen = np.sort(order[a:a + batch])
            loss = F.cross_entropy(f[chosen] @ C.T / T, U[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                C.copy_(F.normalize(C))
            total += loss.item() * len(chosen) / len(f)
        print(f"epoch {epoch + 1}: {rounds} Sinkhorn rounds, marginal error {error:.3f}, "
              f"cross-entropy {total:.4f}", flush=True)
    return C.detach()


def scores(f, C, chunk=8192):
    """S = F^T C: features (N, D), as learn_centroids takes them, centroids (k, D) -> (N, k)."""
    return torch.cat([f[a:a + chunk] @ C.T for a in range(0, len(f), chunk)])


def objective(U, S, eps):
    """Tr(U^T S) + eps H(U), the rows of U (n, k) summing to 1 here and to 1/n there."""
    n = len(U)
    return ((U * S).sum() / n - eps * (torch.xlogy(U, U).sum() / n - math.log(n))).item()


def effective_rank(f):
    """How many directions features (n, D), of mean 0, use: (sum l)^2 / sum l^2 of the eigenvalues l
    of f^T f. 1 on a line, D where all count alike; near 1 the network has all but collapsed."""
    gram = f.T @ f
    return (gram.trace() ** 2 / gram.square().sum()).item()


def order_clusters(C, groups):
    """The new index of each of g^4 centroids (k, D), int64 (k,): a tree's leaves.

    All are split into g equal parts along their first principal direction, which gives the last
    digit of their base-g index; each part likewise, which gives the digit before; four times."""
    index, parts = torch.zeros(len(C), dtype=torch.int64), [torch.arange(len(C))]
    for power in range(4):
        smaller = []
        for members in parts:
            x = C[members] - C[members].mean(0)
            direction = torch.linalg.svd(x, full_matrices=False).Vh[0]
            ranked = members[(x @ direction).argsort()]
            for digit, part in enumerate(ranked.chunk(groups)):
                index[part] += digit * groups ** power
                smaller.append(part)
        parts = smaller
    return index


# ------------------------------------------------------------------------------------ files

class Centred:
    """An array (N, D), such as a memory-mapped file, whose rows when indexed come as float32
    tensors: brought to unit length, less the mean (D,), of unit length again. In float64 on the
    way: squares of large features overflow, and small differences drown."""

    def __init__(self, features, mean):
        self.features, self.mean = features, mean

    def __len__(self):
        return len(self.features)

    def __getitem__(self, rows):
        unit = F.normalize(torch.from_numpy(np.array(self.features[rows], np.float64)), eps=1e-150)
        return F.normalize(unit - self.mean).float()


def load_features(path):
    """features.npy, memory-mapped, floats (N, D), as Centred by the mean of its unit rows.

    Raises InputError where it is not that, a row is not finite, or all rows are alike."""
    try:
        f = np.lib.format.open_memmap(path, "r")       # np.load would open an archive too
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not there or no plain .npy ({error}): run pretrain.py first, "
                         "or name an array by --features") from None
    if f.ndim != 2 or f.dtype.kind != "f" or f.size == 0:
        raise InputError(f"{path} holds {f.dtype} of shape {f.shape}; floats (N, D) are needed")
    total = torch.zeros(f.shape[1], dtype=torch.float64)
    for a in range(0, len(f), 8192):
        part = torch.from_numpy(np.array(f[a:a + 8192], np.float64))
        bad = (~torch.isfinite(part)).any(1).nonzero()
        if len(bad):
            raise InputError(f"{path}: row {a + bad[0].item()} is not finite; mend or remove it")
        total += F.normalize(part, eps=1e-150).sum(0)
    mean = total / len(f)
    if mean.norm() > 1 - 1e-12 or not (mean.any() or np.any(f)):
        raise InputError(f"{path}: all rows point the same way, so there is nothing to cluster: "
                         "the network that made them has collapsed")
    return Centred(f, mean)


def save(path, write):
    """Has write(file) fill a binary file, then gives it its name: the whole file or none."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None


def thumbnail(path, side):
    """An image file as a square picture, RGBA; all of it transparent where it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "FI":                  # 16 bits, or floats, as training takes them
                values = np.asarray(image, np.float32) / (1 if image.mode == "F" else 65535)
                image = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
            return ImageOps.fit(image.convert("RGBA"), (side, side))
    except Exception as error:                         # PIL raises nearly anything on a bad file
        print(f"{path} is not shown ({error})")
        return Image.new("RGBA", (side, side))


def contact_sheet(S, clusters, names, folder, path, rows=24, columns=12, tile=64):
    """A picture: a row a cluster (at most `rows` of them), its index and size, and its images, the
    highest score S (N, k) first. names: of the images in `folder`, line i being row i of S."""
    shown = np.unique(clusters)
    shown = shown[np.linspace(0, len(shown) - 1, min(rows, len(shown))).astype(int)]
    step, font = tile + 2, ImageFont.load_default(size=14)
    sheet = Image.new("RGB", ((columns + 1) * step, len(shown) * step), "white")
    for y, cluster in enumerate(shown):
        members = np.flatnonzero(clusters == cluster)
        nearest = members[np.argsort(-S[members, cluster].numpy(), kind="stable")[:columns]]
        label = f"{cluster}\n{len(members):,}"
        ImageDraw.Draw(sheet).text((4, y * step + 12), label, fill="black", font=font)
        for x, i in enumerate(nearest, start=1):
            picture = thumbnail(os.path.join(folder, names[i]), tile)
            sheet.paste(picture, (x * step, y * step), picture)
    save(path, functools.partial(sheet.save, format="PNG"))


def read_listing(path, count):
    """images.txt: the name of each of `count` rows. Raises InputError where the count differs."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        names = [line.rstrip("\n") for line in file]   # splitlines would split at U+2028 too
    if len(names) != count:
        raise InputError(f"{path} has {len(names):,} lines, and the features have {count:,} rows: "
                         "they are of different runs")
    return names


# ------------------------------------------------------------------------------------ command

def build_parser():
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--features", help="float (N, D); default: <out>/features.npy")
    parser.add_argument("--out", default="runs/toy", help="folder of the run's files: runs/toy")
    parser.add_argument("--data", help="folder of the images, for clusters.png: <out>/images")
    parser.add_argument("--k", type=int, default=16, help="clusters: 16; paper: 256 = 4^4")
    parser.add_argument("--eps", type=float, default=0.05, help="weight of H(U): 0.05")
    parser.add_argument("--temperature", type=float, default=0.1, help="T: 0.1")
    parser.add_argument("--epochs", type=int, default=10, help="of SGD: 10")
    parser.add_argument("--lr", type=float, default=0.1, help="of SGD: 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the start and the shuffling: 0")
    return parser


def run(args):
    """The command, from the options on."""
    for name in ("k", "eps", "temperature", "epochs", "lr"):
        if not 1e-6 <= getattr(args, name) <= 1e6:     # beyond, float32 overflows
            raise InputError(f"--{name} {getattr(args, name)}: 1e-6 to 1e6 is needed")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: a number from 0 on is needed")
    if args.data is not None and not os.path.isdir(args.data):
        raise InputError(f"--data: no folder {args.data}")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    path = args.features or os.path.join(args.out, "features.npy")
    f = load_features(path)
    if args.k > len(f):
        raise InputError(f"--k {args.k}: {path} has {len(f):,} rows only")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {args.out} cannot be made ({error.strerror})") from None
    listings = os.path.splitext(path)[0] + ".txt", os.path.join(os.path.dirname(path), "images.txt")
    own = os.path.join(args.out, "images.txt")         # of rows without a listing it must be that
    listing, names = next(filter(os.path.exists, (*listings, own)), listings[1]), []
    if os.path.exists(listing):
        names = read_listing(listing, len(f))
    if names and os.path.exists(own) and read_listing(own, len(f)) != names:
        raise InputError(f"{own} and {listing} name different images: give another --out")
    rank, groups = effective_rank(f[::math.ceil(len(f) / 10000)]), round(args.k ** 0.25)
    print(f"{path}: {len(f):,} x {len(f.mean)} of effective rank {rank:.1f}", flush=True)
    if groups ** 4 != args.k:
        print(f"{args.k} is not g^4 (1, 16, 81, 256, ...): no order, and sub-nets without images")
    C = learn_centroids(f, args.k, args.eps, args.temperature, args.epochs, args.lr,
                        seed=args.seed)
    if groups ** 4 == args.k:
        C = C[order_clusters(C, groups).argsort()]     # so that row i is the centroid of index i
    S = scores(f, C)
    clusters = S.argmax(1).numpy()
    U, _, error, _ = sinkhorn(S, args.eps, torch.zeros(args.k, dtype=torch.float64))
    sizes = np.bincount(clusters, minlength=args.k)
    report = {"k": args.k, "images": len(f), "sizes": sizes.tolist(), "eps": args.eps,
              "temperature": args.temperature, "epochs": args.epochs, "lr": args.lr,
              "seed": args.seed, "effective_rank": rank, "marginal_error": error,
              "objective": objective(U, S, args.eps), "command": " ".join(sys.argv),
              "torch": str(torch.__version__), "feature_mean": f.mean.tolist()}
    place = functools.partial(os.path.join, args.out)
    save(place("centroids.npy"), functools.partial(np.save, arr=C.numpy()))
    save(place("clusters.npy"), functools.partial(np.save, arr=clusters))
    save(place("clusters.json"), lambda file: file.write(json.dumps(report).encode()))
    print(f"sizes {sizes.min()}, median {np.median(sizes):.0f}, {sizes.max()}; marginal error "
          f"{error:.3f}; objective {report['objective']:.4f}; wrote {place('clusters.npy')}")
    if error > 0.01:
        print("warning: Sinkhorn did not reach a marginal error of 0.01: take a larger --eps")
    data = args.data or place("images")                # as the toy images lie
    if not names:
        print(f"no picture: there is no {listing} that names the images")
    elif not os.path.exists(os.path.join(data, names[0])):
        print(f"no picture: {data} lacks {names[0]}, which {listing} names: give --data")
    else:
        contact_sheet(S, clusters, names, data, place("clusters.png"))


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        run(args)
    except InputError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
