"""Tasks: the paper's eleven by name, each from a tiny copy in its data set's own layout on disk, and folders of odd shapes.

Every picture is one flat colour that tells its number, so that a decoded image says which file it came from: a label is
right when it is the label of THAT file, and a split is right when it holds THOSE files.
"""
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import pretrain
import route
import sdrnet
from sdrnet import InputError, SDRNet

# (part, label) of each picture; its place in the list is its number. Where a data set has no validation part, "val"
# is written as training images; "unlisted" lies on disk and belongs to no part.
ENTRIES = list(zip(["train"] * 4 + ["val"] * 3 + ["test"] * 5 + ["unlisted"], [0, 1, 2, 0, 2, 1, 0, 2, 0, 1, 2, 1, 1]))
LISTS = {"train": ["train"], "val": ["val"], "trainval": ["train", "val"], "test": ["test"]}
VOC_SETS = [(11, 14), (0,), (8, 14, 19)]               # dog and person; aeroplane; chair, person and tvmonitor


def by_number(number, label):
    return 16 * (number % 16) + 8, 16 * (number // 16) + 8, 128


def by_label(number, label):
    """Images of a class are alike: what a nearest neighbour must get right."""
    return [(230, 30, 30), (30, 230, 30), (30, 30, 230)][label]


def number_of(pixels):
    """The number of a picture painted by_number; steps of 16 survive JPEG."""
    red, green = pixels[:2].float().mean((1, 2)).long().tolist()
    return red // 16 + 16 * (green // 16)


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path)


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8")


def entries(*parts):
    """(number, label) of the pictures in these parts, or of all."""
    return [(n, label) for n, (part, label) in enumerate(ENTRIES) if not parts or part in parts]


# ---------------------------------------------------------------------------- the layouts on disk
# Each function writes its data set under `root` and returns {number: (part, label)}. Beside what is read lies what must
# not be: other levels of labels, other partitions, unlisted images. Class names are in an order of their own wherever the
# data set numbers its classes by a file and not by the alphabet.

def aircraft(root, paint=by_number):
    data, variants = root / "fgvc-aircraft-2013b" / "data", ["Boeing 717", "A300B4", "F/A-18"]
    text(data / "variants.txt", variants)
    text(data / "families.txt", ["Airbus"])
    for name, parts in LISTS.items():
        text(data / f"images_variant_{name}.txt", [f"{1000000 + n} {variants[c]}" for n, c in entries(*parts)])
        text(data / f"images_family_{name}.txt", [f"{1000000 + n} Airbus" for n, _ in entries(*parts)])
    for n, c in entries():
        picture(data / "images" / f"{1000000 + n}.jpg", paint(n, c))
    return dict(enumerate(ENTRIES))


def caltech101(root, paint=by_number):
    """No lists: 30 images of each class train, so the classes are of 34 and 31. BACKGROUND_Google is no class."""
    folder, written = root / "caltech101" / "101_ObjectCategories", {}
    for c, (name, count) in enumerate([("Faces", 34), ("accordion", 31)]):
        for i in range(count):
            n = len(written)
            picture(folder / name / f"image_{i + 1:04d}.jpg", paint(n, c))
            written[n] = (None, c)
    picture(folder / "BACKGROUND_Google" / "image_0001.jpg", (0, 0, 0))
    return written


def cars(root, paint=by_number):
    folder = root / "stanford_cars"
    fields = [(f, "u2") for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")] + [("class", "u1"), ("fname", "U9")]
    for where, file, parts in (("cars_train", "devkit/cars_train_annos.mat", ["train", "val"]), ("cars_test", "cars_test_annos_withlabels.mat", ["test"])):
        rows = []
        for i, (n, c) in enumerate(entries(*parts), 1):            # both folders count from 00001.jpg
            picture(folder / where / f"{i:05d}.jpg", paint(n, c))
            rows.append((1, 1, 9, 9, c + 1, f"{i:05d}.jpg"))
        (folder / "devkit").mkdir(exist_ok=True)
        savemat(folder / file, {"annotations": np.array(rows, fields)[None]})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([["Audi TT", "BMW M3", "AM General"]], object)})
    return dict(enumerate(ENTRIES[:-1]))


