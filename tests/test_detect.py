"""detect_voc.py: the evaluator against the published rules written out literally, several processes against one, an
interrupted run against a straight one, and everything that can be given wrongly."""
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import detect_voc
import sdrnet
from detect_voc import evaluate
from sdrnet import InputError

SMALL = ["--amp", "off", "--short-side", "96", "--test-side", "96", "--scenes", "12", "--test-scenes", "5", "--batch", "2", "--precise-bn", "2", "--rois", "16", "--device", "cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------- average precision

def tables(objects, detections, classes=1):
    """objects: (image, label, box, difficult); detections: (image, label, box, score)."""
    columns = lambda rows, last, kind: {"image": np.array([r[0] for r in rows], int), "label": np.array([r[1] for r in rows], int),
                                        "box": np.array([r[2] for r in rows], float).reshape(-1, 4), last: np.array([r[3] for r in rows], kind)}
    return columns(objects, "difficult", bool), columns(detections, "score", float), classes


def at50(objects, detections):
    """AP50 of class 0 by (COCO, VOC 11-point, VOC area)."""
    return tuple(evaluate(*tables(objects, detections))[rule][0, 0] for rule in ("coco", "voc_11_point", "voc_area"))


A, B, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def test_ap_of_cases_worked_by_hand():
    assert at50([(0, 0, A, 0)], [(0, 0, A, 0.9)]) == (1, 1, 1)
    assert at50([(0, 0, A, 0)], []) == (0, 0, 0)                                       # no detections
    assert at50([(0, 0, A, 0)], [(1, 0, A, 0.9)]) == (0, 0, 0)                         # in the wrong image
    assert np.isnan(at50([], [(0, 0, A, 0.9)])).all()                                  # no objects: undefined, not 0
    assert np.isnan(at50([(0, 0, A, 1)], [(0, 0, A, 0.9)])).all()                      # none but a difficult one
    # A twice, then B: true, false, true; precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    twice = [(0, 0, A, 0.9), (0, 0, A, 0.8), (0, 0, B, 0.7)]
    assert at50([(0, 0, A, 0), (0, 0, B, 0)], twice) == pytest.approx(((51 + 50 * 2 / 3) / 101, (6 + 5 * 2 / 3) / 11, 0.5 + 0.5 * 2 / 3))
    # 3 of 10 found: the recalls 0, 0.1, 0.2 and 0.3 are reached, also the last
    ten = [(i, 0, A, 0) for i in range(10)]
    assert at50(ten, [(i, 0, A, 0.9) for i in range(3)])[1:] == pytest.approx((4 / 11, 0.3))
    assert at50(ten, [(i, 0, A, 0.9) for i in range(5)]) == pytest.approx((51 / 101, 6 / 11, 0.5))


def test_difficult_objects_are_ignored():
    both = [(0, 0, A, 1), (0, 0, B, 0)]
    assert at50(both, [(0, 0, B, 0.7)]) == (1, 1, 1)                                   # not found: no loss
    assert at50(both, [(0, 0, A, 0.9), (0, 0, B, 0.7)]) == (1, 1, 1)                   # found: not false
    # found twice: VOC ignores both, COCO's rule lets a difficult object take one detection, the other is false
    assert at50(both, [(0, 0, A, 0.9), (0, 0, A, 0.8), (0, 0, B, 0.7)]) == pytest.approx((0.5, 1, 1))


def test_ties_in_score_and_in_overlap():
    one = [(1, 0, A, 0)]
    assert at50(one, [(1, 0, A, 0.5), (0, 0, A, 0.5)]) == pytest.approx((0.5, 0.5, 0.5))           # the lower image first
    assert at50(one, [(1, 0, A, 0.5), (2, 0, A, 0.5)]) == (1, 1, 1)
    assert at50(one, [(1, 0, FAR, 0.5), (1, 0, A, 0.5)]) == pytest.approx((0.5, 0.5, 0.5))         # within an image as given
    # one place, two objects, the first difficult: VOC takes the first, COCO the one that counts
    assert at50([(0, 0, A, 1), (0, 0, A, 0)], [(0, 0, A, 0.9)]) == (1, 0, 0)
    # the second detection overlaps the taken object most, and another enough: VOC false, COCO true
    near = [(0, 0, (0, 0, 10, 10), 0), (0, 0, (0, 0, 10, 14), 0)]
    assert at50(near, [(0, 0, (0, 0, 10, 10), 0.9), (0, 0, (0, 0, 10, 11), 0.8)]) == pytest.approx((1, 6 / 11, 0.5))


def test_pixel_conventions():
    """Pixels 1..10 and 1..5, both ends included, overlap by half; read as lengths 9 and 4 they would not."""
    a, b = np.array([[1.0, 1, 10, 10]]), np.array([[[1.0, 1, 10, 5]]])
    assert detect_voc.overlaps(a, b, 1) == 50 / 100 and detect_voc.overlaps(a, b, 0) == 36 / 81
    assert at50([(0, 0, (0, 0, 10, 10), 0)], [(0, 0, (0, 0, 10, 5), 0.9)]) == (1, 1, 1)            # the same boxes, continuous, by each rule
    assert at50([(0, 0, (0, 0, 10, 10), 0)], [(0, 0, (0, 0, 10, 4.99), 0.9)]) == (0, 0, 0)


def test_means_leave_out_classes_without_objects():
    truth, found, _ = tables([(0, 0, A, 0), (0, 2, B, 0)], [(0, 0, A, 0.9), (0, 1, A, 0.9)], 3)
    told = detect_voc.summary(evaluate(truth, found, 3), ["a", "b", "c"])["coco"]
    assert told["AP50"] == 50.0 and told["per_class"]["b"]["AP50"] is None and told["per_class"]["c"]["AP50"] == 0.0


def literal_overlap(a, b, plus):
    w, h = min(a[2], b[2]) - max(a[0], b[0]) + plus, min(a[3], b[3]) - max(a[1], b[1]) + plus
    if w <= 0 or h <= 0:
        return 0.0
    area = lambda r: (r[2] - r[0] + plus) * (r[3] - r[1] + plus)
    return w * h / (area(a) + area(b) - w * h)


def literal_voc(objects, detections, threshold):
    """The VOC development kit's rule, one detection after the other. Returns AP (11-point, area)."""
    one_based = lambda r: (r[0] + 1, r[1] + 1, r[2], r[3])
    npos, seen, tp, fp = sum(not o[3] for o in objects), set(), [], []
    for image, _, box, _ in sorted(detections, key=lambda d: (-d[3], d[0])):
        best, which = -1.0, None
        for k, o in enumerate(objects):
            if o[0] == image:
                overlap = literal_overlap(one_based(box), one_based(o[2]), 1)
                if overlap > best:
                    best, which = overlap, k
        if best >= threshold:
            if not objects[which][3]:
                tp.append(which not in seen), fp.append(which in seen)
                seen.add(which)
        else:
            tp.append(False), fp.append(True)
    points = [(sum(tp[:i + 1]), sum(tp[:i + 1]) / (i + 1)) for i in range(len(tp))]                # true positives, precision
    eleven = sum(max([p for n, p in points if 10 * n >= k * npos], default=0) for k in range(11)) / 11
    area = 0.0
    for n in range(1, npos + 1):
        area += max([p for m, p in points if m >= n], default=0) / npos
    return eleven, area


def literal_coco(objects, detections, threshold):
    """COCO's rule, image after image, detection after detection."""
    npos, flags = sum(not o[3] for o in objects), []
    for image in sorted({d[0] for d in detections}):
        mine = sorted([o for o in objects if o[0] == image], key=lambda o: o[3])
        taken = set()
        for d in sorted([d for d in detections if d[0] == image], key=lambda d: -d[3])[:100]:
            best, which = threshold, None
            for k, o in enumerate(mine):
                if k in taken:
                    continue
                if which is not None and not mine[which][3] and o[3]:
                    break                              # has one that counts, and only difficult ones follow
                overlap = literal_overlap(d[2], o[2], 0)
                if overlap >= best:
                    best, which = overlap, k
            taken.add(which)
            flags.append((d[3], which is not None, which is not None and bool(mine[which][3])))
    flags = [hit for _, hit, ignored in sorted(flags, key=lambda f: -f[0]) if not ignored]
    points = [(sum(flags[:i + 1]) / npos, sum(flags[:i + 1]) / (i + 1)) for i in range(len(flags))]
    return np.mean([max([p for r, p in points if r >= t], default=0) for t in np.linspace(0, 1, 101)])


def random_set(rng, classes):
    """Objects and detections on a coarse grid, so that equal scores, equal overlaps and overlaps of exactly 1/2 occur."""
    def box():
        corner, side = rng.integers(0, 12, 2), rng.integers(1, 9, 2)
        return tuple(np.r_[corner, corner + side].tolist())
    images, objects, detections = int(rng.integers(1, 6)), [], []
    for _ in range(rng.integers(0, 12)):
        objects.append((int(rng.integers(images)), int(rng.integers(classes)), box(), bool(rng.random() < 0.25)))
    for _ in range(rng.integers(0, 30)):
        image, label, place, score = int(rng.integers(images)), int(rng.integers(classes)), box(), round(rng.random(), int(rng.integers(1, 4)))
        if objects and rng.random() < 0.7:
            image, label, place, _ = objects[rng.integers(len(objects))]
            moved = np.array(place) + rng.integers(-1, 2, 4)
            place = tuple(moved.tolist()) if (moved[2:] > moved[:2]).all() else place
        detections.append((image, label, place, score))
    return objects, detections


def test_evaluator_equals_the_literal_rules_on_200_random_sets():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        objects, detections = random_set(rng, 2)
        if seed % 20 == 0:                             # more than 100 of a class, in an image with objects and in one without
            detections += [(int(i), 0, (0, 0, 3 + k % 9, 5), round(rng.random(), 3)) for i in (0, 7) for k in range(130)]
        got = evaluate(*tables(objects, detections, 2))
        for c in range(2):
            mine, found = [o for o in objects if o[1] == c], [d for d in detections if d[1] == c]
            for t in (0, 3, 5, 9):
                told = [got[rule][c, t] for rule in ("coco", "voc_11_point", "voc_area")]
                if all(o[3] for o in mine):
                    assert np.isnan(told).all()
                else:
                    threshold = np.linspace(0.5, 0.95, 10)[t]
                    expected = [literal_coco(mine, found, threshold), *literal_voc(mine, found, threshold)]
                    assert np.allclose(told, expected, rtol=0, atol=1e-12), (seed, c, t, told, expected)


def test_evaluator_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    for seed in range(20):
        objects, detections = random_set(np.random.default_rng(seed), 2)
        if not objects or not detections:
            continue
        sides = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
        truth = coco.COCO()
        truth.dataset = {"images": [{"id": i} for i in range(8)], "categories": [{"id": 0}, {"id": 1}], "annotations": [
            {"id": k + 1, "image_id": o[0], "category_id": o[1], "bbox": sides(o[2]), "iscrowd": 0, "area": 1e12 if o[3] else 1.0} for k, o in enumerate(objects)]}
        truth.createIndex()                            # an area beyond the range is COCO's own way to have an object ignored
        run = cocoeval.COCOeval(truth, truth.loadRes([{"image_id": d[0], "category_id": d[1], "bbox": sides(d[2]), "score": d[3]} for d in sorted(detections, key=lambda d: d[0])]), "bbox")
        run.evaluate(), run.accumulate()
        theirs = run.eval["precision"][:, :, :, 0, 2].mean(1).T
        ours = evaluate(*tables(objects, detections, 2))["coco"]
        assert np.allclose(np.nan_to_num(ours, nan=-1), theirs, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- scenes

def test_toy_scenes_are_a_function_of_seed_and_index_and_their_boxes_are_tight():
    some = detect_voc.toy_scenes(60, 3)
    again, other = detect_voc.toy_scenes(2, 3, start=7), detect_voc.toy_scenes(1, 4)
    assert np.array_equal(np.array(some.open_image(7)), np.array(again.open_image(0))) and np.array_equal(some.objects[8][0], again.objects[1][0])
    assert not np.array_equal(np.array(some.open_image(0)), np.array(other.open_image(0)))
    truth = some.truth()
    assert set(truth["label"]) == set(range(5)) and 0 < truth["difficult"].mean() < 0.2
    assert truth["box"].min() >= 0 and truth["box"].max() <= 96 and (truth["box"][:, 2:] - truth["box"][:, :2]).min() >= 1
    for kind in detect_voc.TOY_CLASSES:                # the outline is a signed distance, its area is what is written, it fits radius ~1
        y, x = np.mgrid[-1.2:1.2:241j, -1.2:1.2:241j]
        inside = detect_voc.toy_outline(kind, x, y) < 0
        assert inside.sum() * 0.01 ** 2 == pytest.approx(detect_voc.TOY_AREAS[kind], rel=0.03), kind
        assert 0.79 <= np.abs(np.stack([x[inside], y[inside]])).max() <= 1.12


def test_scaling_and_mirroring_keep_boxes_on_their_objects():
    picture = np.zeros((60, 90, 3), np.uint8)
    picture[12:30, 24:66] = 255                        # the box (24, 12, 66, 30)
    scenes = detect_voc.Scenes(["x"], lambda i: Image.fromarray(picture), [(90, 60)], [(np.array([[24.0, 12, 66, 30]]), np.array([0]), np.array([False]))], ["a"])
    for side, longest, flip, shape, box in ((60, 999, False, (60, 90), (24, 12, 66, 30)), (60, 999, True, (60, 90), (24, 12, 66, 30)),
                                            (120, 999, False, (120, 180), (48, 24, 132, 60)), (120, 90, True, (60, 90), (24, 12, 66, 30))):
        pixels, boxes = scenes.example(0, side, longest, flip)
        rows, columns = (pixels[0] > 127).nonzero(as_tuple=True)
        assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == (3, *shape) and np.allclose(boxes[0], box)
        assert np.allclose(boxes[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1)
    assert scenes.example(0, 60, 999, True)[1][0, 0] == 90 - 66


XML = "<annotation><filename>{image}</filename><size><width>{size}</width><height>{size}</height><depth>3</depth></size>{objects}</annotation>"
OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def make_voc(folder, count=6):
    """A VOCdevkit of toy scenes: train lists all but two, val those; shapes take the names of VOC's classes."""
    base, scenes = folder / "VOCdevkit" / "VOC2007", detect_voc.toy_scenes(count, 0)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / part).mkdir(parents=True)
    for i in range(count):
        scenes.open_image(i).save(base / "JPEGImages" / f"{i:06d}.jpg", quality=95)
        boxes, labels, difficult = scenes.objects[i]
        things = "".join(OBJECT.format(("cat", "dog", "bird", "boat", "bus")[k], int(h), int(b[0]) + 1, int(b[1]) + 1, int(b[2]), int(b[3])) for b, k, h in zip(boxes, labels, difficult))
        (base / "Annotations" / f"{i:06d}.xml").write_text(XML.format(image=f"{i:06d}.jpg", size=96, objects=things))
    (base / "ImageSets/Main/train.txt").write_text("".join(f"{i:06d}\n" for i in range(count - 2)))
    (base / "ImageSets/Main/val.txt").write_text("".join(f"{i:06d}  1\n" for i in range(count - 2, count)))
    return base


def test_voc_folders_are_read_in_voc_pixels(tmp_path):
    base, toy = make_voc(tmp_path), detect_voc.toy_scenes(6, 0)
    scenes = detect_voc.voc_scenes(str(base.parent), "2007:train, 2007:val", None)
    assert [os.path.basename(n) for n in scenes.names] == [f"{i:06d}.jpg" for i in range(6)] and set(scenes.classes) <= {"cat", "dog", "bird", "boat", "bus"}
    for i in range(6):
        assert np.array_equal(scenes.objects[i][0], toy.objects[i][0]) and np.array_equal(scenes.objects[i][2], toy.objects[i][2])
    assert len(detect_voc.voc_scenes(str(base), "val", None)) == len(detect_voc.voc_scenes(str(base.parent), "VOC2007:val", detect_voc.VOC_CLASSES)) == 2
    (base / "Annotations/000000.xml").write_text(XML.format(image="000000.jpg", size=96, objects=OBJECT.format("cat", 0, 0, 0, 97, 5) + OBJECT.format("cat", 1, 4, 4, 4, 4)))
    assert detect_voc.voc_scenes(str(base), "train", None).objects[0][0].tolist() == [[0, 0, 96, 5], [3, 3, 4, 4]]      # counted from 0; one pixel


def test_download_asks_torchvision(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets, "VOCDetection", lambda root, **options: asked.append((root, options)) or make_voc(tmp_path))
    args = detect_voc.parse(["--voc", str(tmp_path / "VOCdevkit"), "--download", "--train-sets", "2007:train", "--test-sets", "2007:val"])
    monkeypatch.setattr(detect_voc, "download", lambda devkit, sets, real=detect_voc.download: real(devkit, sets.split(",")[0]))
    train, test = detect_voc.open_scenes(args)
    assert asked == [(str(tmp_path), {"year": "2007", "image_set": "train", "download": True})] and (len(train), len(test)) == (4, 2)
    with pytest.raises(InputError, match="VOCdevkit"):
        detect_voc.download(str(tmp_path), "2007:train")


# ---------------------------------------------------------------------------- backbone and detector

@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    """A random sdrnet.pt of 16 sub-nets, and the network."""
    torch.manual_seed(0)
    net = sdrnet.SDRNet("resnet18", 8, 2, small_stem=True)
    path = tmp_path_factory.mktemp("net") / "sdrnet.pt"
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(0, 0.2), m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 1.5)
    sdrnet.save(str(path), sdrnet.checkpoint(net, "sdrnet"))
    return str(path), net.eval()


def test_a_backbone_is_loaded_to_its_last_tensor(supernet, tmp_path):
    path, net = supernet
    x = torch.randn(2, 3, 32, 32)
    for route in ("1,0,1,1", None):
        plain, shape, told = detect_voc.load_backbone(path, route)
        with torch.no_grad():
            assert torch.allclose(plain.eval()(x), net(x, None if route is None else (1, 0, 1, 1)), atol=1e-5)
        assert f"loaded {len(plain.state_dict())} of {len(plain.state_dict())} tensors" in told
    other, _, told = detect_voc.load_backbone(path, "1,0,1,1", scratch=True)
    assert "RANDOM" in told and not torch.equal(other.conv1.weight, net.conv1.weight)
    chosen = other.layer1[0].downsample[0].weight      # the first shortcut selects channels: that is shape, and stays
    assert torch.equal(chosen, net.extract((1, 0, 1, 1)).layer1[0].downsample[0].weight) and chosen.unique().tolist() == [0, 1]
    theirs = torchvision.models.resnet34().eval()
    torch.save(theirs.state_dict(), tmp_path / "r34.pth")
    plain, shape, told = detect_voc.load_backbone(str(tmp_path / "r34.pth"))
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        assert shape["arch"] == "resnet34" and torch.allclose(plain.eval()(x), theirs(x), atol=1e-5)


def test_anchors_are_exact_under_bf16():
    from torchvision.models.detection.image_list import ImageList
    images, maps = ImageList(torch.zeros(1, 3, 800, 1200), [(800, 1200)]), torch.zeros(1, 4, 50, 75)
    shape = ((32.0, 64.0),), ((0.5, 1.0, 2.0),)
    exact, = detect_voc.AnchorGenerator(*shape)(images, [maps])
    ours, = detect_voc.Anchors(*shape)(images, [maps.bfloat16()])
    assert ours.dtype == torch.float32 and torch.equal(ours, exact)


@pytest.mark.parametrize("form", ["c4", "fpn"])
def test_detector_trains_all_of_itself_and_comes_back_from_its_file(supernet, form, tmp_path):
    torch.manual_seed(0)
    net, shape, _ = detect_voc.load_backbone(supernet[0], "0,1,1,0")
    model = detect_voc.build(net, {"form": form, "classes": ["a", "b"], "test_side": 64, "rois": 16, "backbone": shape})
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}, {"boxes": torch.tensor([[20.0, 10, 60, 50]]), "labels": torch.tensor([2])}]
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    assert len(losses) == 4 and all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())     # nothing is frozen, nothing unused
    sdrnet.save(str(tmp_path / "d.pt"), {"format": 1, "kind": "detector", "config": model.config, "model": model.state_dict()})
    with torch.no_grad():
        a, b = model.eval()(images), detect_voc.load_detector(str(tmp_path / "d.pt"))(images)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def test_sampling_depends_on_seed_step_and_position_alone():
    labels = [(torch.arange(400) % (7 + i) == 0).float() for i in range(4)]
    sampler = detect_voc.Sampler(64, 0.5)
    sampler.key = (0, 5)
    whole = sampler(labels)
    torch.manual_seed(99)
    sampler.first = 2
    half = sampler(labels[2:])
    assert all(torch.equal(a, b) for w, h in zip(whole, half) for a, b in zip(w[2:], h))
    sampler.key = (0, 6)
    assert not all(torch.equal(a, b) for a, b in zip(half[1], sampler(labels[2:])[1]))
    assert [int((p | n).sum()) for p, n in zip(*whole)] == [64] * 4


