"""detect_voc.py - does the routed sub-net detect better? Faster R-CNN, from any backbone of this project, on PASCAL VOC.

    python detect_voc.py                                                    # toy scenes, from the sub-net in runs/toy
    python detect_voc.py --backbone random --out runs/toy-random            # the same from random weights
    python detect_voc.py --voc VOCdevkit --backbone subnet.pt --out runs/voc                    # published protocol
    torchrun --nproc_per_node 8 detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --path 0,2,1,3 --out runs/voc
    python detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --scores scores.npy --best 8 --out runs/voc
    python detect_voc.py --voc mine --train-sets train --test-sets val --classes found --short-side 192 --test-side 192

In the paper's terms (SDR, AAAI 2022, "deployment"): the backbone is one sub-net W_i; it is fine-tuned as the backbone
of a detector, and which of several is chosen by early stopping: --candidates, or the --best of route.py's scores.npy,
all train briefly, the better half goes on, until one is left. They are judged on training images set aside
(--holdout), never on the test set; the last one goes on with all training images.

Form c4 (MoCo's and SimSiam's protocol): stages 1-3 find proposals, stage 4 is the box head, an extra BatchNorm after it.
Form fpn: a feature pyramid over the stages. Nothing is frozen; BatchNorm is over all processes. On VOC the published
schedule: 07+12 trainval to 07 test, 24,000 iterations of 16 images, lr 0.02 (a tenth after 18,000 and 22,000), short
side 480-800, test at 800. For another --batch B the linear rule holds: lr x B/16, iterations x 16/B.
Known differences to that protocol's own code: objects marked difficult are not trained on (there they are);
smooth L1 has torchvision's beta of 1/9 (there 0); weight decay leaves BatchNorm and biases alone (there biases decay).

Every result is given by three rules, since evaluators differ:
    COCO            precision at 101 recalls; a detection takes the best object that is still free
    VOC 11-point    precision at 11 recalls; VOC2007's own rule, and that of the tables of MoCo and SimSiam
    VOC area        area under the envelope; VOC since 2010
each as AP (mean over IoU 0.50:0.95), AP50 and AP75. Difficult objects are ignored by all of them.

In:  --voc  a folder with VOC2007/, VOC2012/ ..., or itself with JPEGImages/, Annotations/, ImageSets/Main/
Out: <out>/metrics.json      all figures, per class too, and the whole protocol
     <out>/detections.png    test images: ground truth left, detections right
     <out>/detector.pt       weights and configuration: load_detector(path) rebuilds it
     <out>/halving.json      with candidates: the table of each halving
     <out>/detector.last.pt  to continue from (and detector.prev.pt, the one before); detector.log.jsonl: each step

Measured: without arguments, from the toy tasks' routed sub-net, in 2:27 minutes on two CPU cores (AMD EPYC with bf16
units, torch 2.15): AP 64.2, AP50 84.6 by COCO's rule, 82.8 and 84.7 by VOC's two.
"""
import collections
import glob
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, RoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.utils import draw_bounding_boxes, make_grid

import sdrnet
from pretrain import (CORES, MEAN, STD, TINY, VOC_CLASSES, Log, Parser, Plan, Signals, Stopped, agree, autocast, clock, common_options, due, keep,
                      load_array, number, parallel, rank, restarted, resume, rgb, run, same_run, save_json, say, start, tell, training_options)
from sdrnet import InputError, OwnError, ResNet, SDRNet, world_size

# Boxes are [x1, y1, x2, y2], float, continuous and from 0, so that a box's width is x2 - x1. VOC's files count pixels
# from 1 and include both ends: [x1 + 1, y1 + 1, x2, y2] there.

# ---------------------------------------------------------------------------- average precision

IOUS, RECALLS, COCO_LIMIT = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101), 100