def cifar(folder, files, paint, **labels):
    """files: {name: entries}; labels: {key of the pickled dict: function of a label}."""
    folder.mkdir(parents=True)
    for name, rows in files.items():
        pixels = [np.asarray(Image.new("RGB", (32, 32), paint(n, c))).transpose(2, 0, 1).ravel() for n, c in rows]
        content = {"data": np.array(pixels, np.uint8), "filenames": [f"{n}.png" for n, _ in rows], **{k: [f(c) for _, c in rows] for k, f in labels.items()}}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return dict(enumerate(ENTRIES[:-1]))


def cifar10(root, paint=by_number):
    train = entries("train", "val")
    files = {f"data_batch_{b + 1}": train[b:7 if b == 4 else b + 1] for b in range(5)}     # five batches, the last of three
    folder = root / "cifar-10-batches-py"
    written = cifar(folder, {**files, "test_batch": entries("test")}, paint, labels=lambda c: c)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile", "bird"]}))
    return written


def cifar100(root, paint=by_number):
    folder = root / "cifar-100-python"
    written = cifar(folder, {"train": entries("train", "val"), "test": entries("test")}, paint, fine_labels=lambda c: c, coarse_labels=lambda c: 2 - c)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "aquarium_fish", "baby"], "coarse_label_names": ["fish", "fruit", "people"]}))
    return written


def dtd(root, paint=by_number):
    folder, names = root / "dtd" / "dtd", ["banded", "dotted", "zigzagged"]
    path = lambda n, c: f"{names[c]}/{names[c]}_{n:04d}.jpg"
    for part, other in (("train", "test"), ("val", "train"), ("test", "val")):
        text(folder / "labels" / f"{part}1.txt", [path(n, c) for n, c in entries(part)])
        text(folder / "labels" / f"{part}2.txt", [path(n, c) for n, c in entries(other)])      # the second partition of ten
    for n, c in entries():
        picture(folder / "images" / path(n, c), paint(n, c))
    return dict(enumerate(ENTRIES))


def flowers(root, paint=by_number):
    folder = root / "flowers-102"
    for n, c in entries():
        picture(folder / "jpg" / f"image_{n + 1:05d}.jpg", paint(n, c))
    savemat(folder / "imagelabels.mat", {"labels": np.array([[c + 1 for _, c in entries()]], np.uint8)})
    savemat(folder / "setid.mat", {key: np.array([[n + 1 for n, _ in entries(part)]], np.uint16) for key, part in (("trnid", "train"), ("valid", "val"), ("tstid", "test"))})
    return dict(enumerate(ENTRIES))


def food(root, paint=by_number):
    folder, names = root / "food-101", ["apple_pie", "beet_salad", "waffles"]
    text(folder / "meta" / "classes.txt", names)
    for file, parts, order in (("train", ["train", "val"], (2, 0, 1)), ("test", ["test"], (1, 2, 0))):     # an order of its own in each file
        table = {names[c]: [f"{names[c]}/{n}" for n, label in entries(*parts) if label == c] for c in order}
        text(folder / "meta" / f"{file}.json", [json.dumps(table)])
    for n, c in entries():
        picture(folder / "images" / names[c] / f"{n}.jpg", paint(n, c))
    return dict(enumerate(ENTRIES))


def pets(root, paint=by_number):
    folder, names = root / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "Egyptian_Mau"]
    line = lambda n, c: f"{names[c]}_{n} {c + 1} {1 + c % 2} {1 + c // 2}"                 # class, cat or dog, breed
    text(folder / "annotations" / "list.txt", ["#Image CLASS-ID SPECIES BREED ID", *(line(n, c) for n, c in entries())])
    for part in ("trainval", "test"):
        text(folder / "annotations" / f"{part}.txt", [line(n, c) for n, c in entries(*LISTS[part])])
    for n, c in entries():
        picture(folder / "images" / f"{names[c]}_{n}.jpg", paint(n, c))
    return dict(enumerate(ENTRIES))