def test_schedule_and_linear_rule(capsys):
    args = detect_voc.parse(["--voc", "x", "--batch", "4"])
    detect_voc.fill_defaults(args)
    assert (args.lr, args.iterations, args.warmup, args.steps) == (0.005, 96000, 400, [72000, 88000]) and "linear rule, 16 -> 4" in capsys.readouterr().out
    args = detect_voc.parse(["--voc", "x"])
    detect_voc.fill_defaults(args)
    assert (args.batch, args.lr, args.iterations, args.steps, args.short_side[0], args.short_side[-1], len(args.short_side), args.test_side, args.longest) == \
        (16, 0.02, 24000, [18000, 22000], 480, 800, 11, 800, 1333)
    rates = [detect_voc.learning_rate(s, args) for s in (0, 50, 100, 17999, 18000, 22000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.0002])
    assert detect_voc.halving_plan(8, 800) == [(100, 8), (200, 4), (400, 2), (800, 1)] and detect_voc.halving_plan(3, 90) == [(23, 3), (45, 2), (90, 1)]


# ---------------------------------------------------------------------------- several processes

def test_running_variance_is_that_of_several_processes():
    norm, x = detect_voc.Norm(8), torch.randn(6, 8, 5, 5)
    norm(x)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=0), atol=1e-6)


