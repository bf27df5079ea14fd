"""Average precision by the published rules, annotations as tools write them, the detector."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import detect_voc
import frozen
import sdrnet
import toy
from conftest import ROOT

HERE = os.path.dirname(os.path.abspath(__file__))


# ------------------------------------------------------------------------------------ AP

def test_figures_are_those_of_the_first_version():
    """VOC's with the one comparison changed, to VOC's own: over the threshold, not at it."""
    with open(f"{HERE}/fixtures/average_precision.json") as file:
        wanted = json.load(file)
    truth, found = frozen.detections()
    table = detect_voc.evaluate(truth, found, 4)
    names = [str(c) for c in range(4)]
    for rule, row in detect_voc.summary(table, names).items():
        for key in ("AP", "AP50", "AP75"):
            assert row[key] == pytest.approx(wanted[rule][key], abs=1e-2)
        assert row["classes"]["3"]["AP"] is None


def random_set(seed):
    """Truth and detections of some images, with ties, difficult objects and empty images."""
    return frozen.detections(seed, count=6, classes=3)


def plain_iou(a, b):
    """Of two boxes [x1, y1, x2, y2]."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def ranked_detections(found, c):
    """Indices of a class's detections, highest score first, then by image, then as given."""
    rows = [i for i in range(len(found["score"])) if found["label"][i] == c]
    return sorted(rows, key=lambda i: (-found["score"][i], found["image"][i], i))


def plain_coco(truth, found, c, threshold):
    """COCO's rule in words: a detection takes the free object that it overlaps most, one that is
    not difficult before any that is; of an image's detections the first hundred count."""
    taken, seen, verdict = set(), {}, []
    for i in ranked_detections(found, c):
        image = found["image"][i]
        seen[image] = seen.get(image, 0) + 1
        if seen[image] > 100:
            continue
        near = {k: plain_iou(found["box"][i], truth["box"][k]) for k in range(len(truth["image"]))
                if truth["image"][k] == image and truth["label"][k] == c and k not in taken}
        near = {k: iou for k, iou in near.items() if iou >= threshold}
        easy = {k: iou for k, iou in near.items() if not truth["difficult"][k]}
        if not near:
            verdict.append(0)
            continue
        best = max(easy or near, key=lambda k: (near[k], k))
        taken.add(best)
        if easy:
            verdict.append(1)
    positives = sum(~truth["difficult"][truth["label"] == c])
    recall = np.cumsum(verdict) / positives
    precision = np.cumsum(verdict) / np.arange(1, len(verdict) + 1)
    return np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)])


def plain_voc(truth, found, c, threshold, eleven):
    """VOC's rules as its development kit writes them, an object and a detection at a time."""
    objects = {}
    keys = ("image", "label", "box", "difficult")
    for image, label, place, hard in zip(*(truth[key] for key in keys)):
        if label == c:
            objects.setdefault(image, []).append([place, hard, False])
    positives = sum(not hard for here in objects.values() for _, hard, _ in here)
    true, false = [], []
    for i in ranked_detections(found, c):
        box, best, most = found["box"][i], None, -np.inf
        for entry in objects.get(found["image"][i], []):
            iou = plain_iou(box, entry[0])
            if iou > max(most, 0):
                best, most = entry, iou
        hit, hard = most > threshold, best is not None and best[1]
        first = hit and not hard and not best[2]
        if first:
            best[2] = True
        true.append(first)
        false.append(not first and not (hit and hard))
    true, false = np.cumsum(true), np.cumsum(false)
    recall = [t / positives for t in true]
    precision = [t / max(t + f, 1e-9) for t, f in zip(true, false)]
    if eleven:
        return sum(max([p for p, t in zip(precision, true) if 10 * t >= k * positives], default=0)
                   for k in range(11)) / 11
    area, before = 0.0, 0.0
    for i, r in enumerate(recall):
        area += (r - before) * max(precision[i:])
        before = r
    return area


@pytest.mark.slow
def test_figures_are_the_rules_on_random_sets():
    for seed in range(200):
        truth, found = random_set(seed)
        table = detect_voc.evaluate(truth, found, 3)
        for c in range(2):
            if not (~truth["difficult"][truth["label"] == c]).any():
                continue
            for t, threshold in ((0, 0.5), (5, 0.75), (9, 0.95)):
                wanted = {"voc_11_point": plain_voc(truth, found, c, threshold, True),
                          "voc_area": plain_voc(truth, found, c, threshold, False),
                          "coco": plain_coco(truth, found, c, threshold)}
                for rule, figure in wanted.items():
                    assert table[rule][c, t] == pytest.approx(figure, abs=1e-6)


