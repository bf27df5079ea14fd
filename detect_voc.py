"""detect_voc.py - does a sub-net detect better? Faster R-CNN C4 on PASCAL VOC, from any backbone.

    python detect_voc.py                                     # toy scenes, the best routed sub-net
    python detect_voc.py --voc VOCdevkit --backbone subnet.pt --out runs/voc       # as published
    torchrun --nproc_per_node 8 detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --path 0,2,1,3
    python detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --scores scores.npy --best 8
    python detect_voc.py --voc mine --train train --test val --recipe quick

In the paper's terms (SDR, AAAI 2022, "deployment"): the backbone is a sub-net W_i, and the whole
detector is fine-tuned. Early stopping chooses among several --backbone, or the --best sub-nets of a
scores.npy: each trains for --early-stop iterations on four fifths of the training images, is judged
on the rest by coco AP, and the best starts over on all. --random keeps the shape alone.

Detector (C4): stages 1 to 3 of the ResNet -> proposals (RPN) -> RoIAlign -> stage 4, one more
BatchNorm, mean -> class and box. Nothing is frozen, BatchNorm counts all processes.

Protocol, that of MoCo's and SimSiam's tables: VOC2007 and 2012 trainval to VOC2007 test, 24,000
iterations of 16 images, lr 0.02 (warm-up 100, a tenth after 18,000, a hundredth after 22,000),
short side 480 to 800, test at 800, BatchNorm's statistics from 200 batches at the end ("precise
BN"). Another --batch-size B takes lr x B/16 and iterations x 16/B.

Which of our figures compares: voc_11_point. On VOC2007 the published evaluator takes the precision
at 11 recalls; AP is its mean over IoU 0.50, 0.55 ... 0.95, AP50 and AP75 are two of these ten.

    rule           precision at      a detection matches                 if IoU with it is
    voc_11_point   11 recalls        the object it overlaps most          > t
    voc_area       all recalls       the same; VOC's rule since 2010      > t
    coco           101 recalls       the best object that is still free   >= t

VOC's files count pixels from 1 and include both ends: a width there is x2 - x1 + 1. Our boxes are
[x1 - 1, y1 - 1, x2, y2], floats, whose width is x2 - x1: the same number, so no + 1 stands here.

What still differs from the published code (MoCo's detection/, on detectron2):
  - both box losses: smooth L1 with torchvision's beta of 1/9; there 0, which is L1
  - scores and boxes are evaluated as they are; there rounded to 0.001 and 0.1 pixel
  - 3 of 10 found is a recall of 0.3; there it falls short of 3 * 0.1 by a rounding of floats
  - anchors are rounded to whole pixels, the predictors' biases random (torchvision); there not
  - a batch is padded to multiples of 32 pixels and takes images as they come; there to its largest
    image, and portraits and landscapes are not mixed
  - BatchNorm weighs processes by their number of values; there equally
  - bf16 inside backbone and head where the hardware has it (--amp off: fp32)
  - --recipe quick, not as published: a tenth of the proposals, RoIAlign 7x7, 64 regions
The same as there: objects marked difficult are trained on, and ignored by the evaluation; images
without objects are not trained on; anchors of 32 to 512 pixels by 1:2, 1:1, 2:1; 12,000 proposals
before and 2,000 after suppression (6,000 and 1,000 in testing); 512 regions an image, a quarter of
them on objects; aligned RoIAlign 14x14; weight decay 1e-4 on all but BatchNorm; mirroring; scores
above 0.05, suppression at IoU 0.5, 100 detections an image.

In:   --voc       a folder with VOC2007/, VOC2012/ ... in it, or itself with JPEGImages/,
                  Annotations/ and ImageSets/Main/; classes are those of the training images
      --backbone  subnet.pt, sdrnet.pt, simsiam.pt, or a ResNet-18/34/50 of another code base;
                  default: the sub-net with the best mean score over the tasks routed in <out>
Out:  <out>/detection/metrics.json          every figure, per class too, and all settings
                      detections.png        test images: the truth left, detections right
                      detector.pt           weights, and what build_detector takes
                      early_stopping.json   the table
                      last.pt               the state to go on from, on a CPU bit for bit

Measured on one core of an AMD EPYC with bf16 units, torch 2.14: without options, from the toy
sub-net routed best, AP 79.3, AP50 97.8 (coco), 96.8 (voc_11_point) in 3 minutes.
"""
import argparse
import functools
import glob
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign

import sdrnet
from sdrnet import InputError

LONGEST = 1333                                         # pixels of an image's long side, at most


# ------------------------------------------------------------------------------------ AP