TWO = """
    import sys
    sys.path.insert(0, {root!r})
    import copy, numpy as np, torch, torch.distributed as dist
    import detect_voc as d
    dist.init_process_group("gloo")
    rank, device, args = dist.get_rank(), torch.device("cpu"), d.parse({small!r})
    d.fill_defaults(args)
    scenes = d.toy_scenes(5, 0)

    # BatchNorm over both processes is BatchNorm of the whole batch
    torch.manual_seed(0)
    x, g = torch.randn(6, 8, 5, 5), torch.randn(6, 8, 5, 5)
    mine, whole = slice(0, 4) if rank == 0 else slice(4, 6), torch.nn.BatchNorm2d(8)
    own, part, full = d.Norm(8), x[mine].clone().requires_grad_(), x.clone().requires_grad_()
    y, z = own(part), whole(full)
    y.backward(g[mine]), z.backward(g)
    assert torch.allclose(y, z[mine], atol=1e-5) and torch.allclose(part.grad, full.grad[mine], atol=1e-5)
    assert torch.allclose(own.running_mean, whole.running_mean, atol=1e-6) and torch.allclose(own.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=0), atol=1e-6)

    def half(r):
        images, targets = [], []
        for i in (2 * r, 2 * r + 1):
            image, boxes = scenes.example(i, 96, 160)
            images.append(image), targets.append({{"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(scenes.objects[i][1]) + 1}})
        return images, targets
    def alone(model, r):
        other, images = copy.deepcopy(model), half(r)
        for part in (other.rpn, other.roi_heads):
            part.fg_bg_sampler.key, part.fg_bg_sampler.first = (0, 3), 2 * r
        sum(other([x.float() / 255 for x in images[0]], images[1]).values()).backward()
        return [p.grad for p in other.parameters()]

    for form in ("c4", "fpn"):
        # DDP's gradient is the mean of the halves' gradients, each computed alone; BatchNorm with the same, fixed statistics
        torch.manual_seed(0)
        net, shape, _ = d.load_backbone({supernet!r})
        model = d.build(net, {{"form": form, "classes": d.TOY_CLASSES, "test_side": 96, "rois": 16, "backbone": shape}})
        for m in model.train().modules():
            if isinstance(m, d.Norm):
                m.eval()
        expected = [(a + b) / 2 for a, b in zip(alone(model, 0), alone(model, 1))]
        ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        sum(d.losses_of(ddp, *half(rank), 3, args, device).values()).backward()
        for p, e in zip(model.parameters(), expected):
            assert p.grad is not None and (p.grad - e).abs().max() <= 1e-5 * max(1e-2, e.abs().max()), (p.shape, (p.grad - e).abs().max(), e.abs().max())

        # every image once, on both processes, as one process finds them
        found = d.detect(model, scenes, args, device)
        for i in range(5):
            with torch.no_grad():
                out, = model([scenes.example(i, 96, 160)[0].float() / 255])
            at = found["image"] == i
            assert at.sum() == len(out["scores"]) and np.allclose(found["score"][at], out["scores"].double()) and np.allclose(found["box"][at], out["boxes"].double())
    print("both agree", flush=True)
    dist.destroy_process_group()
"""