@pytest.mark.slow
def test_cocos_figures_are_pycocotools():
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval
    for seed in range(200):
        truth, found = random_set(seed)
        images = sorted({*truth["image"], *found["image"]})
        ours = detect_voc.evaluate(truth, found, 3)["coco"]

        def rows(part, **more):
            return [{"id": i + 1, "image_id": int(part["image"][i]), "bbox": [x, y, a - x, b - y],
                     "category_id": int(part["label"][i]), "area": (a - x) * (b - y),
                     **{key: values[i] for key, values in more.items()}}
                    for i, (x, y, a, b) in enumerate(part["box"].tolist())]
        data = coco.COCO()
        hard = truth["difficult"].astype(int).tolist()
        data.dataset = {"images": [{"id": int(i)} for i in images],
                        "categories": [{"id": c} for c in range(3)],
                        "annotations": rows(truth, iscrowd=[0] * len(hard), ignore=hard)}
        data.createIndex()
        theirs = COCOeval(data, data.loadRes(rows(found, score=found["score"].tolist())), "bbox")
        theirs._prepare()                              # which sets ignore from iscrowd, so again:
        for annotations in theirs._gts.values():
            for annotation in annotations:
                annotation["ignore"] = annotation["_ignore"] = hard[annotation["id"] - 1]
        theirs._prepare = lambda: None
        theirs.evaluate()
        theirs.accumulate()
        precision = theirs.eval["precision"][:, :, :, 0, 2]            # (10, 101, classes)
        for c in range(3):
            if (precision[:, :, c] > -1).all():
                assert np.allclose(precision[:, :, c].mean(1), ours[c], atol=1e-6)


# ------------------------------------------------------------------------------------ data

OBJECT = ("<object><name>{name}</name>{extra}<bndbox><xmin>{0}</xmin><ymin>{1}</ymin>"
          "<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>")