def overlaps(a, b, pixel):
    """Intersection over union of boxes a (n, 4) with b (n, G, 4): float64 (n, G). The width of a box is
    x2 - x1 + pixel: pixel is 1 by VOC's rule, for inclusive pixel numbers, and 0 by COCO's."""
    a = a[:, None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + pixel
    inter = np.clip(sides, 0, None).prod(-1)
    area = lambda box: (box[..., 2:] - box[..., :2] + pixel).prod(-1)
    return inter / (area(a) + area(b) - inter)


def match_voc(iou, row, hard, turn):
    """VOC's rule. iou (n, G): of each detection, highest score first, with the objects of its image (-1: no object);
    row (n,): its image; hard (n, G): difficult; turn (n,): its rank by score within its image.
    Returns int8 (n, 10): 1 true, 0 false, -1 does not count, at each IoU.

    A detection belongs to the object that it overlaps most (the first, if equal), found already or not. Below the
    threshold it is false; on a difficult object it does not count; an object's first one is true, the others false."""
    best = iou.argmax(1)[:, None]
    top, ignored = (np.take_along_axis(x, best, 1)[:, 0] for x in (iou, hard))
    status = np.zeros((len(iou), len(IOUS)), np.int8)
    for t, threshold in enumerate(IOUS):
        status[(top >= threshold) & ignored, t] = -1
        hits = np.flatnonzero((top >= threshold) & ~ignored)
        _, first = np.unique(row[hits] * iou.shape[1] + best[hits, 0], return_index=True)
        status[hits[first], t] = 1
    return status


def match_coco(iou, row, hard, turn):
    """COCO's rule; arguments and result as in match_voc.

    A detection takes, of the objects still free that it overlaps enough, the one that it overlaps most (the last, if
    equal); a difficult one only if there is no other, and then it does not count. Nor do detections beyond the 100
    best of an image and class. First every image's best detection chooses, then every second best, and so on."""
    wish = np.empty(iou.shape, np.int64)               # (n, G): place of each object in a detection's order of liking
    np.put_along_axis(wish, np.lexsort((iou, ~hard), axis=1), np.arange(iou.shape[1])[None], 1)
    status = np.where(turn[:, None] < COCO_LIMIT, 0, -1) * np.ones(len(IOUS), np.int8)
    free = np.ones((row.max(initial=0) + 1, len(IOUS), iou.shape[1]), bool)
    near = iou.max(1) >= IOUS[0]                       # all others are false at every threshold
    for k in range(min(COCO_LIMIT, turn.max(initial=-1) + 1)):
        i = np.flatnonzero((turn == k) & near)
        value = np.where(free[row[i]] & (iou[i, None] >= IOUS[:, None]), wish[i, None], -1)        # (n, 10, G)
        d, t = np.nonzero(value.max(-1) >= 0)
        taken = value.argmax(-1)[d, t]
        free[row[i[d]], t, taken] = False
        status[i[d], t] = np.where(hard[i[d], taken], -1, 1)
    return status


def curve(status):
    """True positives so far, and the highest precision from here on: int (n,), float (n,), over what counts."""
    tp = np.cumsum(status[status >= 0], dtype=np.int64)
    return tp, np.maximum.accumulate((tp / np.arange(1, len(tp) + 1))[::-1])[::-1]


def ap_coco(status, count):
    """Mean over 101 recalls of the highest precision at that recall or beyond. count: objects to be found."""
    tp, best = curve(status)
    return np.r_[best, 0.0][np.searchsorted(tp / count, RECALLS)].mean()


def ap_eleven(status, count):
    """VOC2007: the same at the recalls 0, 0.1 ... 1. In whole numbers, since 3 of 10 IS a recall of 0.3, and in floats
    3 * 0.1 is more."""
    tp, best = curve(status)
    return np.r_[best, 0.0][np.searchsorted(10 * tp, np.arange(11) * count)].mean()


def ap_area(status, count):
    """VOC since 2010: the area under that envelope over recall."""
    tp, best = curve(status)
    return (best * np.diff(tp, prepend=0)).sum() / count


RULES = {"coco": (match_coco, ap_coco, 0), "voc_11_point": (match_voc, ap_eleven, 1), "voc_area": (match_voc, ap_area, 1)}


def ranks(groups):
    """int (n,) -> int (n,): how many earlier entries are of the same group."""
    order = np.argsort(groups, kind="stable")
    _, starts, held = np.unique(groups[order], return_index=True, return_counts=True)
    places = np.empty(len(groups), np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(starts, held)
    return places


def evaluate(truth, found, classes):
    """Average precision by all three rules.

    truth: dict of arrays image int (n,), label int (n,) in 0 .. classes - 1, box float (n, 4), difficult bool (n,)
    found: dict of arrays image int (m,), label int (m,), box float (m, 4), score float (m,); of equal scores, the one
           of the lower image counts first, then the one given first
    Returns {rule: float64 (classes, 10)}: AP of each class at each IoU; NaN for a class without objects to find."""
    order = np.lexsort((found["image"], -found["score"]))              # stable
    found = {k: v[order] for k, v in found.items()}
    table = {rule: np.full((classes, len(IOUS)), np.nan) for rule in RULES}
    for c in range(classes):
        t, d = truth["label"] == c, found["label"] == c
        count = int((~truth["difficult"][t]).sum())
        if count == 0:
            continue
        images, row = np.unique(truth["image"][t], return_inverse=True)
        place = ranks(row)
        boxes = np.full((len(images) + 1, place.max() + 1, 4), np.nan)                 # (images, G, 4); the last row: other images
        hard = np.zeros(boxes.shape[:2], bool)
        boxes[row, place], hard[row, place] = truth["box"][t], truth["difficult"][t]
        at, turn = np.searchsorted(images, found["image"][d]), ranks(found["image"][d])
        at[np.r_[images, -1][at] != found["image"][d]] = len(images)
        iou = {pixel: np.nan_to_num(overlaps(found["box"][d] + [pixel, pixel, 0, 0], boxes[at] + [pixel, pixel, 0, 0], pixel), nan=-1.0) for pixel in (0, 1)}
        Signals.poll()
        for rule, (match, ap, pixel) in RULES.items():
            status = match(iou[pixel], at, hard[at], turn)
            table[rule][c] = [ap(status[:, k], count) for k in range(len(IOUS))]
    return table


def summary(table, classes):
    """{rule: {AP, AP50, AP75, per_class: {name: {AP, AP50}}}} in percent, from `evaluate`'s table and the classes'
    names; means over the classes that have objects, None where there are none."""
    percent = lambda x: None if np.isnan(x).all() else round(100 * float(np.nanmean(x)), 3)
    return {rule: {"AP": percent(t), "AP50": percent(t[:, 0]), "AP75": percent(t[:, 5]),
                   "per_class": {name: {"AP": percent(t[c]), "AP50": percent(t[c, 0])} for c, name in enumerate(classes)}}
            for rule, t in table.items()}


# ---------------------------------------------------------------------------- scenes: images with boxes

class Scenes:
    """Images with their objects. names: file of each; open_image(i) -> PIL image; size: its (width, height); classes:
    names; objects: for each image its boxes float64 (k, 4), labels int64 (k,) into classes, difficult bool (k,)."""

    def __init__(self, names, open_image, size, objects, classes):
        self.names, self.open_image, self.size, self.objects, self.classes = names, open_image, size, objects, classes

    def __len__(self):
        return len(self.names)

    def truth(self):
        """All objects as flat arrays, for `evaluate`."""
        box, label, difficult = (np.concatenate(column) for column in zip(*self.objects))
        return {"image": np.repeat(np.arange(len(self)), [len(o[0]) for o in self.objects]), "label": label, "box": box, "difficult": difficult}

    def usable(self):
        """Images with an object that is not difficult: those that one can train on."""
        return np.array([i for i, (_, _, difficult) in enumerate(self.objects) if not difficult.all()], int)

    def subset(self, kept):
        pick = lambda values: [values[i] for i in kept]
        return Scenes(pick(self.names), lambda i: self.open_image(kept[i]), pick(self.size), pick(self.objects), self.classes)

    def decode(self, i):
        """Image i in RGB. Raises InputError with its name if it cannot be read or is not what its annotation says."""
        try:
            image = rgb(self.open_image(i), turn=False)                # boxes are in the file's own pixels
            if image.size != tuple(self.size[i]):
                raise ValueError("it is {}x{}, its annotation says {}x{}".format(*image.size, *self.size[i]))
            return image
        except Exception as problem:                   # PIL raises nearly anything on a damaged file
            raise OwnError(f"image {self.names[i]} cannot be read ({type(problem).__name__}: {problem}); mend or remove it") from None

    def example(self, i, side, longest, flip=False):
        """Image i, its short side scaled to `side` but the long one at most to `longest`, mirrored if asked:
        uint8 (3, H, W), and its boxes (k, 4) there."""
        image = self.decode(i)
        scale = min(side / min(image.size), longest / max(image.size))
        width, height = (max(1, round(s * scale)) for s in image.size)
        boxes = self.objects[i][0] * np.array([width, height, width, height]) / [*image.size, *image.size]
        pixels = np.asarray(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR))
        if flip:
            pixels, boxes = pixels[:, ::-1], np.array([width, 0, width, 0]) - boxes[:, [2, 1, 0, 3]] * [1, -1, 1, -1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), boxes


TOY_SIDE, TOY_AREAS = 96, {"disc": 3.14, "ring": 2.30, "square": 2.56, "triangle": 1.57, "star": 1.39}    # of radius 1
TOY_CLASSES = list(TOY_AREAS)


def toy_outline(kind, x, y):
    """Signed distance (negative inside) from a figure of radius 1, at the points x, y."""
    r = np.hypot(x, y)
    if kind in ("disc", "ring"):
        return r - 1 if kind == "disc" else np.abs(r - 0.76) - 0.24
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if kind == "triangle":
        return np.max([x * np.cos(a) + y * np.sin(a) for a in (math.pi / 3, math.pi, -math.pi / 3)], 0) - 0.55
    a = np.abs((np.arctan2(y, x) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)     # one of ten equal wedges
    edge = np.array([0.45 * math.cos(math.pi / 5) - 1.05, 0.45 * math.sin(math.pi / 5)])           # from tip to notch
    return ((r * np.cos(a) - 1.05) * edge[1] - r * np.sin(a) * edge[0]) / np.hypot(*edge)


def toy_scene(index, seed, side=TOY_SIDE):
    """One scene, a function of (seed, index): uint8 (side, side, 3), (boxes (k, 4), labels (k,), difficult (k,)).

    One to five turned, outlined, shaded figures on a ground of waves with noise. They may overlap and leave the frame
    a little; the box is tight around what is visible, and what is less than half visible is difficult."""
    rng = np.random.default_rng([seed, 4, index])
    y, x = (np.mgrid[:side, :side] + 0.5) * (TOY_SIDE / side)
    wave = sum(np.sin((x * np.cos(a) + y * np.sin(a)) * f + p) for a, f, p in rng.uniform((0, 0.05, 0), (math.pi, 0.45, 6.3), (3, 3)))
    image = rng.uniform(0.25, 0.75, 3) + rng.uniform(-0.09, 0.09, 3) * wave[..., None] + rng.normal(0, 0.035, (side, side, 3))
    cover = lambda distance, soft=1.0: np.clip(0.5 - distance / soft, 0, 1)[..., None]
    figures, owner = [], np.full((side, side), -1)
    for _ in range(rng.integers(1, 6)):
        for _ in range(10):                            # a place that is free enough, or none
            radius = rng.uniform(9, 21)
            cx, cy = rng.uniform(radius * 0.1, TOY_SIDE - radius * 0.1, 2)
            if all(math.hypot(cx - f[0], cy - f[1]) > 0.6 * (radius + f[2]) for f in figures):
                break
        else:
            continue
        label, turn, hue = rng.integers(len(TOY_CLASSES)), rng.uniform(0, 2 * math.pi), rng.uniform(0, 6)
        u, v = (x - cx) / radius, (y - cy) / radius
        u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        d = toy_outline(TOY_CLASSES[label], u, v) * radius             # in pixels
        colour = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) * rng.uniform(0.6, 0.9) + rng.uniform(0.0, 0.25)
        line, colour = colour * rng.uniform(0.15, 0.35), colour * (1.1 - 0.15 * (y - cy)[..., None] / radius)
        image = image * (1 - 0.45 * cover(np.pad(d, ((2, 0), (2, 0)), mode="edge")[:side, :side], 6.0))            # shadow
        image = image + cover(d) * (line - image)
        image = image + cover(d + 1.6) * (colour - image)
        figures.append((cx, cy, radius, label))
        owner[d < 0] = len(figures) - 1
    seen = [(k, np.nonzero(owner == k)) for k in range(len(figures)) if (owner == k).any()]
    boxes = np.array([[c.min(), r.min(), c.max() + 1, r.max() + 1] for _, (r, c) in seen], float).reshape(-1, 4)
    hidden = [len(r) < 0.5 * TOY_AREAS[TOY_CLASSES[figures[k][3]]] * (figures[k][2] * side / TOY_SIDE) ** 2 for k, (r, _) in seen]
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), (boxes, np.array([figures[k][3] for k, _ in seen], np.int64), np.array(hidden, bool))


