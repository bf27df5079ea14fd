"""lesson.py - the method in six figures, a paragraph each, from a finished quick-start run.

    python tests/lesson.py                             # runs/toy -> runs/toy/lesson/lesson.md
    python tests/lesson.py --run runs/toy3 --out page/

In:   <run>, what the quick start leaves there
Out:  <out>/lesson.md, and beside it lesson_1_views.png to lesson_6_scores.png

Needs matplotlib. Measured on one core of an AMD EPYC with AVX2, torch 2.14: a minute.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import entropy
from torchvision.utils import make_grid

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import cluster
import pretrain
import route
import sdrnet
import toy
try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None                                      # main says so

STYLES = dict(zip(toy.WORLDS, (("#12304f", "o", ""), ("#b5473c", "^", "//"),      # dark to light
                               ("#7db08f", "s", ".."), ("#f3d98b", "D", "xx"))))
ROUTED = ("result.json", "scores.npy", "test_scores.npy")              # what route.py leaves
# A function a figure: takes the run's folder, returns the figure and its paragraph, in which each
# number is computed. Its docstring is the heading.


def load_images(run):
    """All images of the run, uint8 (N, 3, 32, 32)."""
    return pretrain.decode_all(run / "images", sdrnet.load_names(run / "images.txt"), 32, 0)


def two_views(images, step):
    """SimSiam's two views of images, uint8 (B, 3, S, S), and the boxes that they are cut from."""
    u = pretrain.uniform_numbers(0, step, len(images)).unbind(1)
    boxes = [pretrain.crop_boxes(row, *images.shape[2:]) for row in u]
    crops = [pretrain.crop_batch(images, box, images.shape[2]) for box in boxes]
    return [pretrain.make_views(crop, row, 0) for crop, row in zip(crops, u)], boxes