def sun397(root, paint=by_number):
    folder, names = root / "SUN397", ["/b/bakery/shop", "/a/abbey", "/a/apartment_building/outdoor"]
    path = lambda n, c: f"{names[c]}/sun_{n:016x}.jpg"
    text(folder / "ClassName.txt", names)
    for first, second in (("Training", "Testing"), ("Testing", "Training")):
        parts = LISTS["trainval" if first == "Training" else "test"]
        text(folder / f"{first}_01.txt", [path(n, c) for n, c in entries(*parts)])
        text(folder / f"{second}_02.txt", [path(n, c) for n, c in entries(*parts)])        # the second partition of ten
    for n, c in entries():
        picture(folder / path(n, c)[1:], paint(n, c))
    return dict(enumerate(ENTRIES))


def voc2007(root, paint=by_number):
    folder, classes = root / "VOCdevkit" / "VOC2007", pretrain.VOC_CLASSES
    for name, parts in LISTS.items():
        text(folder / "ImageSets" / "Main" / f"{name}.txt", [f"{n:06d}" for n, _ in entries(*parts)])
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for n, c in entries():
        things = [classes[k] for k in VOC_SETS[c]]
        objects = "".join(f"<object><name>{t}</name><difficult>0</difficult>{box}<part><name>head</name>{box}</part></object>" for t in things + things[:1])
        text(folder / "Annotations" / f"{n:06d}.xml", [f"<annotation><filename>{n:06d}.jpg</filename>{objects}</annotation>"])
        picture(folder / "JPEGImages" / f"{n:06d}.jpg", paint(n, c))
    return {n: (part, [int(k in VOC_SETS[c]) for k in range(20)]) for n, (part, c) in enumerate(ENTRIES)}