def write_voc(folder, xml, image="a.jpg", listing=b"a\n", size=(40, 30), orientation=None):
    """A folder of one image: black, a white square at x 11..20, y 6..15 of the picture shown."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[5:15, 10:20] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    if orientation:                                    # stored so that EXIF turns it upright
        exif[0x0112] = orientation
        picture = picture.transpose({3: Image.Transpose.ROTATE_180,
                                     6: Image.Transpose.ROTATE_90}[orientation])
    picture.save(folder / "JPEGImages" / image, quality=95, exif=exif)
    (folder / "Annotations" / "a.xml").write_text(f"<annotation>{xml}</annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_bytes(listing)
    return detect_voc.VOC(detect_voc.read_split(str(folder), "train"))


def holds_its_object(data):
    """Whether the box is where the white square is."""
    image, target = data[0, 30, False]
    boxes = target["boxes"]
    assert target["labels"].tolist() == [1]
    x1, y1, x2, y2 = boxes[0].round().int().tolist()
    inside = image[0, y1 + 1:y2 - 1, x1 + 1:x2 - 1].float()
    return inside.mean() > 230 and image.float().mean() < 60


SQUARE = OBJECT.format(11, 6, 20, 15, name="ink", extra="{extra}")
SIZE = "<size><width>40</width><height>30</height></size>"
CASES = {                                              # xml, more of write_voc
    "all that VOC writes": (SIZE + SQUARE.format(extra="<difficult>0</difficult>"), {}),
    "nothing but a box": (SQUARE.format(extra=""), {}),
    "floats": (OBJECT.format(10.6, 6.2, 20.3, 15.4, name="ink", extra=""), {}),
    "a stale filename": ("<filename>other.png</filename>" + SQUARE.format(extra=""), {}),
    "a path": ("<filename>C:\\x\\a.jpg</filename>" + SQUARE.format(extra=""), {}),
    "PNG": (SQUARE.format(extra=""), {"image": "a.png"}),
    "upper case": (SQUARE.format(extra=""), {"image": "a.JPG"}),
    "jpeg": (SQUARE.format(extra=""), {"image": "a.jpeg"}),
    "a mark, CRLF": (SQUARE.format(extra=""), {"listing": b"\xef\xbb\xbfa\r\n\r\n"}),
    "a second column": (SQUARE.format(extra=""), {"listing": b"a  -1\n"}),
    "an ending in the listing": (SQUARE.format(extra=""), {"listing": b"a.jpg 1\n"}),
    "a path in the listing": (SQUARE.format(extra=""), {"listing": b"images\\a.jpg\n"}),
    "upside down": (SIZE + SQUARE.format(extra=""), {"orientation": 3}),
    "lying, a square": (SQUARE.format(extra=""), {"orientation": 6, "size": (40, 40)}),
    "lying": (SIZE + SQUARE.format(extra=""), {"orientation": 6}),
    "lying, a TIFF": (SIZE + SQUARE.format(extra=""), {"orientation": 6, "image": "a.tif"}),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_annotations_are_read_as_their_tools_mean_them(tmp_path, name):
    xml, more = CASES[name]
    data = write_voc(tmp_path, xml, **more)
    assert data.classes == ["ink"] and holds_its_object(data)
    (_, plain), (mirrored, turned) = data[0, 30, False], data[0, 30, True]
    assert mirrored[0, 10, 40 if mirrored.shape[2] > 45 else mirrored.shape[2] - 15] > 200
    right = float(plain["boxes"][0, 2])
    assert turned["boxes"][0, 0] == pytest.approx(mirrored.shape[2] - right)


def test_a_raster_that_fits_its_annotation_only_as_it_lies_is_not_turned(tmp_path):
    xml = "<size><width>30</width><height>40</height></size>" + box(1, 1, 9, 9)
    data = write_voc(tmp_path, xml, orientation=6)     # stored 30 x 40, shown 40 x 30
    assert data.turned == [False] and data.sizes == [(30, 40)]


@pytest.mark.parametrize("text, hard", [("1", True), ("true", True), ("True", True), ("1.0", True),
                                        ("0", False), ("false", False), ("", False)])
def test_difficult_is_what_tools_write(tmp_path, text, hard):
    for tag in ("difficult", "Difficult"):
        xml = SQUARE.format(extra=f"<{tag}>{text}</{tag}>")
        assert write_voc(tmp_path, xml).difficult[0].tolist() == [hard]


def test_the_image_of_a_name_is_its_own(tmp_path):
    write_voc(tmp_path, SQUARE.format(extra=""))
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / "a.b.jpg")
    data = detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train"))
    assert os.path.basename(data.paths[0]) == "a.jpg" and holds_its_object(data)
    os.rename(tmp_path / "Annotations" / "a.xml", tmp_path / "Annotations" / "photo 1.xml")
    os.rename(tmp_path / "JPEGImages" / "a.jpg", tmp_path / "JPEGImages" / "photo 1.jpg")
    for listing in ("photo 1\n", "photo 1.jpg\n", "photo 1.jpg 1\n"):
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(listing)
        assert holds_its_object(detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train")))


def test_an_image_counts_once_and_what_is_said_of_it_is_digested(tmp_path):
    first = write_voc(tmp_path, SQUARE.format(extra=""), listing=b"a\na\n")
    assert len(first) == 1
    other = write_voc(tmp_path / "other", SQUARE.format(extra=""))
    assert other.digest == first.digest
    (tmp_path / "Annotations" / "a.xml").write_text(
        (tmp_path / "Annotations" / "a.xml").read_text().replace("<name>ink", "<name>pen"))
    again = detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train"))
    assert again.digest != first.digest


def test_pixels_are_those_that_pre_training_sees(tmp_path):
    data = write_voc(tmp_path, SQUARE.format(extra=""))
    grey = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    Image.fromarray(grey).save(tmp_path / "JPEGImages" / "a.png")
    data = detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train"))
    assert np.abs(np.asarray(data.pixels(0))[..., 0] - grey / 257).max() <= 1


def test_boxes_may_leave_the_image_by_a_pixel(tmp_path):
    data = write_voc(tmp_path, OBJECT.format(0, 0, 41, 31, name="x", extra=""))
    assert data.boxes[0].tolist() == [[0, 0, 40, 30]]


def box(*corners, name="x"):
    return OBJECT.format(*corners, name=name, extra="")


WRONG = {"no area": (box(9, 5, 3, 15), "a.xml: box [9.0, 5.0, 3.0, 15.0] has no area"),
         "shares of the image": (box(0.1, 0.2, 0.3, 0.9), "is outside of its image"),
         "outside": (box(1, 1, 44, 9), "is outside of its image of 40 x 30"),
         "no number": (box("one", 1, 4, 9), "a.xml is no VOC annotation"),
         "nan": (box("nan", 1, 4, 9), "has no area"),
         "no name": ("<object></object>", "a.xml is no VOC annotation"),
         "no object": ("", "no image of the split has an object"),
         "not XML": ("<", "a.xml is no VOC annotation"),
         "a size of nan": (SIZE.replace("40", "nan") + box(1, 1, 4, 9), "is no VOC annotation"),
         "size": (SIZE.replace("40", "9") + box(1, 1, 4, 9), "says 9 x 30")}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_cannot_be_right_is_one_line_with_the_files_name(tmp_path, name):
    xml, said = WRONG[name]
    with pytest.raises(sdrnet.InputError) as error:
        write_voc(tmp_path, xml)
    assert said in str(error.value)


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    write_voc(tmp_path, SQUARE)
    for name, said in (("Annotations/a.xml", "a.xml: there is no such file"),
                       ("ImageSets/Main/train.txt", "names no image"),
                       ("JPEGImages/a.jpg", "a.jpg cannot be read as an image")):
        content = (tmp_path / name).read_bytes()
        if name.endswith("xml"):
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(sdrnet.InputError, match=said.replace("(", ".")):
            detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train"))
        (tmp_path / name).write_bytes(content)
    with pytest.raises(sdrnet.InputError, match="'ink' is not one of red, blue"):
        detect_voc.VOC(detect_voc.read_split(str(tmp_path), "train"), ["red", "blue"])
    with pytest.raises(sdrnet.InputError, match="no .*val.txt"):
        detect_voc.read_split(str(tmp_path), "val")


# ------------------------------------------------------------------------------------ detector

def tiny_detector():
    torch.manual_seed(0)
    net = sdrnet.resnet("resnet18", (8, 16, 32, 64), 8, norm_layer=sdrnet.BatchNorm)
    return detect_voc.build_detector(net, 3, side=64, quick=True, amp="off").double()


def gradients(world):
    """Of the losses on four images, this process's share of them, in float64."""
    model = tiny_detector()
    ddp = DistributedDataParallel(model) if world > 1 else model
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.random((3, 96, 96))) for _ in range(4)]     # of 540 anchors
    targets = [{"boxes": torch.tensor([[8.0 + i, 10, 40, 44]], dtype=torch.float64),
                "labels": torch.tensor([1 + i % 3])} for i in range(4)]
    share = 4 // world
    mine = slice(share * sdrnet.rank(), share * (sdrnet.rank() + 1))
    losses = detect_voc.losses_of(ddp, images[mine], targets[mine], 5, 7)
    sum(losses.values()).backward()
    return [parameter.grad for parameter in model.parameters()]