def test_two_processes_equal_the_mean_of_halves_and_count_each_image_once(supernet, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO).format(root=ROOT, small=SMALL, supernet=supernet[0]))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)], capture_output=True, text=True, timeout=200, env=ONE_THREAD)
    assert done.returncode == 0 and done.stdout.count("both agree") == 2, done.stderr[-3000:]


# ---------------------------------------------------------------------------- the command

FORKS = """
    import json, os, sys
    sys.path.insert(0, {root!r})
    import detect_voc, pretrain
    cases, running, status = json.load(open({cases!r})), {{}}, {{}}
    while len(status) < len(cases):
        if len(running) < {together} and len(running) + len(status) < len(cases):
            i = len(running) + len(status)
            child = os.fork()
            if child == 0:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(f"{cases}.{{i}}.{{name}}", os.O_WRONLY | os.O_CREAT), number)
                sys.argv = ["detect_voc.py", *cases[i]]
                pretrain.run(detect_voc.main, "detect_voc.py")
                os._exit(0)
            running[child] = i
        else:
            child, code = os.wait()
            status[running.pop(child)] = os.waitstatus_to_exitcode(code)
    print(*(status[i] for i in range(len(cases))))
"""


def commands(cases, folder, together=1):
    """Runs each command line in a process of its own (forked, to import torch once): [(status, stdout, stderr)]."""
    path = folder / f"cases{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps([[str(a) for a in case] for case in cases]))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FORKS).format(root=ROOT, cases=str(path), together=together)], capture_output=True, text=True, timeout=300, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(int(status), *(open(f"{path}.{i}.{name}").read() for name in ("out", "err"))) for i, status in enumerate(done.stdout.split())]