def box_iou(a, b):
    """Intersection over union of boxes a (n, 4) with boxes b (k, 4), [x1, y1, x2, y2]: (n, k)."""
    a, b = a[:, None], b[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = sides.clip(0).prod(-1)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    return inter / (area_a + area_b - inter)


def match_voc(iou, difficult, threshold):
    """VOC's rule on one image and class. iou: a row for each detection, highest score first, of its
    overlaps with the k objects; difficult: k flags. Returns a list: 1 true, 0 false, -1 ignored.

    A detection belongs to the object it overlaps most, found before or not. On a difficult object
    it does not count; else an object's first detection is true, all others are false."""
    verdict, found = [], set()
    for row in iou:
        most = max(row, default=0)
        if most <= threshold:
            verdict.append(0)
            continue
        best = row.index(most)                         # of equal ones the first
        if difficult[best]:
            verdict.append(-1)
        else:
            verdict.append(0 if best in found else 1)
            found.add(best)
    return verdict


def match_coco(iou, difficult, threshold):
    """COCO's rule; arguments and result as in match_voc.

    A detection takes the object it overlaps most of those still free: a difficult one only if there
    is no other, and then it does not count. Beyond the 100 best of an image none counts."""
    verdict, free = [], set(range(len(difficult)))
    for row in iou[:100]:
        near = [k for k in free if row[k] >= threshold]
        if not near:
            verdict.append(0)
            continue
        best = max(near, key=lambda k: (not difficult[k], row[k], k))  # of equal ones the last
        verdict.append(-1 if difficult[best] else 1)
        free.remove(best)
    return verdict + [-1] * len(iou[100:])


def precision_recall(verdict):
    """verdict (n,): of all detections of a class, highest score first. Returns for those that count
    how many are true so far, int (m,), and the highest precision from here on, float (m,)."""
    verdict = verdict[verdict >= 0]
    true = verdict.cumsum()
    precision = true / np.arange(1, len(true) + 1)
    return true, np.maximum.accumulate(precision[::-1])[::-1]


def average_11_point(true, precision, objects):
    """VOC2007: mean precision at the recalls 0, 0.1 ... 1. objects: how many there are to find.

    true / objects >= k / 10 is compared in whole numbers: in floats 3/10 is below 3 * 0.1."""
    place = np.searchsorted(10 * true, np.arange(11) * objects)
    return np.append(precision, 0)[place].mean()       # a recall that is not reached counts 0


def average_area(true, precision, objects):
    """VOC since 2010: the area under the curve of precision over recall."""
    return (precision * np.diff(true, prepend=0)).sum() / objects


def average_coco(true, precision, objects):
    """COCO: mean precision at the recalls 0, 0.01 ... 1."""
    place = np.searchsorted(true / objects, np.linspace(0, 1, 101))
    return np.append(precision, 0)[place].mean()


def evaluate(truth, found, classes):
    """Average precision by three rules.

    truth: dict of image int (n,), label int (n,) in 0 .. classes-1, box (n, 4), difficult bool (n,)
    found: dict of image int (m,), label int (m,), box (m, 4), score (m,). Of equal scores the lower
    image is first, then the one given first.
    Returns {"coco", "voc_11_point", "voc_area": float64 (classes, 10)}, at IoU 0.50, 0.55 ... 0.95;
    NaN for a class without objects to find."""
    rules = {"coco": (match_coco, average_coco), "voc_11_point": (match_voc, average_11_point),
             "voc_area": (match_voc, average_area)}
    table = {rule: np.full((classes, 10), np.nan) for rule in rules}
    order = np.lexsort((-found["score"], found["image"]))              # by image, then by score
    found = {key: value[order] for key, value in found.items()}
    for c in range(classes):
        objects = {key: value[truth["label"] == c] for key, value in truth.items()}
        mine = {key: value[found["label"] == c] for key, value in found.items()}
        to_find = int((~objects["difficult"]).sum())
        if to_find == 0:
            continue
        images = []                                    # of each the overlaps, and what is difficult
        for image in np.unique(mine["image"]):
            here = objects["image"] == image
            iou = box_iou(mine["box"][mine["image"] == image], objects["box"][here])
            images.append((iou.tolist(), objects["difficult"][here].tolist()))
        ranked = np.argsort(-mine["score"], kind="stable")
        for t, threshold in enumerate(np.linspace(0.5, 0.95, 10).tolist()):
            for rule, (match, average) in rules.items():
                verdict = [v for image in images for v in match(*image, threshold)]
                curve = precision_recall(np.array(verdict, int)[ranked])
                table[rule][c, t] = average(*curve, to_find)
    return table


def summary(table, classes):
    """{rule: {AP, AP50, AP75, classes: {name: {AP, AP50}}}} in percent from evaluate's table, means
    over classes that have objects, None where there are none."""
    def percent(values):
        known = values[~np.isnan(values)]
        return round(100 * float(known.mean()), 3) if len(known) else None

    result = {}
    for rule, values in table.items():
        per_class = {name: {"AP": percent(row), "AP50": percent(row[:1])}
                     for name, row in zip(classes, values)}
        result[rule] = {"AP": percent(values), "AP50": percent(values[:, 0]),
                        "AP75": percent(values[:, 5]), "classes": per_class}
    return result


# ------------------------------------------------------------------------------------ data

def read_annotation(path):
    """A VOC annotation: ((width, height) as it says or None, boxes float64 (k, 4), names, difficult
    bool (k,)). What a tool left out has VOC's default. Raises InputError with the file's name."""
    try:
        root = ElementTree.parse(path).getroot()
        size = tuple(int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        boxes, names, difficult = [], [], []
        for thing in root.iter("object"):
            fields = {field.tag.lower(): (field.text or "").strip() for field in thing}
            boxes.append([float(thing.findtext(f"bndbox/{corner}"))
                          for corner in ("xmin", "ymin", "xmax", "ymax")])
            names.append(fields["name"])
            difficult.append(fields.get("difficult", "").lower() in ("1", "1.0", "true", "yes"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file, though ImageSets names it") from None
    except (ElementTree.ParseError, TypeError, ValueError, OverflowError, LookupError) as error:
        raise InputError(f"{path} is no VOC annotation ({sdrnet.first_line(error)})") from None
    boxes, difficult = np.array(boxes).reshape(-1, 4), np.array(difficult, bool)
    return size if all(size) else None, boxes, names, difficult


def find_image(folder, name):
    """JPEGImages/name with any of the endings that images have. Raises InputError."""
    stem = os.path.join(folder, "JPEGImages", name)
    endings = (ending for suffix in sdrnet.SUFFIXES for ending in (suffix, suffix.upper()))
    for path in filter(os.path.exists, (stem + ending for ending in endings)):
        return path
    raise InputError(f"{stem}.jpg (.png, ...): there is no such image, though ImageSets names it")


def clip_boxes(boxes, size, path):
    """VOC's inclusive pixels from 1 -> continuous [x1, y1, x2, y2]. What leaves the image by one
    pixel at most is clipped. Raises InputError for more, and for boxes of less than a pixel."""
    width, height = size
    boxes = boxes - (1, 1, 0, 0)
    inside = boxes.clip(0, (width, height, width, height))
    for box, kept in zip(boxes, inside):
        if not (box[2:] - box[:2] > 0.999).all():      # so that "nan" is none either
            raise InputError(f"{path}: box {(box + (1, 1, 0, 0)).tolist()} has no area")
        if np.abs(box - kept).max() > 1 or (kept[2:] - kept[:2] < 0.999).any():
            raise InputError(f"{path}: box {(box + (1, 1, 0, 0)).tolist()} is outside of its image "
                             f"of {width} x {height}")
    return inside


class VOC(Dataset):
    """Images with objects. Items (i, short side, mirrored) -> (uint8 (3, H, W) of that short side,
    {"boxes": (k, 4), "labels": (k,) from 1 on}), or the sentence that an image cannot be read.

    entries: [(folder of a year, image's name), ...] of `read_split`; classes: names, or None for
    those found. Attributes: paths, turned (by EXIF), sizes [(width, height)], boxes, labels,
    difficult, digest (of names and annotations). Raises InputError."""

    def __init__(self, entries, classes=None):
        self.paths, self.turned, self.sizes, self.boxes, self.difficult = [], [], [], [], []
        words, digest = [], hashlib.sha256()
        for folder, name in sdrnet.progress(entries, "annotations", len(entries)):
            annotation = os.path.join(folder, "Annotations", f"{name}.xml")
            said, boxes, names, difficult = read_annotation(annotation)
            unknown = set(names) - set(classes or names)
            if unknown:
                raise InputError(f"{annotation}: class {min(unknown)!r} is not one of "
                                 f"{', '.join(classes)}")
            digest.update(os.fsencode(name) + Path(annotation).read_bytes())
            path = find_image(folder, name)
            turned, size = image_size(path, said)
            self.paths.append(path)
            self.turned.append(turned)
            self.sizes.append(size)
            self.boxes.append(clip_boxes(boxes, size, annotation))
            self.difficult.append(difficult)
            words.append(names)
        self.classes = list(classes or sorted(set().union(*words)))
        self.digest = digest.hexdigest()
        self.labels = [np.array([self.classes.index(w) for w in names], int) for names in words]
        if not any(words):
            raise InputError(f"{entries[0][0]}: no image of the split has an object")
        if any(self.turned):
            sdrnet.print0(f"{sum(self.turned)} of {len(self.paths):,} images are turned as their "
                          "EXIF says")

    def __len__(self):
        return len(self.paths)

    def pixels(self, i):
        """Image i as its annotation sees it, a PIL image in RGB. Raises what PIL raises."""
        return sdrnet.read_rgb(self.paths[i], self.turned[i])

    def __getitem__(self, item):
        i, side, mirrored = item
        try:
            image = self.pixels(i)
        except Exception as error:                     # PIL raises nearly anything on a bad file
            return f"{self.paths[i]} cannot be read as an image ({sdrnet.first_line(error)})"
        scale = min(side / min(image.size), LONGEST / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        image = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        boxes = self.boxes[i] * np.tile(np.divide((width, height), self.sizes[i]), 2)
        if mirrored:
            image = image[:, ::-1].copy()
            boxes = boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
        target = {"boxes": torch.from_numpy(boxes).float(),
                  "labels": torch.from_numpy(self.labels[i] + 1)}      # 0 is the background
        return torch.from_numpy(image).permute(2, 0, 1), target

    def truth(self, indices):
        """What `evaluate` takes, of these images; image j being indices[j]."""
        counts = [len(self.boxes[i]) for i in indices]
        return {"image": np.repeat(np.arange(len(indices)), counts),
                "box": np.concatenate([self.boxes[i] for i in indices]),
                "label": np.concatenate([self.labels[i] for i in indices]),
                "difficult": np.concatenate([self.difficult[i] for i in indices])}


def image_size(path, said):
    """(whether EXIF turns it, (width, height) then). Annotation tools show an image as EXIF turns
    it; it stays as stored where only that fits `said`, the annotation's size. Raises InputError."""
    try:
        with Image.open(path) as image:
            raw, kind, orientation = image.size, image.format, image.getexif().get(0x0112, 1)
    except Exception as error:                         # PIL raises nearly anything on a bad file
        raise InputError(f"{path} cannot be read as an image "
                         f"({sdrnet.first_line(error)})") from None
    turned = raw[::-1] if orientation in (5, 6, 7, 8) else raw         # quarters; PIL turns TIFFs
    turns = kind != "TIFF" and orientation in range(2, 9) and (said != raw or raw == turned)
    size = turned if turns else raw
    if said not in (None, size):
        raise InputError(f"{path} has {size[0]} x {size[1]} pixels, and its annotation says "
                         f"{said[0]} x {said[1]}")
    return turns, size


def read_split(voc, sets):
    """[(folder of a year, image's name), ...] of "2007:trainval,2012:trainval", or of "train" where
    `voc` itself holds ImageSets/Main. Raises InputError."""
    entries = []
    for part in sets.split(","):
        year, _, split = part.strip().rpartition(":")
        folder = os.path.join(voc, f"VOC{year}") if year else voc
        path = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
        if not os.path.isfile(path):
            raise InputError(f"no {path}: name VOCdevkit with --voc, the split as in 2007:test; or "
                             "a folder with ImageSets/Main, the split as in test")
        notes = os.path.join(folder, "Annotations", "")
        lines = [line.strip() for line in sdrnet.load_names(path) if line.strip()]
        for line in lines:
            file, word = os.path.basename(line.replace("\\", "/")), line.split()[0]
            readings = (line, os.path.splitext(line)[0], os.path.splitext(file)[0],
                        word, os.path.splitext(word)[0])       # a path; of two columns the first
            name = next((name for name in readings if os.path.exists(f"{notes}{name}.xml")), word)
            entries.append((folder, name))
        if not lines:
            raise InputError(f"{path} names no image")
    return list(dict.fromkeys(entries))                # named twice, an image counts once


# ------------------------------------------------------------------------------------ detector

class C4Backbone(nn.Module):
    """Stem and stages 1 to 3 of a ResNet: (B, 3, H, W) -> {"0": (B, C_3, H / 16, W / 16)}."""

    def __init__(self, net, amp):
        super().__init__()
        self.net, self.amp = net, amp
        self.out_channels = net.layer4[0].conv1.in_channels

    def forward(self, x):
        with sdrnet.autocast(x.device, self.amp):
            x = self.net.maxpool(self.net.relu(self.net.bn1(self.net.conv1(x))))
            x = self.net.layer3(self.net.layer2(self.net.layer1(x)))
        return {"0": x.to(torch.promote_types(x.dtype, torch.float32))}


class C4Head(nn.Module):
    """Stage 4 and one more BatchNorm on regions (R, C_3, 14, 14) -> (R, C_4)."""

    def __init__(self, layer4, features, amp):
        super().__init__()
        self.layer4, self.norm, self.amp = layer4, sdrnet.BatchNorm(features), amp

    def forward(self, x):
        with sdrnet.autocast(x.device, self.amp):
            return sdrnet.pool(self.norm(self.layer4(x)))


class AsTheyCome(GeneralizedRCNNTransform):
    """torchvision's normalising and padding of images that `VOC` has scaled already."""

    def resize(self, image, target=None):
        return image, target


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's random choice of the regions that the losses count, seeded by (seed, step), the
    key, and the image's place in the global batch; `first` is the place of this process's first."""
    key, first = (0, 0), 0

    def __call__(self, matched):
        chosen = []
        for i, labels in enumerate(matched):
            state = np.random.SeedSequence([*self.key, self.first + i]).generate_state(1)
            torch.manual_seed(int(state[0]))
            chosen.append(super().__call__([labels]))
        return [p[0] for p, _ in chosen], [n[0] for _, n in chosen]


class RegionPool(RoIAlign):
    """RoIAlign on the one map of a C4 backbone: regions -> (R, C_3, size, size)."""

    def forward(self, features, proposals, shapes):
        return super().forward(features["0"], proposals)


def build_detector(net, classes, side=800, quick=False, amp="auto"):
    """Faster R-CNN C4 around a torchvision ResNet: torchvision's FasterRCNN.

    net: its BatchNorms are sdrnet.BatchNorm; classes: how many; side: short side of test images, to
    which the published anchors, of 32 to 512 pixels at 800, are scaled; quick: fewer proposals and
    coarser regions. Train mode: (images, targets) -> dict of losses; eval mode: images ->
    detections."""
    stride = 4 if isinstance(net.maxpool, nn.Identity) else 16         # of stage 3's map
    less = 10 if quick else 1
    head = C4Head(net.layer4, net.features, amp)
    trunk = C4Backbone(net, amp)
    net.layer4 = nn.Identity()
    lengths = tuple(length * side / 800 for length in (32, 64, 128, 256, 512))
    model = FasterRCNN(
        trunk, rpn_anchor_generator=AnchorGenerator((lengths,), ((0.5, 1.0, 2.0),)), box_head=head,
        box_predictor=FastRCNNPredictor(net.features, classes + 1),
        rpn_pre_nms_top_n_train=12000 // less, rpn_post_nms_top_n_train=2000 // less,
        rpn_pre_nms_top_n_test=6000 // less, rpn_post_nms_top_n_test=1000 // less,
        box_batch_size_per_image=64 if quick else 512, box_nms_thresh=0.5,
        box_detections_per_img=100)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.01)      # as published
    nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.001)
    model.roi_heads.box_roi_pool = RegionPool(7 if quick else 14, 1 / stride, 0, aligned=True)
    transform = model.transform
    model.transform = AsTheyCome(1, 1, transform.image_mean, transform.image_std)
    for part in (model.rpn, model.roi_heads):
        old = part.fg_bg_sampler
        part.fg_bg_sampler = Sampler(old.batch_size_per_image, old.positive_fraction)
    return model


def copy_backbone(source, path=None, random=False):
    """A ResNet whose BatchNorms count all processes, and a line that says what was loaded.

    source: a checkpoint of ours, an sdrnet.pt with the path "0,2,1,3" of a sub-net, or of another
    code base a ResNet-18/34/50; random: its shape alone. Raises InputError."""
    content = sdrnet.read_torch_file(source)
    if isinstance(content, dict) and "kind" in content:
        net, message = sdrnet.load_network(source, sdrnet.BatchNorm), f"{source}: loaded"
    else:
        text = str(content)                            # its keys, at any depth, with any prefix
        arch = "resnet34" if "layer3.5." in text else "resnet18"
        if "layer1.0.conv3" in text:
            arch = "resnet50"
        net = sdrnet.resnet(arch, (64, 128, 256, 512), 64, norm_layer=sdrnet.BatchNorm)
        message = sdrnet.load_weights(net, source)
    digits = None
    if path is not None:
        digits, message = sdrnet.read_path(path, net), f"{message}, path {path}"
    if isinstance(net, sdrnet.SDRNet):
        net = net.extract(digits, sdrnet.BatchNorm)
    if random:
        net = sdrnet.resnet(**net.config, norm_layer=sdrnet.BatchNorm)
        message = f"{source}: its shape alone, RANDOM weights"
    return net, message


# ------------------------------------------------------------------------------------ training

def training_items(step, seed, usable, batch, sides):
    """[(image, short side, mirrored), ...] of a step's whole batch: the next of an endless sequence
    of epochs, each a permutation; a function of (seed, step, position)."""
    items = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(place, len(usable))
        order = sdrnet.permutation(seed, epoch, len(usable))
        rng = np.random.default_rng([seed, 2, place])
        items.append((int(usable[order[at]]), int(rng.choice(sides)), bool(rng.random() < 0.5)))
    return items


def training_batches(data, indices, args, first, last, device):
    """Yields (step, images, targets) of this process, as torchvision's detectors take them. Images
    without objects are not trained on; objects marked difficult are, as in the published code."""
    usable = [i for i in indices if len(data.boxes[i])]
    share = args.batch_size // sdrnet.world_size()
    mine = slice(share * sdrnet.rank(), share * (sdrnet.rank() + 1))
    items = (training_items(step, args.seed, usable, args.batch_size, args.sides)[mine]
             for step in range(first, last))
    for step, samples in enumerate(sdrnet.load_batches(data, items, args.workers), first):
        images = [image.to(device).float() / 255 for image, _ in samples]
        targets = [{key: value.to(device) for key, value in target.items()}
                   for _, target in samples]
        yield step, images, targets


def losses_of(model, images, targets, seed, step):
    """The four losses, {name: scalar}, of a detector or of DDP around one, in train mode."""
    inner = getattr(model, "module", model)
    for part in (inner.rpn, inner.roi_heads):
        part.fg_bg_sampler.key = (seed, step)
        part.fg_bg_sampler.first = sdrnet.rank() * len(images)
    return model(images, targets)


def learning_rate(step, base, iterations, warmup):
    """Linear warm-up from a thousandth; a tenth after 3/4, a hundredth after 11/12 of the steps."""
    rate = base * min(1, 0.001 + 0.999 * step / warmup)
    for share in (3 / 4, 11 / 12):
        if step >= iterations * share:
            rate = rate / 10
    return rate


def make_optimizer(model, weight_decay=1e-4):
    """SGD with momentum 0.9, weight decay on all but BatchNorm."""
    norms = {id(p) for bn in sdrnet.batch_norms(model) for p in bn.parameters()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in norms]},
              {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=weight_decay)


def train(model, data, indices, args, iterations, device, path=None, arguments=None):
    """Trains on the images `indices` of `data`. path: the state to go on from, and to leave every
    ten minutes, at a signal and at the end; None: none."""
    optimizer = make_optimizer(model)
    first = sdrnet.resume(path, arguments, model, optimizer) if path else 0
    ddp = DistributedDataParallel(model) if sdrnet.world_size() > 1 else model
    model.train()
    began = shown = saved = time.time()
    for step, images, targets in training_batches(data, indices, args, first, iterations, device):
        rate = learning_rate(step, args.lr, iterations, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = losses_of(ddp, images, targets, args.seed, step)
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        done, now = step + 1, time.time()
        save_due = done == iterations or now - saved > 600
        stop, save, broken = sdrnet.on_any(bool(sdrnet.CAUGHT), save_due, not torch.isfinite(loss))
        if broken:
            raise InputError(f"iteration {step:,}: the loss is not finite: start anew, --fresh, "
                             "with a lower --lr or --amp off")
        optimizer.step()
        if done == iterations or now - shown > 20:
            shown = now
            speed = (done - first) / (now - began)
            parts = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            sdrnet.print0(f"iteration {done:,} of {iterations:,}  {parts}  lr {rate:.4f}  "
                          f"{speed * args.batch_size:.1f} img/s  "
                          f"minutes left {(iterations - done) / speed / 60:.1f}")
        if path and (stop or save):
            saved = now
            sdrnet.save_state(path, done, arguments, model, optimizer)
        if stop:
            sdrnet.print0(f"stopped at step {done:,}: without --fresh the same command goes on")
            sys.exit(128 + max(sdrnet.CAUGHT, default=15))


@torch.no_grad()
def recalibrate_bn(model, data, indices, args, device):
    """BatchNorm's statistics for inference, averages over training batches: "precise BN"."""
    model.train()
    batches = training_batches(data, indices, args, 0, args.precise_bn, device)
    sdrnet.average_statistics(model, (losses_of(model, images, targets, args.seed, step)
                                      for step, images, targets in batches))
    model.eval()


@torch.no_grad()
def detect(model, data, indices, args, device):
    """What `evaluate` takes: all detections on the images, j for indices[j], in the pixels of the
    files. Each image is seen by itself; every process gets all detections."""
    model.eval()
    mine = list(range(sdrnet.rank(), len(indices), sdrnet.world_size()))
    items = [[(indices[j], args.test_side, False)] for j in mine]
    rows, batches = [], zip(mine, sdrnet.load_batches(data, items, args.workers))
    for j, ((image, _),) in sdrnet.progress(batches, "detecting: images", len(mine)):
        result, = model([image.to(device).float() / 255])
        height, width = image.shape[1:]
        scale = np.tile(np.divide(data.sizes[indices[j]], (width, height)), 2)
        boxes = result["boxes"].double().cpu().numpy() * scale
        for label, score, box in zip(result["labels"].tolist(), result["scores"].tolist(),
                                     boxes.tolist()):
            rows.append([j, label - 1, score, *box])
    if sdrnet.world_size() > 1:
        parts = [None] * sdrnet.world_size()
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    table = np.array(sorted(rows, key=lambda row: row[0])).reshape(-1, 7)
    return {"image": table[:, 0].astype(int), "label": table[:, 1].astype(int),
            "score": table[:, 2], "box": table[:, 3:]}


def early_stopping(candidates, data, args, device, path, arguments):
    """The paper's choice for detection: each candidate (name, source, digits) has the schedule in
    args.early_stop iterations, on four fifths of the training images; the rest judges, by coco AP.

    path: the table, which is printed too; what it holds is not done again. Returns the best."""
    usable = [i for i in range(len(data)) if not data.difficult[i].all()]          # can be judged
    order = np.random.default_rng([args.seed, 3]).permutation(usable)
    count = max(1, round(len(usable) / 5))
    held, rest = order[:count].tolist(), order[count:].tolist()
    if not rest:
        raise InputError("early stopping needs two images with objects: name one --backbone")
    content = {"arguments": arguments, "table": {}}
    if os.path.exists(path):
        with open(path) as file:
            content = json.load(file)
        sdrnet.refuse_changes(content["arguments"], arguments, path)
    table = content["table"]
    for name, source, digits in candidates:
        if name in table:
            continue
        sdrnet.print0(f"early stopping: {name}")
        model = make_detector(source, digits, data, args, device)
        train(model, data, rest, args, args.early_stop, device)
        recalibrate_bn(model, data, rest, args, device)
        found = detect(model, data, held, args, device)
        result = summary(evaluate(data.truth(held), found, len(data.classes)), data.classes)["coco"]
        table[name] = {"AP": result["AP"], "AP50": result["AP50"]}
        if sdrnet.rank() == 0:
            sdrnet.save_json(path, content)
    ranked = sorted(candidates, key=lambda candidate: -table[candidate[0]]["AP"])
    sdrnet.print0(f"after {args.early_stop} iterations, on {len(held)} held-out training images:")
    for name, _, _ in ranked:
        sdrnet.print0(f"  {name:<32} AP {table[name]['AP']:5.1f}  AP50 {table[name]['AP50']:5.1f}")
    return ranked[0]


def make_detector(source, digits, data, args, device):
    """A detector from a backbone; what is new in it is a function of the seed alone."""
    torch.manual_seed(args.seed)                       # of --random
    net, message = copy_backbone(source, digits, args.random)
    sdrnet.print0(message)
    torch.manual_seed(args.seed)                       # the same whatever was drawn above
    quick = args.recipe == "quick"
    return build_detector(net, len(data.classes), args.test_side, quick, args.amp).to(device)


# ------------------------------------------------------------------------------------ what is shown

def draw_detections(data, found, path, count=8, least=0.5, side=320):
    """Test images, evenly spaced: the truth left, detections of at least that score right."""
    colours = [f"hsl({360 * c // len(data.classes)}, 90%, 45%)" for c in range(len(data.classes))]
    shown = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)
    sheet = Image.new("RGB", (4 * (side + 6), -(-len(shown) // 2) * (side + 6)), "white")
    for n, i in enumerate(shown):
        image = data.pixels(i)
        scale = side / max(image.size)
        image = image.resize([max(1, round(length * scale)) for length in image.size])
        names = [f"{data.classes[k]} (difficult)" if hard else data.classes[k]
                 for k, hard in zip(data.labels[i], data.difficult[i])]
        here = np.flatnonzero((found["image"] == i) & (found["score"] >= least))
        scored = [f"{data.classes[found['label'][d]]} {found['score'][d]:.2f}" for d in here]
        for column, boxes, labels, texts in ((0, data.boxes[i], data.labels[i], names),
                                             (1, found["box"][here], found["label"][here], scored)):
            picture = image.copy()
            draw = ImageDraw.Draw(picture)
            for box, label, text in zip(boxes * scale, labels, texts):
                draw.rectangle(box.tolist(), outline=colours[label], width=2)
                draw.text((box[0] + 2, max(0, box[1] - 13)), text, fill="white", stroke_width=2,
                          stroke_fill=colours[label], font=ImageFont.load_default(size=12))
            sheet.paste(picture, ((2 * (n % 2) + column) * (side + 6), n // 2 * (side + 6)))
    sdrnet.save_file(path, functools.partial(sheet.save, format="PNG"))


def report(result):
    """The table of all rules."""
    sdrnet.print0(f"{'rule':>14}     AP   AP50   AP75   (%, on test images)")
    for rule, row in result.items():
        sdrnet.print0(f"{rule:>14}  {row['AP']:5.1f}  {row['AP50']:5.1f}  {row['AP75']:5.1f}")


# ------------------------------------------------------------------------------------ command

RECIPES = {                                            # where no option says otherwise
    "voc": dict(batch_size=16, iterations=24000, lr=0.02, warmup=100, test_side=800,
                sides=list(range(480, 801, 32)), precise_bn=200, early_stop=1000),
    "quick": dict(batch_size=8, iterations=500, lr=0.04, warmup=50, test_side=256,
                  sides=[256], precise_bn=20, early_stop=60),
}
RUN_ONLY = ("voc", "out", "device", "workers", "fresh")            # may change in a run


def build_parser():
    """The options. Where no default is given, RECIPES hold it."""
    number = sdrnet.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage=argparse.SUPPRESS)
    group = parser.add_argument_group("images")
    group.add_argument("--voc", help="VOCdevkit, or a folder with ImageSets/; default: toy scenes")
    group.add_argument("--train", help="splits to train on: 2007:trainval,2012:trainval")
    group.add_argument("--test", default="2007:test", help="splits to test on: 2007:test")
    group.add_argument("--classes", help="names, with commas between; default: those found")
    group.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()),
                       help="processes that read images; 0: this one does")
    group = parser.add_argument_group("backbone")
    group.add_argument("--out", default="runs/toy", help="folder of the run's files: runs/toy")
    group.add_argument("--backbone", nargs="+", help="checkpoint; of several early stopping "
                       "chooses one; default: the sub-net routed best in <out>")
    group.add_argument("--path", help="of its sub-net, as in 0,2,1,3")
    group.add_argument("--random", action="store_true", help="its shape alone: the control")
    group.add_argument("--scores", help="a scores.npy: early stopping chooses among its --best")
    group.add_argument("--best", type=number(int, 2), help="sub-nets to try: 4; without --scores 1")
    group.add_argument("--early-stop", type=number(int, 1), help="16,000 / B steps; quick: 480 / B")
    group = parser.add_argument_group("protocol")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="voc: as published; quick: 500 "
                       "iterations of 8 images at 256 px, default for toy scenes")
    group.add_argument("--batch-size", type=number(int, 1), help="16; quick: 8; the next follow")
    group.add_argument("--iterations", type=number(int, 1), help="384,000 / B; quick: 4,000 / B")
    group.add_argument("--lr", type=number(float, 1e-12), help="0.02 x B / 16; quick: 0.04 x B / 8")
    group.add_argument("--test-side", type=number(int, 32),
                       help="short side in testing: 800; in training from 0.6 of it; quick: 256")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, 0), default=0, help="of everything drawn: 0")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                       help="auto: cuda where there is one")
    group.add_argument("--amp", choices=("auto", "off"), default="auto",
                       help="auto: bf16 where the hardware has it")
    group.add_argument("--fresh", action="store_true", help="start anew, over an earlier run")
    return parser


def fill_defaults(args):
    """The recipe's values for options not given, by the linear rule for another batch size."""
    recipe = dict(RECIPES[args.recipe or "voc"])
    if args.test_side:                                 # sides keep their proportion
        recipe["sides"] = [max(32, round(side * args.test_side / recipe["test_side"]))
                           for side in recipe["sides"]]
    factor = (args.batch_size or recipe["batch_size"]) / recipe["batch_size"]
    recipe["lr"] *= factor
    for key in ("iterations", "warmup", "early_stop", "precise_bn"):
        recipe[key] = max(1, round(recipe[key] / factor))
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.batch_size % sdrnet.world_size():
        raise InputError(f"--batch-size {args.batch_size} does not divide among "
                         f"{sdrnet.world_size()} processes")


def list_candidates(args):
    """[(name, source, digits), ...]: the backbones; among several early stopping chooses."""
    sources = args.backbone or [os.path.join(args.out, "sdrnet.pt")]
    for source in sources:
        if not os.path.isfile(source):
            raise InputError(f"no file {source}: run the stage before, or name a --backbone")
    if not args.scores and not args.best and (args.backbone or args.path):
        return [(source, source, args.path) for source in sources]
    if args.path or len(sources) > 1:
        raise InputError("--scores and --best take one --backbone: leave out --path and others")
    files, count = [args.scores], 4
    if not args.scores:
        files, count = sorted(glob.glob(os.path.join(glob.escape(args.out), "*", "scores.npy"))), 1
    if not files:
        raise InputError(f"no task was routed in {args.out}: run route.py, or name a --backbone")
    groups = sdrnet.load_checkpoint(sources[0], "sdrnet")["config"]["groups"]
    weights = hashlib.sha256(Path(sources[0]).read_bytes()).hexdigest()
    tables, candidates = [], []
    for file in files:
        try:
            tables.append(np.lib.format.open_memmap(file, "r"))    # np.load opens archives, too
        except (OSError, ValueError, EOFError):
            tables.append(np.empty(0))
        if (tables[-1].shape != (groups ** 4,) or not np.isfinite(tables[-1]).all()
                or Path(file).name == "test_scores.npy"):              # which choose nothing
            raise InputError(f"{file}: no scores.npy of the {groups}^4 sub-nets of {sources[0]}")
        result = Path(file).with_name("result.json")
        if result.exists() and weights not in result.read_text():
            raise InputError(f"{file} is of another {sources[0]}: run route.py again")
    scores = np.mean(tables, axis=0)
    if np.ptp(scores) == 0:
        raise InputError("all sub-nets score alike, so none can be chosen: name a --backbone")
    for index in np.argsort(-scores, kind="stable")[:args.best or count].tolist():
        digits = ",".join(map(str, sdrnet.index_to_path(index, groups)))
        candidates.append((f"sub-net {index}, path {digits}", sources[0], digits))
        sdrnet.print0(f"{candidates[-1][0]}: score {scores[index]:.1f} % ({len(files)} tasks)")
    return candidates


def open_images(args):
    """Training and test images, two VOC. Raises InputError."""
    classes = [name.strip() for name in args.classes.split(",")] if args.classes else None
    data = VOC(read_split(args.voc, args.train), classes)
    tests = VOC(read_split(args.voc, args.test), data.classes)
    if all(hard.all() for hard in tests.difficult):
        raise InputError(f"--test {args.test}: all objects are marked difficult: none is to find")
    if both := len(set(data.paths) & set(tests.paths)):
        sdrnet.print0(f"warning: {both} of {len(tests)} test images are training images too")
    return data, tests


def run(args):
    """The command, from the options on."""
    device = sdrnet.setup(args.device, args.seed)
    if args.voc is None:
        args.recipe = args.recipe or "quick"
        args.voc = os.path.join(sdrnet.toy_folder(), "VOCdevkit")
        args.train = args.train or "2007:trainval"
    args.train, args.recipe = args.train or "2007:trainval,2012:trainval", args.recipe or "voc"
    fill_defaults(args)
    candidates = list_candidates(args)
    data, tests = open_images(args)
    sdrnet.print0(f"{len(data):,} train, {len(tests):,} test images, {len(data.classes)} classes;",
                  *(f"{key}={value}" for key, value in sorted(vars(args).items())))
    place = functools.partial(os.path.join, args.out, "detection")
    arguments = {key: value for key, value in vars(args).items() if key not in RUN_ONLY}
    arguments["candidates"] = [name for name, _, _ in candidates]
    arguments["annotations"] = [data.digest, tests.digest]
    arguments["weights"] = [hashlib.sha256(Path(source).read_bytes()).hexdigest()
                            for source in dict.fromkeys(source for _, source, _ in candidates)]
    if sdrnet.rank() == 0:
        sdrnet.make_folder(place())
        files = ("metrics.json", "early_stopping.json", "last.pt", "detector.pt", "detections.png")
        for name in files if args.fresh else ():
            Path(place(name)).unlink(missing_ok=True)
    if sdrnet.world_size() > 1:
        dist.barrier()
    if os.path.exists(place("metrics.json")):
        with open(place("metrics.json")) as file:
            sdrnet.refuse_changes(json.load(file)["arguments"], arguments, place("metrics.json"))
        sdrnet.print0(f"{place('metrics.json')} is finished; --fresh trains anew")
        return
    sdrnet.catch_signals()                             # training saves at one, and ends
    name, source, digits = candidates[0]
    if len(candidates) > 1:
        name, source, digits = early_stopping(candidates, data, args, device,
                                              place("early_stopping.json"), arguments)
    everything = list(range(len(data)))
    model = make_detector(source, digits, data, args, device)
    train(model, data, everything, args, args.iterations, device, place("last.pt"), arguments)
    sdrnet.catch_signals(False)                        # the last step is saved
    recalibrate_bn(model, data, everything, args, device)
    found = detect(model, tests, list(range(len(tests))), args, device)
    truth = tests.truth(range(len(tests)))
    result = summary(evaluate(truth, found, len(data.classes)), data.classes)
    report(result)
    if sdrnet.rank() == 0:
        draw_detections(tests, found, place("detections.png"))
        sdrnet.save_checkpoint(place("detector.pt"), {
            "kind": "detector", "config": {"classes": data.classes, "test_side": args.test_side,
                                           "quick": args.recipe == "quick"},
            "backbone": model.backbone.net.config, "model": model.state_dict()})
        content = {"backbone": name, "path": digits, "arguments": arguments, "result": result,
                   "command": " ".join(sys.argv), "torch": str(torch.__version__)}
        sdrnet.save_json(place("metrics.json"), content)


def main():
    parser = build_parser()
    args = parser.parse_args()
    try:
        run(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