LAYOUTS = {f.__name__: f for f in (aircraft, caltech101, cars, cifar10, cifar100, dtd, flowers, food, pets, sun397, voc2007)}
METRICS = {"aircraft": "mean-per-class", "caltech101": "mean-per-class", "flowers": "mean-per-class", "pets": "mean-per-class", "voc2007": "mAP"}


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch):
    """torchvision compares some files' md5 with the official ones; for a tiny copy it is enough that they are there."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


# ---------------------------------------------------------------------------- the eleven

@pytest.mark.parametrize("name", LAYOUTS)
def test_named_task_has_its_official_split_metric_and_labels_in_one_numbering(name, tmp_path):
    written = LAYOUTS[name](tmp_path)
    task = route.named_task(name, str(tmp_path), False)
    assert task.name == name and task.metric == METRICS.get(name, "top-1")
    numbers = {}
    for part in ("train", "test"):
        images = getattr(task, part)
        numbers[part] = [number_of(images.decode(i)) for i in range(len(images))]
        assert images.labels.dtype == torch.int64 and images.labels.tolist() == [written[n][1] for n in numbers[part]]
        assert len(set(images.names)) == len(images) and all(name in n for n in images.names)
    if name == "caltech101":
        assert sorted(numbers["train"] + numbers["test"]) == sorted(written)       # each image once, in one of the two
        assert task.train.labels.bincount().tolist() == [30, 30] and task.test.labels.bincount().tolist() == [4, 1]
    else:
        assert sorted(numbers["train"]) == [n for n, (part, _) in written.items() if part in ("train", "val")] and len(task.train) == 7
        assert sorted(numbers["test"]) == [n for n, (part, _) in written.items() if part == "test"] and len(task.test) == 5
    assert len(task.train.classes) == {"voc2007": 20, "caltech101": 2}.get(name, 3)
    again = route.named_task(name, str(tmp_path), False)
    assert [number_of(again.train.decode(i)) for i in range(len(again.train))] == numbers["train"]


def test_the_list_of_images_does_not_depend_on_the_order_of_the_disk(tmp_path, monkeypatch):
    """A folder is read in whatever order the file system likes, and --max-images draws by position."""
    from pathlib import Path
    sun397(tmp_path)
    order = lambda: [number_of(images.decode(i)) for images in [route.named_task("sun397", str(tmp_path), False).train] for i in range(len(images))]
    before, rglob = order(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *a, **k: iter(list(rglob(*a, **k))[::-1]))
    assert order() == before


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_or_wrong_root_is_an_input_error_that_names_the_task(name, tmp_path):
    whole, empty, hollow, file = (tmp_path / n for n in ("whole", "empty", "hollow", "file"))
    LAYOUTS[name](whole)
    empty.mkdir()
    file.write_text("no folder")
    for where, _, _ in os.walk(whole):                 # as after an unpacking that was interrupted: folders, no files
        (hollow / os.path.relpath(where, whole)).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=f"{name}.*--root"):
        route.named_task(name, None, False)
    for root in (tmp_path / "nowhere", empty, hollow, file, next(whole.iterdir())):
        with pytest.raises(InputError, match=name) as problem:
            route.named_task(name, str(root), False)
        assert "\n" not in str(problem.value)
    assert not (tmp_path / "nowhere").exists() and not list(empty.iterdir())       # looking leaves nothing behind


def without_its_first_line(file):
    file.write_text(file.read_text().split("\n", 1)[1])


@pytest.mark.parametrize("name,file,damage,says", [
    ("aircraft", "fgvc-aircraft-2013b/data/variants.txt", without_its_first_line, "Boeing 717"),
    ("caltech101", "caltech101/101_ObjectCategories/BACKGROUND_Google", lambda f: f.rename(f.with_name("zebra")), "BACKGROUND_Google|remove"),
    ("cifar10", "cifar-10-batches-py/test_batch", lambda f: f.write_bytes(f.read_bytes()[:99]), "cifar10"),
    ("pets", "oxford-iiit-pet/annotations/test.txt", lambda f: f.write_text(""), "pets"),
    ("sun397", "SUN397/ClassName.txt", without_its_first_line, "bakery"),
    ("sun397", "SUN397/Training_01.txt", lambda f: f.unlink(), "Partitions.zip"),
    ("sun397", "SUN397/Testing_01.txt", lambda f: f.write_text(""), "sun397"),
    ("sun397", "SUN397/a/abbey", lambda f: f.rename(f.parents[2] / "elsewhere"), "Training_01.txt"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000008.xml", lambda f: f.unlink(), "000008.xml"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000008.xml", lambda f: f.write_text("<annotation><object>"), "voc2007"),
    ("voc2007", "VOCdevkit/VOC2007/Annotations/000008.xml", lambda f: f.write_text(f.read_text().replace("dog", "zebra")), "zebra"),
])
def test_a_damaged_copy_is_an_input_error_that_names_the_task(name, file, damage, says, tmp_path):
    LAYOUTS[name](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(InputError, match=says) as problem:
        route.named_task(name, str(tmp_path), False)
    assert name in str(problem.value) and "\n" not in str(problem.value)


def test_other_names_are_not_of_the_eleven():
    assert route.named_task("imagenet", "somewhere", False) is None and route.named_task("toy", None, False) is None


# ---------------------------------------------------------------------------- folders

ODD = ["with  two spaces ", "ünïcödé 猫", ".starts with a dot", "007", "-dash", "*[?]", "it's \"so\", yes; $HOME", "train", "test"]


def folder_task(folder, classes, train=1, test=1):
    """A folder with so many PNGs of each class; {number: class name}."""
    written = {}
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            for i in range(count):
                n = len(written)
                picture(folder / part / name / "any depth" / f"{i}.PNG", by_number(n, 0))
                written[n] = name
    return written


def quiet(out, checkpoint, *arguments):
    """route.py's main with a command line; the content of each result.json by task."""
    sys.argv = ["route.py", "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu", "--amp", "off", "--workers", "0", *map(str, arguments)]
    route.main()
    return {task: json.load(open(out / task / "result.json")) for task in sorted(os.listdir(out)) if (out / task).is_dir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random SDRNet of 16 sub-nets."""
    torch.manual_seed(0)
    content = sdrnet.checkpoint(SDRNet("resnet18", 8, 2, 0.5, True), "sdrnet")
    content["config"]["image_size"] = 16
    path = tmp_path_factory.mktemp("net") / "sdrnet.pt"
    sdrnet.save(str(path), content)
    return path


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def test_class_folders_may_have_odd_names_and_one_image_each(tmp_path, checkpoint):
    folder = tmp_path / "a task, ü"
    written = folder_task(folder, ODD)
    (task,) = pretrain.open_tasks([str(folder) + "/"])
    assert task.name == "a task, ü" and task.metric == "top-1" and sorted(task.train.classes) == sorted(ODD)
    for images in (task.train, task.test):
        assert images.classes == task.train.classes and len(images) == len(ODD)
        assert [images.classes[c] for c in images.labels] == [written[number_of(images.decode(i))] for i in range(len(images))]
    pixels = route.decoded(task, 16, 5000, 0)
    assert [number_of(p) for p in pixels.train.packed] == [number_of(task.train.decode(i)) for i in range(len(ODD))]
    (result,) = quiet(tmp_path / "out", checkpoint, "--task", folder, "--probe").values()
    assert result["classes"] == result["train_images"] == result["test_images"] == len(ODD) and result["k"] == len(ODD) - 1
    assert result["chosen"]["train"] == 0                            # left out, an image has no other of its class
    assert all(0 <= result[n][m] <= 100 for n in ("chosen", "largest") for m in ("test", "probe"))


@pytest.mark.parametrize("search", ["all", "halving"])
def test_two_training_images_are_enough_and_one_is_not(search, tmp_path, checkpoint):
    folder_task(tmp_path / "two", ["one", "another"])
    folder_task(tmp_path / "alike", ["same"], train=2)
    results = quiet(tmp_path / "out", checkpoint, "--task", tmp_path / "two", "--task", tmp_path / "alike", "--search", search, "--probe")
    assert results["two"]["chosen"]["train"] == 0 and results["alike"]["chosen"]["train"] == 100
    assert results["alike"]["chosen"]["test"] == results["alike"]["chosen"]["probe"] == 100 and results["two"]["k"] == 1
    folder_task(tmp_path / "single", ["one"])
    with pytest.raises(InputError, match="single.*1 training"):
        pretrain.open_tasks([str(tmp_path / "single")])


# ---------------------------------------------------------------------------- from a data set on disk to a routed sub-net

def test_named_tasks_are_routed_and_probed_end_to_end(tmp_path, checkpoint, capsys):
    """Images of a class look alike here, and classes do not: with one neighbour every sub-net must be right everywhere."""
    for name in ("pets", "voc2007", "cars"):
        LAYOUTS[name](tmp_path / "data", by_label)
    results = quiet(tmp_path / "out", checkpoint, "--root", tmp_path / "data", "--task", "pets", "--task", "voc2007", "--task", "cars", "--k", 1, "--probe")
    for name, result in results.items():
        assert (result["task"], result["metric"], result["train_images"], result["test_images"]) == (name, METRICS.get(name, "top-1"), 7, 5)
        assert all(result[n][part] == 100 for n in ("chosen", "largest") for part in ("train", "test"))
        assert (np.load(tmp_path / "out" / name / "scores.npy") == 100).all() and result["gain"] == 0
        assert result["chosen"]["probe"] == result["largest"]["probe"] == 100
        plain = sdrnet.load_network(str(tmp_path / "out" / name / "subnet.pt"), ("subnet",))
        assert torch.isfinite(plain(torch.zeros(1, 3, 16, 16))).all()
    assert results["voc2007"]["classes"] == 20 and "average" in capsys.readouterr().out


def test_a_probe_of_several_labels_an_image_fits_each_class_by_itself(tmp_path):
    """Features that are the labels: each class can be told, and only from its own column."""
    voc2007(tmp_path)
    task = route.decoded(route.named_task("voc2007", str(tmp_path), False), 16, 5000, 0)
    assert task.train.packed.shape == (7, 3, 16, 16) and task.train.labels.shape == (7, 20) and task.test.labels.shape == (5, 20)
    percent, decay = route.probe(task.train.labels.float(), task.test.labels.float(), task)
    assert percent == 100 and 1e-6 <= decay <= 1
    assert route.probe(task.train.labels.float(), torch.zeros(5, 20), task)[0] < 100      # features that tell nothing