def views(run, count=10):
    """What SimSiam is shown"""
    some = load_images(run)[::400][:count]
    both, boxes = two_views(some, 0)
    black, white = sdrnet.normalise(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    pictures = torch.cat([some / 255] + [(view - black) / (white - black) for view in both])
    axes = Figure((9, 2.9), layout="constrained").subplots()
    axes.imshow(make_grid(pictures.clamp(0, 1), count, pad_value=1).permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=(18, 52, 86), yticklabels=("image", "view 1", "view 2"))
    for box, line in zip(boxes, ("-", ":")):           # pictures lie 34 pixels apart
        for i, (y, x, height, width) in enumerate(box.tolist()):
            axes.indicate_inset((34 * i + x + 1.5, y + 1.5, width, height), alpha=1,
                                edgecolor="red", linestyle=line)
    area = torch.cat(boxes)[:, 2:].prod(1) / some[0, 0].numel()
    return axes.figure, f"""
Images of {some.shape[2]} px, and their two views: crops (solid, dotted) of {area.min():.0%} to
{area.max():.0%} of the area, each with its own colours, grey and flip. Each must predict the
other's features, `L = D(p_1, z_2)/2 + D(p_2, z_1)/2`, so these keep form, which both share. Try
`python pretrain.py --out runs/blur --blur 0.5`."""


def train_simsiam(images, with_predictor, steps=160, B=64):
    """SimSiam from scratch: (loss, std) of each step, an array (steps, 2)."""
    torch.manual_seed(0)
    model = pretrain.SDR(sdrnet.SDRNet("resnet18", width=8, groups=1), layers=2, width=128)
    if not with_predictor:
        model.predictor = torch.nn.Identity()
    optimizer, log = pretrain.make_optimizer(model, weight_decay=5e-4), []
    for step in range(steps):
        pretrain.set_lr(optimizer, 0.5, step, steps)
        x, _ = two_views(images[pretrain.uniform_batch(step, 0, len(images), B)], step)
        log.append(pretrain.train_step(model, optimizer, x, (), torch.device("cpu"), "off"))
    return np.array([(line["loss"], line["std"]) for line in log])


def collapse(run, B=64):
    """Collapse: SimSiam from scratch without its predictor"""
    images, least = load_images(run), 2 / B ** 0.5
    healthy, ill = (train_simsiam(images, with_predictor, B=B) for with_predictor in (True, False))
    columns = Figure((9, 3.4), layout="constrained").subplots(1, 2)
    for i, (axes, label) in enumerate(zip(columns, ("loss L", "std of unit z, times sqrt(d)"))):
        axes.plot(healthy[:, i], "-", color=STYLES["figures"][0], label="p = h(z)")
        axes.plot(ill[:, i], "--", color=STYLES["weaves"][0], label="p = z")
        axes.set(xlabel="step", ylabel=label)
    axes.axhline(least, color="black", linestyle=":", label="2 / sqrt(B)")
    axes.set_ylim(0)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    (loss, std), (ill_loss, ill_std) = healthy[-20:].mean(0), ill[-20:].mean(0)
    return axes.figure, f"""
{len(ill)} steps of {B} images, a small network, a high rate; means of the last 20. Without h
the loss is {ill_loss:.2f} against {loss:.2f}, and std {ill_std:.2f} against {std:.2f}: where all
features are alike `D(p, z) = -cos(p, sg(z))` is at its least. Do sub-nets collapse that enter all
at once, from scratch? Watch sub_std; try
`python pretrain.py --init none --phases 0,0,0,0,1 --clusters {run}/clusters.npy --out runs/c`.

**Why does std not fall to 0?** The projector ends in a BatchNorm: a batch's mean is 0. One
image against all others has 2 / sqrt(B) = {least:.2f}; here it came to {ill[:, 1].min():.2f}."""


def posterior(run, count=200):
    """Sinkhorn's posterior U, images sorted by cluster"""
    C, clusters = torch.from_numpy(np.load(run / "centroids.npy")), np.load(run / "clusters.npy")
    S = cluster.scores(cluster.load_features(run / "features.npy"), C)
    rows = np.argsort(clusters, kind="stable")[np.linspace(0, len(S) - 1, count).astype(int)]
    columns, sizes = Figure((9, 4), layout="constrained").subplots(1, 3), np.bincount(clusters)
    for axes, eps in zip(columns, (0.5, 0.05, 0.01)):
        U, _, error, rounds = cluster.sinkhorn(S, eps, torch.zeros(len(C), dtype=torch.float64))
        picture = axes.imshow(U[rows].numpy(), "Greys", vmin=0, vmax=1, aspect="auto",
                              interpolation="none")
        H = -torch.xlogy(U, U).sum(1).mean()
        axes.set_title(f"eps = {eps}: H = {H:.2f} nat\nmarginal error {error:.1%}")
        axes.set(xlabel="cluster", ylabel=f"{count} images, by cluster")
    axes.figure.colorbar(picture, ax=columns, label="U: share of an image")
    return axes.figure, f"""
U maximises `Tr(U^T S) + eps H(U)`, each cluster's mass being n/k. Large eps smears: the entropy H
of a row is log k = {np.log(len(C)):.2f} nat at most. Small eps assigns, and takes longer: {rounds}
rounds at eps = {eps}. Try
`python cluster.py --out runs/soft --features {run}/features.npy --eps 0.5`.

**U is balanced; why do clusters differ in size?** An image goes to its highest S, not U:
{sizes.min()} to {sizes.max()} images, n/k = {sizes.mean():.0f}."""


def worlds(run):
    """What the clusters hold"""
    names, clusters = sdrnet.load_names(run / "images.txt"), np.load(run / "clusters.npy")
    seed = int(names[0].removeprefix("seed").split("_")[0])
    world = [list(STYLES).index(name) for name, _ in toy.pool_kinds(seed, len(names))]
    table = np.zeros((clusters.max() + 1, 4))
    np.add.at(table, (clusters, world), 1)
    axes = Figure((9, 3.6), layout="constrained").subplots()
    for w, (name, (colour, _, hatch)) in enumerate(STYLES.items()):
        axes.bar(range(len(table)), table[:, w], bottom=table[:, :w].sum(1), color=colour,
                 hatch=hatch, edgecolor="black", label=name)
    axes.set(xlabel="cluster, and its sub-net", ylabel="images", xticks=range(len(table)))
    axes.figure.legend(loc="outside right center", reverse=True)
    purity, p = table.max(1) / table.sum(1), table / table.sum()
    bits = entropy(p.sum(0), base=2) + entropy(p.sum(1), base=2) - entropy(p.ravel(), base=2)
    return axes.figure, f"""
`D_0 = D_1 + ... + D_k`, disjoint, and D_i trains sub-net i. Found without labels, a cluster tells
{bits:.2f} of the {entropy(p.sum(0), base=2):.0f} bits of an image's world, and {p.max(1).sum():.0%}
of the images are of their cluster's commonest world, {p.sum(0).max():.0%} by chance. Try
`python cluster.py --out runs/few --features {run}/features.npy --epochs 1`.

**Which cluster is the most of one world?** {purity.argmax()}: {purity.max():.0%}."""


def features(run):
    """Features before and after, along two principal directions"""
    simsiam, sdr = (sdrnet.load_network(run / name) for name in ("simsiam.pt", "sdrnet.pt"))
    torch.manual_seed(0)
    random, pixels = sdrnet.SDRNet(**simsiam.config), load_images(run)[:1024] / 255
    sdrnet.recalibrate_bn(random, lambda prefix: [sdrnet.normalise(pixels)], prefixes=False)
    tasks = [route.open_task(str(run / "tasks" / world), 32) for world in STYLES]
    world = torch.cat([torch.full((len(task.test),), w) for w, task in enumerate(tasks)])
    columns = Figure((9, 4), layout="constrained").subplots(1, 3)
    for axes, net, name in zip(columns, (random, simsiam, sdr), ("random", "SimSiam", "SDR's W_0")):
        parts = [route.task_features(net, task, torch.device("cpu")) for task in tasks]
        right = np.mean([route.knn_accuracy(*part, task)[1] for part, task in zip(parts, tasks)])
        f = torch.nn.functional.normalize(torch.cat([test for _, test in parts]))
        across = route.measure(route.knn(f, world), world, "top-1")
        _, size, directions = torch.linalg.svd(f - f.mean(0), full_matrices=False)
        plane, share = (f - f.mean(0)) @ directions[:2].T, size ** 2 / size.square().sum()
        for w, (label, (colour, marker, _)) in enumerate(STYLES.items()):
            axes.scatter(*plane[world == w][::4].T.numpy(), s=16, color=colour, marker=marker,
                         label=label, edgecolor="black", linewidth=0.4)
        axes.set_title(f"{name}: kNN of class\n{right:.1f} %, of world {across:.1f} %")
        axes.set(xlabel=f"1st, {share[0]:.0%} of variance", ylabel=f"2nd, {share[1]:.0%}")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    part, whole = (sum(p.numel() for p in sdr.extract(path).parameters())
                   for path in ((0, 0, 0, 0), None))
    return axes.figure, f"""
{len(f):,} test images of {len(tasks)} tasks, a quarter of them shown. kNN, in all {len(f[0])}
dimensions, finds the class within a task, and the world among all. SimSiam is `L_ssl(D_0; W_0)`;
SDR, which trains on from it for half as many epochs, adds the mean over sub-nets of
`L_ssl(D_i; W_i) + lambda KD_i`. What do more epochs alone do? Compare it with
`python pretrain.py --out runs/more --init {run}/simsiam.pt --epochs 10`. Try
`python sdrnet.py {run}/sdrnet.pt {run}/tasks/signs/test signs.npy --path 0,1,1,0`.

**How large is a sub-net beside W_0?** {part / whole:.0%}: {part:,} weights and {whole:,}."""


def scores(run):
    """All sub-nets on each task, and the routed one"""
    table, gains, better = Figure((9, 6), layout="constrained").subplots(2, 2), [], []
    for axes, world in zip(table.flat, STYLES):
        x, y = (np.load(run / world / f"{part}.npy") for part in ("scores", "test_scores"))
        result = json.loads((run / world / "result.json").read_text())
        chosen, largest = result["chosen"], result["largest"]["test"]
        axes.scatter(x, y, color="#7db08f", edgecolor="black", label="sub-net")
        axes.scatter(chosen["score"], chosen["test"], s=250, color="#b5473c", marker="*",
                     edgecolor="black", label="routed")
        axes.axhline(largest, color="black", linestyle="--", label="largest network, W_0")
        axes.set_title(f"{world}: correlation {np.corrcoef(x, y)[0, 1]:.2f}")
        gains.append((chosen["test"] - y.mean(), chosen["test"] - largest))
        better.append(f"{world} {(y > largest).sum()}")
    axes.figure.supxlabel("leave-one-out kNN on the task's training images, %")
    axes.figure.supylabel("kNN on its test images, %")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    over_mean, over_largest = np.mean(gains, axis=0)
    return axes.figure, f"""
A task goes to the sub-net of the best leave-one-out score, `i = argmax_i kNN(W_i)`; test images
never choose. On those it gains {over_mean:+.1f} points over the sub-nets' mean and
{over_largest:+.1f} over W_0, on average of {len(gains)} tasks. Where score and accuracy hardly
correlate, as where clusters do not matter to a task, the choice is a matter of luck. Try
`python route.py --out runs/five --network {run}/sdrnet.pt --k 5`.

**How many of {len(x)} sub-nets beat W_0 on the test images?** {", ".join(better)}."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, default="runs/toy", help="a finished run: runs/toy")
    parser.add_argument("--out", type=Path, help="<run>/lesson")
    args = parser.parse_args()
    args.out = args.out or args.run / "lesson"
    page = f"""# The method in six figures

By `python {' '.join(sys.argv)}`, of toy images of four worlds. W_0 is the largest network,
W_i sub-net i; f is a network's features, z = projector(f), p = h(z) what the predictor h makes of
it; through sg(z) no gradient flows; q is the predictor from a sub-net's z to W_0's. B images are a
batch.
"""
    for name in ("images.txt", "features.npy", "simsiam.pt", "clusters.npy", "centroids.npy",
                 "sdrnet.pt", *(f"{world}/{part}" for world in STYLES for part in ROUTED)):
        if not (args.run / name).exists():
            parser.error(f"{args.run / name} is not there: finish the README's quick start first")
    for world in STYLES:
        if "chosen" not in json.loads((args.run / world / "result.json").read_text()):
            parser.error(f"{args.run / world} is of a network without sub-nets: python route.py")
    if Figure is None:
        parser.error("matplotlib is not there: pip install matplotlib")
    torch.set_num_threads(1)
    try:
        sdrnet.make_folder(args.out)
        for i, make in enumerate((views, collapse, posterior, worlds, features, scores), 1):
            figure, text = make(args.run)
            name = f"lesson_{i}_{make.__name__}.png"
            figure.savefig(args.out / name, dpi=100)
            page += f"\n## {i}. {make.__doc__}\n\n![{make.__doc__}]({name})\n{text}\n"
            print(f"wrote {args.out / name}", flush=True)
    except (sdrnet.InputError, cluster.InputError) as error:
        parser.error(" ".join(str(error).split()))
    (args.out / "lesson.md").write_text(page)


if __name__ == "__main__":
    main()