def toy_scenes(count, seed, start=0):
    """Scenes start .. start + count - 1, held in memory."""
    pixels, objects = zip(*(toy_scene(start + i, seed) for i in range(count)))
    return Scenes([f"toy{start + i}" for i in range(count)], lambda i: Image.fromarray(pixels[i]), [(TOY_SIDE, TOY_SIDE)] * count, objects, TOY_CLASSES)


class PlainTree(ElementTree.TreeBuilder):
    """Builds the tree of an XML file that declares no document type, so that there are no entities to expand."""

    def doctype(self, name, public, system):
        raise InputError("it declares a document type; annotations need none, and entities may expand without end")


def plain_name(name):
    """A file name that cannot leave its folder."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise InputError(f"{name!r} is not a plain file name")
    return name


def read_annotation(file, images, classes=None):
    """One annotation in VOC's XML -> (image file, (width, height), boxes, names of classes, difficult). classes: those
    allowed. Raises InputError with the file's name for everything that is wrong in it."""
    try:
        root = ElementTree.parse(file, ElementTree.XMLParser(target=PlainTree())).getroot()
        text = lambda node, path: (node.findtext(path) or "").strip()
        image = os.path.join(images, plain_name(text(root, "filename")))
        if not os.path.isfile(image):
            raise InputError(f"it names {os.path.basename(image)}, and there is no such image in {images}")
        size = tuple(int(float(text(root, f"size/{k}") or 0)) for k in ("width", "height"))
        if min(size) <= 0:                             # some tools leave it out
            with Image.open(image) as picture:
                size = picture.size
        boxes, words, difficult = [], [], []
        for thing in root.iter("object"):
            x1, y1, x2, y2 = box = [float(text(thing, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
            if not (x1 <= x2 and y1 <= y2):            # inclusive pixels: x1 == x2 is one pixel wide
                raise InputError(f"box {box} has no area")
            if not (0 <= x1 <= size[0] and 0 <= y1 <= size[1] and 1 <= x2 <= size[0] + 1 and 1 <= y2 <= size[1] + 1):      # a tool that counts from 0 is off by one
                raise InputError(f"box {box} is outside its image of {size[0]}x{size[1]}")
            words.append(text(thing, "name"))
            if classes is not None and words[-1] not in classes:
                raise InputError(f"class {words[-1]!r} is not among {', '.join(classes)}: with --classes found those of the training images, else those named by --classes")
            boxes.append([max(x1, 1) - 1, max(y1, 1) - 1, min(x2, size[0]), min(y2, size[1])])
            difficult.append(text(thing, "difficult") == "1")
        return image, size, np.array(boxes, float).reshape(-1, 4), words, np.array(difficult, bool)
    except FileNotFoundError:
        raise InputError(f"annotation {file}: no such file, though ImageSets lists it") from None
    except Exception as error:                         # unknown encodings, numbers too large, images that PIL cannot open
        raise InputError(f"annotation {file}: {error}") from None


def voc_scenes(devkit, sets, classes):
    """The images of "2007:trainval,2012:trainval", joined. sets: YEAR:SPLIT, FOLDER:SPLIT, or SPLIT alone where devkit
    itself holds JPEGImages. classes: their names, or None for those that occur. Raises InputError."""
    names, sizes, things, shown = [], [], [], time.time()
    for part in sets.split(","):
        year, _, split = part.strip().rpartition(":")
        plain_name(split), plain_name(year or "VOC")
        folder = os.path.join(devkit, f"VOC{year}" if os.path.isdir(os.path.join(devkit, f"VOC{year}")) else year)
        listing = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
        if not os.path.isfile(listing):
            there = sorted(glob.glob(os.path.join(glob.escape(devkit), "*", "ImageSets", "Main", "[!_]*.txt")), key=lambda f: ("_" in os.path.basename(f), f))[:6]
            named = [f"{f.split(os.sep)[-4].removeprefix('VOC')}:{os.path.basename(f)[:-4]}" for f in there]
            raise InputError(f"no {listing}: --train-sets and --test-sets name splits of --voc, " + (f"such as {', '.join(named)}" if named else "which holds no VOC folder"))
        with open(listing, errors="replace") as file:
            ids = [line.split()[0] for line in file if line.strip()]
        if not ids:
            raise InputError(f"{listing} is empty")
        for i, name in enumerate(ids):
            image, size, *found = read_annotation(os.path.join(folder, "Annotations", f"{plain_name(name)}.xml"), os.path.join(folder, "JPEGImages"), classes)
            names.append(image), sizes.append(size), things.append(found)
            Signals.poll()
            shown = tell(f"annotations of {part}: {i:,} of {len(ids):,}", shown)
    twice = [name for name, n in collections.Counter(names).items() if n > 1]
    if twice:
        raise InputError(f"{sets} lists {twice[0]} more than once")
    classes = list(classes or sorted({w for _, words, _ in things for w in words}))
    scenes = Scenes(names, lambda i: Image.open(names[i]), sizes, [(b, np.array([classes.index(w) for w in words], np.int64), d) for b, words, d in things], classes)
    if len(scenes.usable()) == 0:
        raise InputError(f"{sets} in {devkit}: {len(scenes)} images, none with an object to find (difficult ones do not count)")
    return scenes


def download(devkit, sets):
    """Lets torchvision fetch the sets into a folder that must be called VOCdevkit."""
    for part in sets.split(","):
        root, name = os.path.split(os.path.abspath(devkit))
        year, _, split = part.strip().rpartition(":")
        try:
            if name != "VOCdevkit":
                raise ValueError("--voc must end in VOCdevkit, as torchvision calls that folder")
            torchvision.datasets.VOCDetection(root, year=year, image_set=split, download=True)
        except (ValueError, RuntimeError, OSError) as reason:
            raise OwnError(f"--download of {part}: {reason}") from None


def open_scenes(args):
    """(training scenes, test scenes) that the arguments name."""
    if args.voc is None:
        return toy_scenes(args.scenes, args.seed), toy_scenes(args.test_scenes, args.seed, 1_000_000)
    if args.download:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            download(args.voc, f"{args.train_sets},{args.test_sets}")
        if world_size() > 1:
            dist.barrier()
    if not os.path.isdir(args.voc):
        raise InputError(f"no folder {args.voc}: name the VOCdevkit folder with --voc; --download lets torchvision fetch it")
    train = voc_scenes(args.voc, args.train_sets, {"voc": VOC_CLASSES, "found": None}.get(args.classes, args.classes.split(",")))
    test = voc_scenes(args.voc, args.test_sets, train.classes)
    both = len(set(train.names) & set(test.names))
    if both:
        say(f"warning: {both} of the {len(test)} test images are training images too")
    return train, test


# ---------------------------------------------------------------------------- backbone

class Norm(nn.BatchNorm2d):
    """BatchNorm over all processes, with torch's state dict. momentum None: running values are plain averages."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var = sdrnet.SyncedNorm.apply(self.eps, x, self.weight, self.bias)
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)
        return y


def resnet(config):
    """sdrnet.py's ResNet of this shape (arch, widths, stem, small_stem), random weights, its BatchNorm over all processes."""
    return ResNet(**config, norm=lambda channels, stage=None: Norm(channels))


def shape_of(weights):
    """The shape of the ResNet that a state dict under torchvision's names belongs to. Raises InputError, KeyError."""
    depths = tuple(len({k.split(".")[1] for k in weights if k.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in weights
    arch = next((a for a, shape in sdrnet.ARCHS.items() if shape == (bottleneck, depths)), "resnet50" if bottleneck else "resnet18")
    return {"arch": arch, "widths": [len(weights[f"layer{s}.0.conv1.weight"]) for s in (1, 2, 3, 4)], "stem": len(weights["conv1.weight"]),
            "small_stem": weights["conv1.weight"].shape[-1] == 3, "depths": list(depths)}


def read_backbone(source, path=None):
    """The state dict under torchvision's names of a subnet.pt; a simsiam.pt; an sdrnet.pt with a path ("0,2,1,3", or None:
    its largest network); or a torchvision ResNet's own. Raises InputError."""
    try:
        content = sdrnet.load(source)
    except InputError as error:                        # not a file of this project: torchvision's, perhaps
        try:
            if path is not None:
                raise ValueError("it has no paths")
            weights = {k: v for k, v in sdrnet.read(source).items() if not k.startswith("fc.")}
            return {**{k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in weights if "running_mean" in k}, **weights}     # old files lack these
        except Exception:
            raise error from None
    if path is not None and content["kind"] != "sdrnet":
        raise InputError(f"--path {path}: {source} is a {content['kind']}, which has no paths")
    net = sdrnet.network(content, source)
    try:
        return (net.extract(None if path is None else [int(d) for d in path.split(",")]) if isinstance(net, SDRNet) else net).state_dict()
    except ValueError as error:                        # int's; InputError is one too
        raise InputError(f"--path {path} of {source}: {error if isinstance(error, InputError) else 'four digits as in 0,2,1,3 are needed'}") from None


def load_backbone(source, path=None, scratch=False, toy=False):
    """(network, shape, a line that says what was loaded): every tensor of it, or InputError. scratch: the shape alone.
    source "random": a small network for toy scenes, else a ResNet-50."""
    shape = dict(arch="resnet18", widths=[16, 32, 64, 128], stem=16, small_stem=False) if toy else dict(arch="resnet50", widths=[64, 128, 256, 512], stem=64, small_stem=False)
    weights = None
    try:
        if source != "random":
            weights = read_backbone(source, path)
            shape = shape_of(weights)
        elif path is not None:
            raise InputError(f"--path {path} of {source}: only an sdrnet.pt has paths")
        net = resnet(shape)
        if weights and scratch:                        # which channels the first shortcut of a narrow ResNet-18 takes is shape
            net.load_state_dict({k: v for k, v in weights.items() if k == "layer1.0.downsample.0.weight" and v.unique().tolist() == [0, 1]}, strict=False)
        elif weights:
            if not all(bool(torch.isfinite(v).all()) for v in weights.values()):
                raise InputError("not all its weights are finite")
            net.load_state_dict(weights)               # strict: none is missing, none is left over
    except (InputError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(str(error) if str(source) in str(error) else f"{source} does not fit: {' '.join(str(error).split())[:200]}") from None
    loaded = len(weights) if weights and not scratch else 0
    total = len(net.state_dict())
    return net, shape, (f"backbone {source}{f' path {path}' if path else ''}: {shape['arch']}, widths {shape['widths']}, {sum(p.numel() for p in net.parameters()):,} parameters; "
                        f"loaded {loaded} of {total} tensors{', BatchNorm statistics included' if loaded else ': RANDOM weights'}")


# ---------------------------------------------------------------------------- detector

class Trunk(nn.Module):
    """Stem and stages of a ResNet as maps by name, {"0": that of the first of `stages`, ...}, or a pyramid over them."""

    def __init__(self, net, stages, channels, pyramid=None):
        super().__init__()
        self.net, self.stages, self.out_channels, self.pyramid = net, stages, channels, pyramid

    def forward(self, x):                              # (B, 3, H, W)
        x, maps = self.net.maxpool(F.relu(self.net.bn1(self.net.conv1(x)))), collections.OrderedDict()
        for s in range(1, self.stages[-1] + 1):
            x = getattr(self.net, f"layer{s}")(x)
            if s in self.stages:
                maps[str(len(maps))] = x               # (B, C_s, H / stride, W / stride)
        return maps if self.pyramid is None else self.pyramid(maps)


class Crop(RoIAlign):
    """Form c4's RoIAlign, on its one map."""

    def forward(self, features, proposals, shapes):    # -> (rois, C, size, size)
        return super().forward(features["0"], proposals)


class Anchors(AnchorGenerator):
    """torchvision's, in fp32 whatever the maps are in: bf16 would round corners beyond 512 to multiples of 4."""

    def forward(self, images, maps):
        return super().forward(images, [m.new_empty((), dtype=torch.float32).expand(m.shape) for m in maps])


def in_fp32(module):
    """Lets a module give its outputs in fp32 under autocast: so are then the losses and boxes made of them."""
    module.register_forward_hook(lambda module, inputs, outputs: tuple([t.float() for t in o] if isinstance(o, list) else o.float() for o in outputs))
    return module


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of positives and negatives, as a function of `key` = (seed, step) and of each image's
    position in the global batch, `first` being that of the first image here."""
    key, first = (0, 0), 0

    def __call__(self, matched):
        chosen = []
        for i, labels in enumerate(matched):
            torch.manual_seed(int(np.random.SeedSequence([*self.key, self.first + i, self.batch_size_per_image]).generate_state(1)[0]))
            chosen.append(super().__call__([labels]))
        return [p for (p,), _ in chosen], [n for _, (n,) in chosen]


def memory_format(device):
    """channels_last, but not on the CPU: there the backward pass of a strided 1x1 convolution of fewer than 16 channels,
    such as a narrow sub-net's shortcut, writes beyond its memory (uxlfoundation/oneDNN#6035)."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Batcher(GeneralizedRCNNTransform):
    """torchvision's normalisation and padding. Images come scaled already, by `Scenes.example`."""

    def resize(self, image, target=None):
        return image, target

    def batch_images(self, images, size_divisible=32):
        return super().batch_images(images, size_divisible).contiguous(memory_format=memory_format(images[0].device))


def build(net, config):
    """Faster R-CNN of torchvision's parts around a ResNet. config: form, classes (names), test_side, rois.

    train mode: (list of float (3, H, W) in 0..1, list of {boxes (k, 4), labels (k,) from 1}) -> dict of four losses
    eval mode:  list of float (3, H, W) -> list of {boxes (k, 4), labels (k,) from 1, scores (k,)}"""
    stem, channels = 1 if net.config["small_stem"] else 4, [w * net.expansion for w in net.config["widths"]]
    small = config["test_side"] <= 256                 # sizes were published for images of 800 pixels
    sizes = [s * config["test_side"] / 800 for s in (32, 64, 128, 256, 512)]
    if config["form"] == "c4":
        parts = dict(layer4=net.layer4, norm=Norm(net.features), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())       # (rois, C3, size, size) -> (rois, C4)
        head, features = nn.Sequential(collections.OrderedDict(parts)), net.features
        net.layer4 = None
        trunk = Trunk(net, (3,), channels[2])
        anchors, crop = Anchors((tuple(sizes),), ((0.5, 1.0, 2.0),)), Crop(8 if small else 14, 1 / (4 * stem), 0, aligned=True)        # half-pixel aligned, as many samples per cell as pixels
        before, after = (12000, 6000), (2000, 1000)    # proposals of an image before and after suppression: training, test
    else:
        stages, wide = (1, 2, 3, 4) if stem == 4 else (2, 3, 4), 256 if net.features >= 1024 else 64
        trunk = Trunk(net, stages, wide, FeaturePyramidNetwork([channels[s - 1] for s in stages], wide, LastLevelMaxPool(), norm_layer=Norm))
        anchors = Anchors(tuple((s,) for s in sizes[:len(stages) + 1]), ((0.5, 1.0, 2.0),) * (len(stages) + 1))
        crop, head, features = MultiScaleRoIAlign([str(i) for i in range(len(stages))], 7, 2), TwoMLPHead(wide * 49, 4 * wide), 4 * wide
        before, after = (2000, 1000), (1000, 1000)
    before, after = ((1000, 500), (300, 150)) if small else (before, after)
    both = lambda pair: dict(zip(("training", "testing"), pair))
    rpn = RegionProposalNetwork(anchors, in_fp32(RPNHead(trunk.out_channels, anchors.num_anchors_per_location()[0])), 0.7, 0.3, 256, 0.5, both(before), both(after), 0.7)
    heads = RoIHeads(crop, head, in_fp32(FastRCNNPredictor(features, len(config["classes"]) + 1)), 0.5, 0.5, config["rois"], 0.25, None, 0.05, 0.5, 100)
    for part in (rpn, heads):
        part.fg_bg_sampler = Sampler(part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction)
    model = GeneralizedRCNN(trunk, rpn, heads, Batcher(1, 1, MEAN, STD))
    model.config = config
    return model


def load_detector(path):
    """The trained detector in <out>/detector.pt, in eval mode, for images whose short side is its config's test_side."""
    content = sdrnet.load(path, ("detector",))
    try:
        model = build(resnet(content["config"]["backbone"]), content["config"])
        model.load_state_dict(content["model"])
    except Exception as error:
        raise InputError(f"{path} does not fit its own architecture ({type(error).__name__})") from None
    return model.eval()


# ---------------------------------------------------------------------------- training

def ahead(make, items, workers):
    """make(item) for each item, in order, by threads that work ahead: decoding and scaling free Python's lock."""
    pool, queue = ThreadPoolExecutor(workers), collections.deque()
    try:
        for item in items:
            queue.append(pool.submit(make, item))
            if len(queue) > 2 * workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def training_batches(scenes, args, first, last):
    """Yields (step, images uint8 (3, H, W), targets) of this process's part of each step's batch. The images come from
    an endless row of permutations; side and mirroring are a function of (seed, step, position in the global batch)."""
    usable, mine = scenes.usable(), args.batch // world_size()
    plan = Plan(len(usable), args.batch, 1, args.seed)

    def make(item):
        step, chosen = item
        images, targets = [], []
        for p in range(rank() * mine, (rank() + 1) * mine):
            rng, i = np.random.default_rng([args.seed, 5, step, p]), usable[chosen[p]]
            image, boxes = scenes.example(i, int(rng.choice(args.short_side)), args.longest, rng.random() < 0.5)
            _, labels, difficult = scenes.objects[i]
            images.append(image)
            targets.append({"boxes": torch.from_numpy(boxes[~difficult]).float(), "labels": torch.from_numpy(labels[~difficult]) + 1})
        return step, images, targets
    return ahead(make, ((step, plan.uniform(step)) for step in range(first, last)), args.workers)


def losses_of(model, images, targets, step, args, device):
    """One forward of the model, or of DDP around it, in train mode: its four losses, in fp32."""
    inner = getattr(model, "module", model)
    for part in (inner.rpn, inner.roi_heads):
        part.fg_bg_sampler.key, part.fg_bg_sampler.first = (args.seed, step), rank() * len(images)
    with autocast(device, args.amp):
        return model([x.to(device).float() / 255 for x in images], [{k: v.to(device) for k, v in t.items()} for t in targets])


def learning_rate(step, args):
    """Linear warm-up from a thousandth; a tenth after 3/4 and a hundredth after 11/12 of the iterations."""
    return args.lr * 0.1 ** sum(step >= s for s in args.steps) * (0.001 + 0.999 * min(1.0, step / args.warmup) if args.warmup else 1.0)


def make_optimizer(model, args):
    """SGD with momentum 0.9; weight decay leaves BatchNorm and biases alone."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == big], "weight_decay": args.weight_decay * big} for big in (True, False)]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


def train(model, scenes, args, device, stem, config, until):
    """Trains from <stem>.last.pt, if there is one, to iteration `until`, and leaves the state there. Returns seconds."""
    paths = [f"{stem}.last.pt", f"{stem}.prev.pt"]
    optimizer, first, spent = make_optimizer(model, args), 0, 0.0
    state = resume(paths, config, model, optimizer)
    if state:
        first, spent = state["step"], state["seconds"]
        if first >= until:
            return spent
    log, wrapped, wait = Log(f"{stem}.log.jsonl", first, until), parallel(model, device), 0.0
    began = saved = shown = mark = time.time()
    model.train()
    for step, images, targets in training_batches(scenes, args, first, until):
        wait += time.time() - mark
        for group in optimizer.param_groups:
            group["lr"] = rate = learning_rate(step, args)
        losses = losses_of(wrapped, images, targets, step, args, device)
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        told = torch.stack([loss.detach(), *(v.detach() for v in losses.values()), (~torch.isfinite(loss)).to(loss), loss.new_tensor(float(Signals.caught or 0))])
        total, *each, bad, stop = agree(told, device)
        each = dict(zip(losses, each))
        if bad:
            log.flush()
            raise InputError(f"iteration {step}: the loss is not finite ({each}); the last good state is in {paths[0]}: try a lower --lr")
        optimizer.step()
        log.add(step=step, loss=total, **each, lr=rate)
        elapsed, last = time.time() - began, step + 1 == until
        speed = (step + 1 - first) / elapsed
        shown = tell(f"iteration {step + 1:6d} of {args.iterations}  loss {total:.3f}  lr {rate:.5f}  {speed * args.batch:.1f} img/s  wait {100 * wait / elapsed:.0f}%  "
                     f"eta {clock((until - step - 1) / speed)}", shown, last or (step + 1) % max(1, args.iterations // 20) == 0)
        if stop or last or due(args.save_every, step, saved):
            log.flush()
            keep(*paths, {"format": sdrnet.FORMAT, "kind": "training", "config": config, "step": step + 1, "seconds": spent + elapsed,
                          "model": model.state_dict(), "optimizer": optimizer.state_dict()})
            saved = time.time()
        if stop:
            Signals.caught = Signals.caught or 15      # another process caught it
            raise Stopped()
        mark = time.time()
    return spent + time.time() - began


@torch.no_grad()
def settle_norms(model, scenes, args, device):
    """BatchNorm's statistics for inference, plain averages over --precise-bn training batches, forwarded as in training:
    the published protocol's "precise BN". (Running averages lag behind the weights.)"""
    norms = [m for m in model.modules() if isinstance(m, Norm)] if args.precise_bn else []
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    model.train()
    shown = time.time()
    for step, images, targets in training_batches(scenes, args, 0, args.precise_bn):
        losses_of(model, images, targets, step, args, device)
        Signals.poll()
        shown = tell(f"BatchNorm's statistics: {step + 1} of {args.precise_bn} batches", shown)
    for m in norms:
        m.momentum = 0.1
    model.eval()


@torch.no_grad()
def detect(model, scenes, args, device):
    """All detections on the scenes, as `evaluate` takes them, in the pixels of the files. Each image is forwarded by one
    process and by itself, so that nothing depends on how many processes there are; all processes get all detections."""
    model.eval()
    rows, mine, shown = [np.zeros((0, 7))], range(rank(), len(scenes), world_size()), time.time()
    for n, (i, (image, _)) in enumerate(ahead(lambda i: (i, scenes.example(i, args.test_side, args.longest)), mine, args.workers)):
        with autocast(device, args.amp):
            out, = model([image.to(device).float() / 255])
        out = {k: v.double().cpu().numpy() for k, v in out.items()}
        boxes = out["boxes"] * [*scenes.size[i], *scenes.size[i]] / np.array(image.shape)[[2, 1, 2, 1]]
        rows.append(np.column_stack([np.full(len(boxes), i), out["labels"] - 1, out["scores"], boxes]))
        Signals.poll()
        shown = tell(f"detecting: {(n + 1) * world_size():,} of {len(scenes):,} images", shown)
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, np.concatenate(rows))
        rows = parts
    table = np.concatenate(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]              # (m, 7): image, label, score, box
    return {"image": table[:, 0].astype(int), "label": table[:, 1].astype(int), "score": table[:, 2], "box": table[:, 3:]}


# ---------------------------------------------------------------------------- choosing by early stopping

def halving_plan(count, iterations):
    """[(iteration, candidates that are trained up to there)], e.g. for 8: to 1/8 8, to 1/4 4, to 1/2 2, to the end 1."""
    halvings = math.ceil(math.log2(count))
    return [(math.ceil(iterations / 2 ** (halvings - r)), math.ceil(count / 2 ** r)) for r in range(halvings)] + [(iterations, 1)]


def choose(candidates, make, scenes, args, device, stem, config):
    """Early stopping, the paper's choice of a sub-net for detection. candidates: (name, source, path) each; make(candidate)
    -> model. Prints and keeps the table of each halving in <out>/halving.json, from where an interrupted choice goes on.
    Returns the number of the one left."""
    file, plan = os.path.join(args.out, "halving.json"), halving_plan(len(candidates), args.iterations)
    order = np.random.default_rng([args.seed, 6]).permutation(len(scenes))
    held = scenes.subset(np.sort(order[:max(1, round(args.holdout * len(scenes)))]))
    fit = scenes.subset(np.sort(order[len(held):]))
    if len(fit.usable()) == 0 or len(held.usable()) == 0:
        raise InputError(f"--holdout {args.holdout} of {len(scenes)} training images leaves none with objects to train on, or to judge by")
    about = {"config": config, "set_aside": len(held), "tables": []}
    if os.path.exists(file):
        about = read_json(file)
        same_run(about["config"], config, file)
        if not isinstance(about.get("tables"), list):
            raise InputError(f"{file} is damaged; start anew with --fresh")
    alive, spent, full = list(range(len(candidates))), 0, len(candidates) * args.iterations
    for r, (until, _) in enumerate(plan[:-1]):
        about["tables"] += [{}] if len(about["tables"]) == r else []
        table = about["tables"][r]                     # {name: [AP, AP50]}
        for c in alive:
            name = candidates[c][0]
            if name not in table:
                say(f"halving {r + 1} of {len(plan) - 1}: {name} to iteration {until}")
                model = make(candidates[c])
                train(model, fit, args, device, f"{stem}.{c}", {**config, "candidate": name}, until)
                settle_norms(model, fit, args, device)
                told = summary(evaluate(held.truth(), detect(model, held, args, device), len(held.classes)), held.classes)["coco"]
                table[name] = [told["AP"], told["AP50"]]
                save_json(file, about)
        spent += len(alive) * (until - (plan[r - 1][0] if r else 0))
        ranked = sorted(alive, key=lambda c: (-table[candidates[c][0]][0], c))
        alive = sorted(ranked[:plan[r + 1][1]])
        say(f"halving {r + 1} at iteration {until}, judged on {len(held)} training images set aside:\n" + "\n".join(
            f"  {candidates[c][0]:24s} AP {table[candidates[c][0]][0]:5.1f}  AP50 {table[candidates[c][0]][1]:5.1f}  {'goes on' if c in alive else 'stops'}" for c in ranked))
    spent += args.iterations - plan[-2][0]
    about.update(chosen=candidates[alive[0]][0], iterations=spent, iterations_without_halving=full)
    say(f"chosen: {about['chosen']}; {spent:,} iterations instead of {full:,} for all {len(candidates)} to the end, {100 * (1 - spent / full):.0f} % saved")
    save_json(file, about)
    return alive[0]


# ---------------------------------------------------------------------------- the command

def read_json(path):
    """What save_json wrote of a run. Raises InputError."""
    try:
        with open(path) as file:
            content = json.load(file)
        if not isinstance(content["config"], dict):
            raise TypeError
        return content
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: remove it, or start anew with --fresh") from None


def pictures(scenes, found, path, count, least=0.5, side=320):
    """A PNG of `count` scenes, evenly spaced: ground truth left, detections with a score of at least `least` right."""
    hues = 6 * 0.618 * np.arange(len(scenes.classes))[:, None] + [0, 4, 2]
    colours = [tuple(c) for c in (255 * np.clip(np.abs(hues % 6 - 3) - 1, 0.15, 1)).astype(int).tolist()]
    tiles, tall = [], 0
    for i in np.linspace(0, len(scenes) - 1, min(count, len(scenes))).round().astype(int):
        image, (boxes, labels, difficult) = scenes.decode(i), scenes.objects[i]
        scale = side / max(image.size)
        pixels = torch.from_numpy(np.array(image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC))).permute(2, 0, 1)
        d = np.flatnonzero((found["image"] == i) & (found["score"] >= least))
        left = boxes, labels, [scenes.classes[k] + " (difficult)" * int(h) for k, h in zip(labels, difficult)]
        right = found["box"][d], found["label"][d], [f"{scenes.classes[k]} {100 * s:.0f}" for k, s in zip(found["label"][d], found["score"][d])]
        pair, tall = torch.full((3, side, 2 * side + 4), 255, dtype=torch.uint8), max(tall, pixels.shape[1])
        for at, (boxes, labels, words) in ((0, left), (side + 4, right)):
            drawn = draw_bounding_boxes(pixels, torch.from_numpy(boxes * scale), words, [colours[k] for k in labels], width=2) if len(boxes) else pixels
            pair[:, :drawn.shape[1], at:at + drawn.shape[2]] = drawn
        tiles.append(pair)
    with sdrnet.whole(path) as file:
        Image.fromarray(make_grid([tile[:, :tall] for tile in tiles], 2, padding=12, pad_value=255).permute(1, 2, 0).numpy()).save(file, "PNG")


RECIPES = {                                            # values that no option gave
    "voc": dict(batch=16, iterations=24000, lr=0.02, warmup=100, short_side=list(range(480, 801, 32)), test_side=800, precise_bn=200, rois=512),
    "toy": dict(batch=8, iterations=500, lr=0.04, warmup=50, short_side=[256], test_side=256, precise_bn=20, rois=64),
}
NOT_COMPARED = {"out", "device", "workers", "download", "save_every", "fresh", "pictures"}


def parse(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("images (default: toy scenes)")
    group.add_argument("--voc", help="folder with VOC2007/, VOC2012/, ... or itself with JPEGImages/, Annotations/, ImageSets/Main/")
    group.add_argument("--train-sets", default="2007:trainval,2012:trainval", help="YEAR:SPLIT, FOLDER:SPLIT or SPLIT, joined by commas")
    group.add_argument("--test-sets", default="2007:test")
    group.add_argument("--classes", default="voc", help="voc (its 20), found (those of the training images), or names with commas between")
    group.add_argument("--download", action="store_true", help="let torchvision download the sets that are missing")
    group.add_argument("--scenes", type=number(int, 2), default=1000, help="toy scenes to train on")
    group.add_argument("--test-scenes", type=number(int, 1), default=200)
    group.add_argument("--workers", type=number(int, 1, 1024), default=min(8, CORES), help="threads that decode images")
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", help="subnet.pt, sdrnet.pt, simsiam.pt, a torchvision ResNet state dict, or random; default: a subnet.pt below --out, for candidates its sdrnet.pt")
    group.add_argument("--path", help="of sdrnet.pt, as 0,2,1,3; default: its largest network")
    group.add_argument("--scratch", action="store_true", help="the shape of --backbone with random weights: the control")
    group.add_argument("--form", choices=("c4", "fpn"), default="c4")
    group = parser.add_argument_group("protocol (defaults: the published one on VOC, a short one on toy scenes)")
    group.add_argument("--batch", type=number(int, 1), help="images of an iteration, over all processes")
    group.add_argument("--iterations", type=number(int, 1), help="default: scaled with 16 / batch")
    group.add_argument("--lr", type=number(float, TINY), help="default: scaled with batch / 16")
    group.add_argument("--warmup", type=number(int, 0), help="iterations")
    group.add_argument("--weight-decay", type=number(float, 0), default=1e-4)
    group.add_argument("--short-side", type=number(int, 32, 8192), nargs="+", help="lengths of the short side in training, one drawn for each image")
    group.add_argument("--test-side", type=number(int, 32, 8192))
    group.add_argument("--precise-bn", type=number(int, 0), help="batches that BatchNorm's statistics for inference come from; 0: running averages")
    group.add_argument("--rois", type=number(int, 1), help="regions per image in training")
    group = parser.add_argument_group("choice by early stopping")
    group.add_argument("--candidates", nargs="+", default=[], help="paths in --backbone (0,2,1,3), largest, or checkpoints")
    group.add_argument("--scores", help="scores.npy of route.py: the --best sub-nets of --backbone are candidates")
    group.add_argument("--best", type=number(int, 2), default=4)
    group.add_argument("--holdout", type=number(float, TINY, 1 - TINY), default=0.2, help="share of the training images that candidates are judged on")
    group = common_options(parser)
    training_options(group)
    group.add_argument("--pictures", type=number(int, 0), default=8, help="test images that are drawn")
    args = parser.parse_args(argv)
    if args.voc is None:
        parser.idle(args, ("train_sets", "test_sets", "classes", "download"), "without --voc")
    elif parser.given(args, ("scenes", "test_scenes")):
        say("warning: --scenes and --test-scenes are of toy scenes and mean nothing with --voc")
    if args.scores is None:
        parser.idle(args, ("best", "holdout") if not args.candidates else ("best",), "without --scores")
    return args


def fill_defaults(args, small_stem=False):
    """Values in force: what was given, else the recipe's, by the linear rule for another batch. Prints them."""
    recipe = {**RECIPES["toy" if args.voc is None else "voc"]}
    if args.voc is None and small_stem:                # such a network keeps four times the resolution: as they are drawn is enough
        recipe.update(short_side=[TOY_SIDE], test_side=TOY_SIDE)
    factor, given = (args.batch or recipe["batch"]) / recipe["batch"], {k for k in recipe if getattr(args, k) is not None}
    scaled = {**recipe, "lr": recipe["lr"] * factor, **{k: max(1, round(recipe[k] / factor)) for k in ("iterations", "warmup")}}
    for key in set(recipe) - given:
        setattr(args, key, scaled[key])
    if "iterations" in given and "warmup" not in given:
        args.warmup = min(args.warmup, args.iterations // 10)
    args.steps, args.longest = [math.ceil(args.iterations * 3 / 4), math.ceil(args.iterations * 11 / 12)], round(max(args.test_side, *args.short_side) * 1333 / 800)
    if args.batch % world_size():
        raise InputError(f"--batch {args.batch} does not divide among {world_size()} processes")
    say(f"protocol: {args.iterations} iterations of {args.batch} images over {world_size()} process(es), lr {args.lr:g}, a tenth after {args.steps[0]} and {args.steps[1]}, "
        f"warm-up {args.warmup}, short side {args.short_side[0]}-{args.short_side[-1]} (long at most {args.longest}), test at {args.test_side}, form {args.form}, "
        f"{args.rois} regions an image, weight decay {args.weight_decay:g}, BatchNorm from {args.precise_bn} batches, seed {args.seed}")
    if factor != 1:
        say(f"linear rule, {recipe['batch']} -> {args.batch} images: " + ", ".join(
            f"{k} {recipe[k]:g} -> {getattr(args, k):g}" + " (given)" * (k in given) for k in ("lr", "iterations", "warmup")))


def list_candidates(args):
    """[(name, source, path)] of the backbones: one in an ordinary run."""
    if args.backbone is None:
        found = sorted(glob.glob(os.path.join(glob.escape(args.out), "*", "subnet.pt")), key=lambda f: ("shapes" not in f, f))
        args.backbone = os.path.join(args.out, "sdrnet.pt") if args.scores or args.candidates else found[0] if found else "random"
        if args.backbone == "random":
            say(f"no subnet.pt of route.py below {args.out}, so the backbone starts from RANDOM weights; name one with --backbone")
    if args.scores:
        scores = load_array(args.scores, "f", 1)
        groups = sdrnet.load(args.backbone, ("sdrnet",))["config"]["groups"]
        best = [int(i) for i in np.argsort(-scores, kind="stable")[:args.best] if np.isfinite(scores[i])]
        if len(scores) != groups ** sdrnet.STAGES or len(best) < 2:
            raise InputError(f"{args.scores} holds {len(scores)} scores, {args.backbone} has {groups ** sdrnet.STAGES} sub-nets, and at least two must have a score")
        if args.candidates:
            raise InputError("--scores and --candidates are two ways to name candidates: give one")
        args.candidates = [",".join(map(str, sdrnet.index_to_path(i, groups))) for i in best]
    if not args.candidates:
        return [(args.path or os.path.basename(args.backbone), args.backbone, args.path)]
    if args.path or len(set(args.candidates)) < max(2, len(args.candidates)):
        raise InputError("--candidates: at least two different ones are needed" if not args.path else "--path names one sub-net, --candidates and --scores several: give one")
    return [(c, c, None) if os.path.exists(c) else (c, args.backbone, None if c == "largest" else c) for c in args.candidates]


def main():
    args = parse()
    device = start(args)
    candidates, lines, sums, began = list_candidates(args), {}, {}, time.time()
    for name, source, path in candidates:              # a backbone that does not fit ends the run now
        _, shape, lines[name] = load_backbone(source, path, args.scratch, args.voc is None)
        sums[name] = None if source == "random" else hashlib.sha256(open(source, "rb").read()).hexdigest()[:16]
        say(lines[name])
    fill_defaults(args, shape["small_stem"])
    train_scenes, test_scenes = open_scenes(args)
    truth, out = test_scenes.truth(), lambda name: os.path.join(args.out, name)
    say(f"{args.voc or 'toy scenes'}: {len(train_scenes):,} training images ({len(train_scenes.usable()):,} with objects), {len(test_scenes):,} test images with "
        f"{int((~truth['difficult']).sum()):,} objects and {int(truth['difficult'].sum()):,} difficult ones, {len(train_scenes.classes)} classes; read in {time.time() - began:.1f} s")

    def make(candidate):
        torch.manual_seed(args.seed)                   # new parts start alike on every process and for every candidate
        net, shape, _ = load_backbone(*candidate[1:], args.scratch, args.voc is None)
        torch.manual_seed(args.seed)
        config = {"form": args.form, "classes": list(train_scenes.classes), "test_side": args.test_side, "rois": args.rois, "backbone": shape}
        return build(net, config).to(device, memory_format=memory_format(device))
    config = {**{k: v for k, v in vars(args).items() if k not in NOT_COMPARED}, "images": [len(train_scenes), len(test_scenes)], "sha256": sums}
    if rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        for path in [out("metrics.json"), out("halving.json"), out("detections.png"), *glob.glob(glob.escape(out("detector")) + ".*")] if args.fresh and not restarted() else []:
            if os.path.exists(path) and not path.endswith(".bak"):
                os.replace(path, path + ".bak")
    if world_size() > 1:
        dist.barrier()
    if os.path.exists(out("metrics.json")):
        same_run(read_json(out("metrics.json"))["config"], config, out("metrics.json"))
        say(f"{out('metrics.json')} is finished; --fresh trains anew")
        return

    chosen, stem, own = candidates[0], out("detector"), config
    if len(candidates) > 1:
        left = choose(candidates, make, train_scenes, args, device, stem, config)
        chosen, stem, own = candidates[left], f"{stem}.{left}", {**config, "candidate": candidates[left][0]}
    model = make(chosen)
    seconds = train(model, train_scenes, args, device, stem, own, args.iterations)
    settle_norms(model, train_scenes, args, device)
    if rank() == 0:
        sdrnet.save(out("detector.pt"), {"format": sdrnet.FORMAT, "kind": "detector", "config": model.config, "model": {k: v.cpu() for k, v in model.state_dict().items()}})
    found = detect(model, test_scenes, args, device)
    report(found, truth, test_scenes, args, {"config": config, "backbone": lines[chosen[0]], "chosen": chosen[0], "training_seconds": round(seconds, 1)})


def report(found, truth, scenes, args, about):
    """Evaluates, prints, draws, and last writes metrics.json: that it is there says that the run is finished."""
    began = time.time()
    results = summary(evaluate(truth, found, len(scenes.classes)), scenes.classes)
    say(f"{len(found['image']):,} detections on {len(scenes):,} test images, evaluated in {time.time() - began:.1f} s; percent\n"
        f"  {'rule':14s}     AP   AP50   AP75   AP50 of each class")
    for rule, r in results.items():
        say(f"  {rule.replace('_', ' '):14s} {r['AP']:6.2f} {r['AP50']:6.2f} {r['AP75']:6.2f}   " + "  ".join(f"{k} {v['AP50']:.1f}" for k, v in r["per_class"].items() if v["AP50"] is not None))
    if rank() == 0 and args.pictures:
        pictures(scenes, found, os.path.join(args.out, "detections.png"), args.pictures)
    protocol = {k: getattr(args, k) for k in ("form", "batch", "iterations", "lr", "steps", "warmup", "weight_decay", "short_side", "longest", "test_side", "precise_bn", "rois")}
    protocol.update(momentum=0.9, frozen="nothing", batch_norm="over all processes", mirrored=0.5, score_threshold=0.05, suppression_iou=0.5, detections_per_image=100,
                    difficult="not trained on, ignored in evaluation", processes=world_size())
    save_json(os.path.join(args.out, "metrics.json"), {
        **results, **about, "protocol": protocol, "test": {"images": len(scenes), "objects": int((~truth["difficult"]).sum()), "difficult": int(truth["difficult"].sum()),
        "detections": len(found["image"])}, "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "numpy": np.__version__}})
    say(f"wrote metrics.json, detector.pt{', detections.png' * bool(args.pictures)} in {args.out}")


if __name__ == "__main__":
    run(main, "detect_voc.py")