def interrupt(argv, at):
    """Starts the script and sends SIGTERM when it tells of iteration `at`."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "detect_voc.py"), *map(str, argv)], stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith(f"iteration {at:6d} "):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    return process.wait()


def test_an_interrupted_run_ends_as_a_straight_one(supernet, tmp_path):
    common = [*SMALL, "--backbone", supernet[0], "--path", "0,1,0,1", "--iterations", "10"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert interrupt([*common, "--out", b], 3) == 143
    assert interrupt([*common, "--out", b], 7) == 143
    with open(b / "detector.last.pt", "r+b") as file:  # the newest state is damaged: the one before is used
        file.truncate(1000)
    straight, resumed, again, changed, fresh = commands([[*common, "--out", a], [*common, "--out", b], [*common, "--out", b], [*common, "--lr", "0.5", "--out", b],
                                                         [*common, "--iterations", "2", "--fresh", "--pictures", "0", "--out", a]], tmp_path)
    assert straight[0] == 0 and resumed[0] == 0 and "falling back" in resumed[1] and "continuing" in resumed[1], resumed
    x, y = (sdrnet.load(str(d / name))["model"] for d, name in ((a, "detector.pt.bak"), (b, "detector.pt")))
    assert all(torch.equal(x[k], y[k]) for k in x)
    left, right = (json.load(open(d / name)) for d, name in ((a, "metrics.json.bak"), (b, "metrics.json")))
    assert all(left[k] == right[k] for k in ("coco", "voc_11_point", "voc_area", "test")) and left["protocol"]["iterations"] == 10
    assert [json.loads(line)["step"] for line in open(b / "detector.log.jsonl")] == list(range(10))
    assert again[0] == 0 and "is finished" in again[1]
    assert changed[0] == 2 and "lr" in changed[2] and "--fresh" in changed[2] and changed[2].count("\n") == 1
    assert fresh[0] == 0 and (a / "metrics.json").exists() and (b / "detections.png").stat().st_size > 10_000


def test_choice_by_early_stopping(supernet, tmp_path):
    scores = np.full(16, 10.0, np.float32)
    scores[[3, 9, 12]] = 20, 30, np.nan
    np.save(tmp_path / "scores.npy", scores)
    common = [*SMALL, "--backbone", supernet[0], "--iterations", "8", "--pictures", "0"]
    best, named, again = commands([[*common, "--scores", tmp_path / "scores.npy", "--best", "3", "--out", tmp_path / "a"],
                                   [*common, "--candidates", "0,0,0,1", "largest", "--out", tmp_path / "b"],
                                   [*common, "--candidates", "0,0,0,1", "largest", "--out", tmp_path / "b"]], tmp_path)
    assert best[0] == named[0] == again[0] == 0, (best, named)
    about = json.load(open(tmp_path / "a" / "halving.json"))
    assert [list(t) for t in about["tables"]][0] == ["1,0,0,1", "0,0,1,1", "0,0,0,0"] and len(about["tables"][1]) == 2
    assert (about["iterations"], about["iterations_without_halving"]) == (3 * 2 + 2 * 2 + 4, 24) and "42 % saved" in best[1]
    metrics = json.load(open(tmp_path / "a" / "metrics.json"))
    assert metrics["chosen"] == about["chosen"] in about["tables"][1] and "goes on" in best[1] and "stops" in best[1]
    assert "is finished" in again[1] and "12 iterations instead of 16" in named[1].replace(",", "")


def test_bad_input_is_one_line_and_status_2(supernet, tmp_path):
    base = make_voc(tmp_path)
    pristine = {f: f.read_bytes() for f in base.rglob("*") if f.is_file()}
    common = [*SMALL, "--voc", base.parent, "--train-sets", "2007:train", "--test-sets", "2007:val", "--test-side", "96", "--short-side", "96", "--iterations", "1", "--backbone", supernet[0]]
    object_ = lambda *box, name="cat": XML.format(image="000000.jpg", size=96, objects=OBJECT.format(name, 0, *box))
    lol = '<?xml version="1.0"{}?><!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><annotation><filename>&c;</filename></annotation>'
    wrong = torchvision.models.resnet18().state_dict()
    wrong["layer2.0.conv1.weight"] = torch.zeros(3, 64, 3, 3)
    torch.save(wrong, tmp_path / "wrong.pth")
    torch.save({"hello": 1}, tmp_path / "other.pth")
    a0, j0, train = base / "Annotations/000000.xml", base / "JPEGImages/000000.jpg", base / "ImageSets/Main/train.txt"
    cases = [                                          # what the message names, the file that is spoilt and how, more arguments
        ("000000.xml", a0, XML.format(image="nothing.jpg", size=96, objects=""), []),
        ("000000.xml", a0, XML.format(image="../JPEGImages/000000.jpg", size=96, objects=""), []),
        ("000000.xml", a0, XML.format(image="", size=96, objects=""), []),
        ("000000.xml", a0, "<annotation><filename>", []),
        ("000000.xml", a0, object_(20, 20, 10, 30), []),                               # no area
        ("000000.xml", a0, object_(20, 20, 120, 30), []),                              # outside
        ("000000.xml", a0, object_(20, 20, "x", 30), []),
        ("000000.xml", a0, object_(20, 20, "nan", 30), []),
        ("unicorn", a0, object_(20, 20, 30, 30, name="unicorn"), []),
        ("document type", a0, lol.format(""), []),
        ("document type", a0, lol.format(' encoding="UTF-16"').encode("utf-16"), []),
        ("000000.jpg", j0, b"not a picture", []),
        ("96x96", j0, "a picture of another size", []),
        ("train.txt", train, "", []),
        ("../000000", train, "../000000\n", []),
        ("more than once", train, "000000\n000001\n000000\n", []),
        ("000077.xml", train, "000077\n", []),
        ("none with an object", train, "000001\n", ["--classes", "found"]),
        ("wrong.pth does not fit", None, None, ["--backbone", tmp_path / "wrong.pth"]),
        ("other.pth", None, None, ["--backbone", tmp_path / "other.pth"]),
        ("nowhere.pt", None, None, ["--backbone", tmp_path / "nowhere.pt"]),
        ("0,5,0,0", None, None, ["--path", "0,5,0,0"]),
        ("0,x,0,0", None, None, ["--path", "0,x,0,0"]),
        ("two different", None, None, ["--candidates", "0,0,0,0"]),
        ("test.txt", None, None, ["--test-sets", "2007:test"]),
        ("../x", None, None, ["--train-sets", "../x:train"]),
        ("no folder", None, None, ["--voc", tmp_path / "nothing"]),
        ("--batch", None, None, ["--batch", "0"]),
        ("--lr", None, None, ["--lr", "nan"]),
        ("unrecognized", None, None, ["--pathh", "0"]),
    ]
    small = tmp_path / "small.jpg"
    Image.new("RGB", (50, 40)).save(small)
    for k, (named, file, content, more) in enumerate(cases):           # a folder each, then all commands in one go
        folder = tmp_path / f"case{k}" / "VOCdevkit"
        for path, data in pristine.items():
            copy = folder / path.relative_to(base.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path == file:
                data = small.read_bytes() if named == "96x96" else content.encode() if isinstance(content, str) else content
            if named == "none with an object" and path.suffix == ".xml":
                data = data.replace(b"<difficult>0", b"<difficult>1")
            copy.write_bytes(data)
    results = commands([[*common, "--voc", tmp_path / f"case{k}" / "VOCdevkit", "--out", tmp_path / "out", *c[3]] for k, c in enumerate(cases)], tmp_path, together=3)
    for (named, *_), (status, _, err) in zip(cases, results):
        assert status == 2 and err.startswith("detect_voc.py: error: ") and err.count("\n") == 1 and named in err, (named, status, err)
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "detector.pt").exists()
    good, = commands([[*common, "--out", tmp_path / "out"]], tmp_path)                 # the same folder and arguments, unspoilt
    assert good[0] == 0 and "loaded" in good[1], good