def worker(rank, world, path):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541", RANK=str(rank),
                      WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo")
    result = gradients(world)
    if rank == 0:
        torch.save(result, path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    mp.spawn(worker, (2, str(tmp_path / "g.pt")), 2)
    for a, b in zip(gradients(1), torch.load(tmp_path / "g.pt")):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_frozen_and_stage_4_is_the_head():
    model = tiny_detector()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.backbone.out_channels == 32 and model.roi_heads.box_head.norm.num_features == 64
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(isinstance(m, sdrnet.BatchNorm) for m in norms)


def test_the_schedule_is_the_published_one():
    steps = (0, 50, 100, 17999, 18000, 22000)
    rates = [detect_voc.learning_rate(step, 0.02, 24000, 100) for step in steps]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.0002])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes, and a sub-net in a folder as route.py leaves it."""
    folder = tmp_path_factory.mktemp("scenes")
    toy.write_scenes(folder / "VOC2007", 0)
    for part, count in (("trainval", 24), ("test", 6)):
        listing = folder / "VOC2007" / "ImageSets" / "Main" / f"{part}.txt"
        listing.write_text("\n".join(listing.read_text().splitlines()[:count]))
    net = sdrnet.SDRNet("resnet18", 8, 2)
    sdrnet.recalibrate_bn(net, lambda prefix: [torch.randn(16, 3, 32, 32)])
    sdrnet.save_checkpoint(folder / "sdrnet.pt", {
        "kind": "sdrnet", "config": net.config, "image_size": 32, "heads": {}, "origin": {},
        "backbone": net.resnet.state_dict(), "statistics": net.prefix_statistics()})
    (folder / "task").mkdir()
    np.save(folder / "task" / "scores.npy", np.arange(16, dtype=np.float32))
    return folder


def arguments(scenes, out, *more):
    return ["--voc", scenes, "--train", "2007:trainval", "--recipe", "quick", "--test-side", 64,
            "--batch-size", 4, "--iterations", 4, "--workers", 0, "--out", out, *more]


def candidates(scenes, *options):
    return detect_voc.list_candidates(detect_voc.build_parser().parse_args(
        ["--out", str(scenes), *map(str, options)]))


def test_the_sub_net_is_the_one_asked_for(scenes, tmp_path):
    network = str(scenes / "sdrnet.pt")
    assert candidates(scenes) == [("sub-net 15, path 1,1,1,1", network, "1,1,1,1")]
    assert candidates(scenes, "--path", "0,1,1,0") == [(network, network, "0,1,1,0")]
    best = candidates(scenes, "--scores", scenes / "task" / "scores.npy", "--best", 2)
    assert [path for _, _, path in best] == ["1,1,1,1", "1,1,1,0"]
    np.save(tmp_path / "scores.npy", np.zeros(256))
    with pytest.raises(sdrnet.InputError, match="2.4 sub-nets"):       # of a network of g = 4
        candidates(scenes, "--scores", tmp_path / "scores.npy")
    (tmp_path / "scores.npy").write_bytes(b"")
    with pytest.raises(sdrnet.InputError, match="no scores.npy"):
        candidates(scenes, "--scores", tmp_path / "scores.npy")
    for scores in (np.full(16, np.nan), np.float32(3), np.zeros((16, 16))):
        np.save(tmp_path / "scores.npy", scores)
        with pytest.raises(sdrnet.InputError, match="no scores.npy"):
            candidates(scenes, "--scores", tmp_path / "scores.npy")
    for name, said in (("scores.npy", "score alike"), ("test_scores.npy", "no scores.npy")):
        np.save(tmp_path / name, np.zeros(16))
        with pytest.raises(sdrnet.InputError, match=said):
            candidates(scenes, "--scores", tmp_path / name)
    np.save(tmp_path / "scores.npy", np.arange(16.0))
    (tmp_path / "result.json").write_text('{"origin": {"weights": "of another network"}}')
    with pytest.raises(sdrnet.InputError, match="run route.py again"):
        candidates(scenes, "--scores", tmp_path / "scores.npy")
    best = candidates(scenes, "--backbone", network, "--best", 3)
    assert [path for _, _, path in best] == ["1,1,1,1", "1,1,1,0", "1,1,0,1"]
    with pytest.raises(sdrnet.InputError, match="leave out --path"):
        candidates(scenes, "--scores", scenes / "task" / "scores.npy", "--path", "0,1,1,0")


def run(*options):
    """detect_voc.py by its command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["detect_voc.py", *map(str, options)])
        detect_voc.main()


