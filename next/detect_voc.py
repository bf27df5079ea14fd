"""detect_voc.py - does a sub-net detect better? Faster R-CNN C4 on PASCAL VOC, from any backbone.

    python detect_voc.py                                     # toy scenes, the best routed sub-net
    python detect_voc.py --voc VOCdevkit --backbone subnet.pt --out runs/voc       # as published
    torchrun --nproc_per_node 8 detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --path 0,2,1,3
    python detect_voc.py --voc VOCdevkit --backbone sdrnet.pt --scores scores.npy --best 8
    python detect_voc.py --voc mine --train train --test val --recipe quick --test-side 192

In the paper's terms (SDR, AAAI 2022, "deployment"): the backbone is a sub-net W_i, and the whole
detector is fine-tuned. Which of several it is, early stopping says: each of --backbone, or of the
--best of a scores.npy, trains for --early-stop iterations on four fifths of the training images, the
rest judges, and the best starts over on all of them. --random keeps the shape alone: the control.

Detector (C4): stages 1 to 3 of the ResNet -> proposals (RPN) -> RoIAlign -> stage 4, one more
BatchNorm, mean -> class and box. Nothing is frozen, BatchNorm counts all processes.

Protocol, that of MoCo's and SimSiam's tables: VOC2007 and 2012 trainval to VOC2007 test, 24,000
iterations of 16 images, lr 0.02 (warm-up 100, a tenth after 18,000 and after 22,000), short side 480
to 800, test at 800, BatchNorm's statistics from 200 batches at the end ("precise BN"). Another
--batch-size B takes lr x B/16 and iterations x 16/B.

Which of our figures compares: voc_11_point. The published evaluator takes on VOC2007 the precision at
11 recalls; AP is the mean of that over IoU 0.50, 0.55 ... 0.95, AP50 and AP75 are its rows. The others:

    rule           precision at      matches                              IoU at t
    voc_11_point   11 recalls        the object it overlaps most          > t
    voc_area       all recalls       the same; VOC's rule since 2010      > t
    coco           101 recalls       the best object that is still free   >= t

VOC's files count pixels from 1 and include both ends: a width there is x2 - x1 + 1. Our boxes are
[x1 - 1, y1 - 1, x2, y2], floats, whose width is x2 - x1: the same number, so there is no + 1 here.

What still differs from the published code (MoCo's detection/, on detectron2):
  - both box losses: smooth L1 with torchvision's beta of 1/9; there 0, which is L1
  - scores and boxes are evaluated as they are; there rounded to 0.001 and 0.1 pixel, so ties differ
  - 3 of 10 found is a recall of 0.3; there it falls short of 3 * 0.1 by a rounding of floats
  - anchors are rounded to whole pixels (torchvision); there not
  - a batch is padded to multiples of 32 pixels and takes images as they come; there to its largest
    image, and portraits and landscapes are not mixed
  - BatchNorm weighs processes by their number of values; there equally
  - bf16 in backbone and head where CUDA has it (--amp off: fp32); boxes, losses, RPN always fp32
The same as there: objects marked difficult are trained on, and ignored by the evaluation; images
without objects are not trained on; anchors of 32 to 512 pixels by 1:2, 1:1, 2:1; 12,000 proposals
before and 2,000 after suppression (6,000 and 1,000 in testing); 512 regions an image, a quarter of
them on objects; aligned RoIAlign 14x14; initial weights; weight decay 1e-4 on all but BatchNorm;
mirroring; scores above 0.05, suppression at IoU 0.5, 100 detections an image.

In:   --voc       a folder with VOC2007/, VOC2012/ ... in it, or itself with JPEGImages/, Annotations/
                  and ImageSets/Main/; classes are found there
      --backbone  subnet.pt, sdrnet.pt, simsiam.pt, or a ResNet-18/34/50 of another code base. Default:
                  the sub-net of <out>/sdrnet.pt with the best mean score over the tasks routed there
Out:  <out>/detection/metrics.json         every figure, per class too, and all settings
                      detections.png       test images: the truth left, detections right
                      detector.pt          weights; build_detector(resnet(**config["backbone"]),
                                           **config["detector"]) takes them
                      early_stopping.json  the table
                      last.pt, log.jsonl   the state to go on from, bit for bit; a line a minute

Measured: MEASURED
"""
import argparse
import copy
import functools
import glob
import json
import math
import os
import sys
import time
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import RoIAlign

import sdrnet
from sdrnet import InputError