@pytest.mark.slow
def test_early_stopping_chooses_and_the_best_starts_over(scenes, tmp_path, capsys):
    options = arguments(scenes, tmp_path, "--scores", scenes / "task" / "scores.npy", "--best", 2,
                        "--early-stop", 2, "--backbone", scenes / "sdrnet.pt",
                        "--classes", "disc, square , star,triangle")
    run(*options)
    table = json.loads((tmp_path / "detection" / "early_stopping.json").read_text())["table"]
    assert set(table) == {"sub-net 15, path 1,1,1,1", "sub-net 14, path 1,1,1,0"}
    metrics = json.loads((tmp_path / "detection" / "metrics.json").read_text())
    assert table[metrics["backbone"]]["AP"] == max(row["AP"] for row in table.values())
    assert set(metrics["result"]) == {"coco", "voc_11_point", "voc_area"}
    assert set(metrics["result"]["coco"]["classes"]) == {"disc", "square", "star", "triangle"}
    with Image.open(tmp_path / "detection" / "detections.png") as picture:
        assert picture.size[0] > 1000
    run(*options)
    assert "is finished" in capsys.readouterr().out
    path = tmp_path / "detection" / "early_stopping.json"              # what it holds stays
    content = json.loads(path.read_text())
    for name, figure in zip(sorted(table), (37.5, 12.5)):
        content["table"][name] = {"AP": figure, "AP50": figure}
    path.write_text(json.dumps(content))
    for name in ("metrics.json", "last.pt"):
        (tmp_path / "detection" / name).unlink()
    run(*options)
    metrics = json.loads((tmp_path / "detection" / "metrics.json").read_text())
    assert metrics["backbone"] == sorted(table)[0] and metrics["path"] == "1,1,1,0"
    with pytest.raises(SystemExit):
        run(*options, "--lr", 0.5)
    assert "lr 0.02 -> 0.5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_bit_for_bit(scenes, tmp_path, number):
    options = [str(option) for option in arguments(
        scenes, tmp_path / "a", "--backbone", scenes / "sdrnet.pt", "--path", "0,1,1,0")]
    run(*options)
    options[options.index(str(tmp_path / "a"))] = str(tmp_path / "b")
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "detect_voc.py"), *options],
                               stdout=subprocess.PIPE, text=True)
    time.sleep(0.1)
    while "loaded" not in process.stdout.readline():   # training begins
        assert process.poll() is None
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        state = torch.load(tmp_path / "b" / "detection" / "last.pt", weights_only=True)
        assert 0 < state["step"] < 4
    run(*options)
    a, b = (torch.load(tmp_path / name / "detection" / "detector.pt", weights_only=True)["model"]
            for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)