LONGEST = 1333                                         # pixels of an image's long side, at most
HELD_OUT = 0.2                                         # of the training images, for early stopping


# ------------------------------------------------------------------------------------ AP

def box_iou(a, b):
    """Intersection over union of boxes a (n, 4) with boxes b (k, 4), [x1, y1, x2, y2]: (n, k)."""
    a, b = a[:, None], b[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = sides.clip(0).prod(-1)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    return inter / (area_a + area_b - inter)


def match_voc(iou, difficult, threshold):
    """VOC's rule on one image and class. iou (n, k): n detections, highest score first, with k
    objects; difficult (k,). Returns int (n,): 1 true, 0 false, -1 does not count.

    A detection belongs to the object it overlaps most, found before or not. On a difficult object it
    does not count; else an object's first detection is true, all others are false."""
    verdict, found = np.zeros(len(iou), int), set()
    for d in np.flatnonzero(iou.max(1) > threshold):
        best = int(iou[d].argmax())                    # of equal ones the first
        if difficult[best]:
            verdict[d] = -1
        elif best not in found:
            verdict[d] = 1
            found.add(best)
    return verdict


def match_coco(iou, difficult, threshold):
    """COCO's rule; arguments and result as in match_voc.

    A detection takes the object it overlaps most of those still free: a difficult one only if there
    is no other, and then it does not count."""
    verdict, free = np.zeros(len(iou), int), np.ones(len(difficult), bool)
    for d in np.flatnonzero(iou.max(1) >= threshold):
        for kind, outcome in ((~difficult, 1), (difficult, -1)):
            wanted = np.where(free & kind & (iou[d] >= threshold), iou[d], -1)
            if wanted.max() >= 0:
                best = len(wanted) - 1 - wanted[::-1].argmax()         # of equal ones the last
                free[best] = False
                verdict[d] = outcome
                break
    return verdict


def precision_recall(verdict):
    """verdict (n,): of all detections of a class, highest score first. Returns for those that count
    how many are true so far, int (m,), and the highest precision from here on, float (m,)."""
    verdict = verdict[verdict >= 0]
    true = verdict.cumsum()
    precision = true / np.arange(1, len(true) + 1)
    return true, np.maximum.accumulate(precision[::-1])[::-1]


def average_11_point(true, precision, objects):
    """VOC2007: mean precision at the recalls 0, 0.1 ... 1. objects: how many there are to find.

    Recall true / objects >= k / 10 is compared in whole numbers: in floats 3/10 is below 3 * 0.1."""
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
    thresholds = np.linspace(0.5, 0.95, 10)
    rules = {"coco": (match_coco, average_coco), "voc_11_point": (match_voc, average_11_point),
             "voc_area": (match_voc, average_area)}
    table = {rule: np.full((classes, 10), np.nan) for rule in rules}
    for c in range(classes):
        objects = {key: value[truth["label"] == c] for key, value in truth.items()}
        to_find = int((~objects["difficult"]).sum())
        if to_find == 0:
            continue
        mine = {key: value[found["label"] == c] for key, value in found.items()}
        order = np.lexsort((-mine["score"], mine["image"]))            # by image, then by score
        mine = {key: value[order] for key, value in mine.items()}
        verdict = {match: np.zeros((10, len(order)), int) for match in (match_coco, match_voc)}
        images, first, count = np.unique(mine["image"], return_index=True, return_counts=True)
        verdict[match_coco][:, np.arange(len(order)) - first.repeat(count) >= 100] = -1
        for image, a, n in zip(images, first, count):
            here = objects["image"] == image
            if not here.any():                         # all false, as they stand
                continue
            iou, hard = box_iou(mine["box"][a:a + n], objects["box"][here]), objects["difficult"][here]
            for t, threshold in enumerate(thresholds):
                verdict[match_voc][t, a:a + n] = match_voc(iou, hard, threshold)
                verdict[match_coco][t, a:a + min(n, 100)] = match_coco(iou[:100], hard, threshold)
        ranked = np.argsort(-mine["score"], kind="stable")
        for rule, (match, average) in rules.items():
            for t in range(10):
                curve = precision_recall(verdict[match][t, ranked])
                table[rule][c, t] = average(*curve, to_find)
    return table


def summary(table, classes):
    """{rule: {AP, AP50, AP75, classes: {name: {AP, AP50}}}} in percent from evaluate's table; the mean
    is over classes that have objects, None where there are none."""
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
