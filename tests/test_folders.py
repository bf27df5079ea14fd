"""Folders, files, weights as people have them: what is read, what is left out, what ends a run."""
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

import cluster
import pretrain
import route
import sdrnet
from conftest import ROOT

TINY = ["--width", "8", "--head", "32", "--batch-size", "8", "--image-size", "16", "--epochs", "1",
        "--no-small-stem", "--amp", "off", "--workers", "0"]


@pytest.fixture(autouse=True)
def few_images_for_statistics(monkeypatch):
    monkeypatch.setattr(pretrain.calibration_batches, "__defaults__", (64, 32))


def write_images(folder, names, side=16):
    """Images of noise with these names (str or bytes)."""
    rng = np.random.default_rng(0)
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return folder


def run(script, *arguments):
    """A script's main() by its command line: (exit status, what it printed, its errors)."""
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **options: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            script.main()
            status = 0
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def refused(script, said, *arguments):
    """Asserts that these arguments end a script with one line that says so, and status 2."""
    status, _, err = run(script, *arguments)
    assert status == 2 and err.count("\n") == 1 and err.startswith(f"{script.__name__}.py: error: ")
    assert said in err, err


# ------------------------------------------------------------------------------------ listings

def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "elsewhere", ["1.png", "2.png"])
    write_images(tmp_path / "data", ["deep/er/3.png", "4.jpg.png"])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")   # one of both
    (tmp_path / "data" / "deep" / "loop").symlink_to(tmp_path / "data")
    names = sdrnet.list_images(tmp_path / "data")
    assert len(names) == 4 and names == sorted(names)
    assert "deep/er/3.png" in names and "4.jpg.png" in names
    only = tmp_path / "only"
    only.mkdir()
    (only / "link").symlink_to(tmp_path / "elsewhere")
    assert sdrnet.list_images(only) == ["link/1.png", "link/2.png"]


def test_dotted_names_and_the_output_are_no_images(tmp_path, capsys):
    write_images(tmp_path, ["a.png", "B.PNG", "._a.png", ".ipynb_checkpoints/a.png", ".Trash/b.png",
                            "x/.DS_Store", "out/clusters.png", "notes.txt"])
    assert sdrnet.list_images(tmp_path, leave_out=tmp_path / "out") == ["B.PNG", "a.png"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and " 6 names left out" in printed
    with pytest.raises(sdrnet.InputError, match="keep these elsewhere"):
        sdrnet.list_images(tmp_path, leave_out=tmp_path)
    with pytest.raises(sdrnet.InputError, match="no images in"):
        sdrnet.list_images(tmp_path / "x")
    with pytest.raises(sdrnet.InputError, match="no folder"):
        sdrnet.list_images(tmp_path / "y")


NAMES = ["a b.png", "Zürich.png", "x:y.png", "#1 'q'.png", "tab\tname.png", b"latin-\xfc.png",
         "日本.png", *(f"{i}.png" for i in range(25))]


def test_names_of_any_encoding_go_through_the_pipeline(tmp_path):
    data, out = write_images(tmp_path / "dätä", NAMES), tmp_path / "dätä" / "out"
    options = ["--data", data, "--out", out, *TINY]
    assert run(pretrain, *options)[0] == 0
    wanted = sorted(os.fsdecode(name) for name in map(os.fsencode, NAMES))
    assert sdrnet.load_names(out / "images.txt") == wanted
    assert b"latin-\xfc.png\n" in (out / "images.txt").read_bytes()
    status, printed, _ = run(cluster, "--out", out, "--data", data, "--k", 1, "--epochs", 1)
    assert status == 0 and (out / "clusters.png").exists() and "no picture" not in printed
    listing = (out / "images.txt").read_bytes()        # as an editor of Windows would save it
    (out / "images.txt").write_bytes(b"\xef\xbb\xbf" + listing.replace(b"\n", b"\r\n"))
    more = ["--clusters", out / "clusters.npy", "--sub-batch", 4]
    assert run(pretrain, *options, *more)[0] == 0      # the contact sheet is no image
    assert sdrnet.load_names(out / "images.txt") == wanted
    with open(os.path.join(os.fsencode(data), b"latin-\xfc.png"), "wb") as file:
        file.write(b"GIF")
    (out / "sdrnet.pt").unlink()
    refused(pretrain, "latin-", *options, *more, "--fresh")


def test_clusters_of_other_images_are_refused_by_line(tmp_path):
    data = write_images(tmp_path / "data", [f"{i:02d}.png" for i in range(16)])
    out = tmp_path / "out"
    options = ["--data", data, "--out", out, *TINY]
    assert run(pretrain, *options)[0] == 0
    np.save(out / "clusters.npy", np.arange(16))
    write_images(data, ["03b.png"])
    refused(pretrain, "images.txt has 04.png in line 5, the images given 03b.png", *options,
            "--clusters", out / "clusters.npy")
    (data / "03b.png").unlink()
    np.save(out / "clusters.npy", np.arange(15))
    refused(pretrain, "has 15 rows, and there are 16 images", *options,
            "--clusters", out / "clusters.npy")
    np.save(out / "clusters.npy", np.full(16, 3))      # legal: empty clusters never train
    status, printed, _ = run(pretrain, *options, "--clusters", out / "clusters.npy")
    assert status == 0 and "15 of 2^4 clusters hold no image" in printed
    assert run(pretrain, *options, "--fresh")[0] == 0                  # of other features, perhaps
    assert not (out / "clusters.npy").exists()


def test_sdr_goes_on_as_simsiam_was_trained(tmp_path):
    data = write_images(tmp_path / "data", [f"{i:02d}.png" for i in range(16)])
    more = ["--data", data, "--out", tmp_path, "--workers", 0, "--amp", "off"]
    assert run(pretrain, *more, *TINY[:-4], "--blur", 0.25, "--lr", 0.125)[0] == 0
    np.save(tmp_path / "clusters.npy", np.arange(16))
    assert run(pretrain, *more, "--clusters", tmp_path / "clusters.npy")[0] == 0
    got = torch.load(tmp_path / "sdrnet.pt")["origin"]["arguments"]
    wanted = {"width": 8, "head": 32, "batch_size": 8, "image_size": 16, "epochs": 0.5,
              "small_stem": False, "blur": 0.25, "lr": 0.25, "seed": 1}
    assert wanted.items() <= got.items()
    longer = ["--data", tmp_path / "data", "--out", tmp_path / "longer", "--init",
              tmp_path / "simsiam.pt"]
    assert run(pretrain, *longer, "--workers", 0, "--amp", "off", "--epochs", 2)[0] == 0
    got = torch.load(tmp_path / "longer" / "simsiam.pt")["origin"]["arguments"]
    assert {**wanted, "epochs": 2, "lr": 0.125}.items() <= got.items()
    torch.save({"kind": "simsiam", "origin": {"arguments": {"width": 8}}}, tmp_path / "other.pt")
    assert pretrain.earlier_values(tmp_path / "other.pt", sdr=True) == {}
    again = pretrain.earlier_values(tmp_path / "sdrnet.pt", sdr=True)
    assert (again["epochs"], again["lr"]) == (0.5, 0.25)               # halved and doubled once


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    write_images(tmp_path, [f"pets/{part}/{c}/1.png" for part in ("train", "test") for c in "ab"])
    monkeypatch.chdir(tmp_path)
    assert len(route.open_task("pets", 16).train) == 2
    with pytest.raises(sdrnet.InputError, match="cannot be read"):
        route.open_task("pets", 16, root=tmp_path)


# ------------------------------------------------------------------------------------ pixels

def test_pixels_have_the_right_range(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[2:4, :, 3] = 255                              # black ink on a transparent ground
    palette = Image.fromarray((ramp > 0.5).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 250, 0, 0])
    white = np.where((rgba[..., 3] > 0)[..., None], 0, 255)
    pictures = {
        "16.png": (Image.fromarray((ramp * 65535).astype(np.uint16)), ramp * 255),
        "float.tif": (Image.fromarray(ramp.astype(np.float32)), ramp * 255),
        "ink.png": (Image.fromarray(rgba), white),
        "ink grey.png": (Image.fromarray(rgba[..., [0, 3]], "LA"), white),
        "one bit.png": (Image.fromarray(ramp > 0.5), (ramp > 0.5) * 255),
        "palette.png": (palette, np.where((ramp > 0.5)[..., None], [250, 0, 0], [9, 9, 9])),
        "cmyk.tif": (Image.new("CMYK", (8, 8), (0, 0, 0, 255)), np.zeros((8, 8))),
        "grey.png": (Image.fromarray((ramp * 255).astype(np.uint8)), ramp * 255),
    }
    for name, (image, wanted) in pictures.items():
        image.save(tmp_path / name)
        pixels = np.asarray(sdrnet.read_rgb(tmp_path / name), float)
        wanted = np.broadcast_to(wanted.reshape(8, 8, -1), (8, 8, 3))
        assert np.abs(pixels - wanted).max() <= 1.01, name


def test_palettes_with_a_transparent_colour_show_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    pixels = T.pil_to_tensor(sdrnet.read_rgb(tmp_path / "a.png"))
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("values", [[0, 255], [-1, 1], [0, float("nan")]])
def test_values_without_a_known_range_are_refused_by_name(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "float.tif")
    sentence = sdrnet.Images(tmp_path, ["float.tif"], torch.clone)[0]
    assert "float.tif cannot be read" in sentence and "save it with 8 bits" in sentence


def test_images_that_differ_by_a_pixel_are_cropped_alike():
    ramp = torch.linspace(0, 255, 81).to(torch.uint8).expand(3, 81, 81)
    for size in (80, 81):
        seen = sdrnet.center_crop(ramp[:, :size, :size], 80)           # of 91 pixels the middle 80
        assert abs(int(seen.min()) - 16) <= 2 and abs(int(seen.max()) - 239) <= 3


def test_images_are_turned_as_their_exif_says(tmp_path):
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6                                   # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = T.pil_to_tensor(sdrnet.read_rgb(tmp_path / "a.png"))
    assert turned.shape == (3, 8, 6) and (turned[:, :, -1] == 200).all()


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 2), (40, 30)])
def test_images_of_all_shapes_are_cropped(size):
    assert sdrnet.center_crop(torch.zeros(3, *size, dtype=torch.uint8), 24).shape == (3, 24, 24)


# ------------------------------------------------------------------------------------ tasks

def test_near_duplicates_are_told():
    noise, film = torch.randn(30, 8), torch.randn(6, 8).repeat_interleave(5, 0)
    labels = torch.arange(6).repeat_interleave(5)
    assert route.near_duplicates(noise, labels) < 0.1
    film = film + 0.01 * torch.randn(30, 8)
    assert route.near_duplicates(film, labels) > 0.9
    assert route.near_duplicates(film, torch.arange(30)) == 0          # alike, of other classes
    assert route.near_duplicates(film, torch.nn.functional.one_hot(labels)) > 0.9


def test_nothing_is_chosen_among_equals():
    assert route.choose(np.full(16, 37.5)) is None and route.choose(np.zeros(16)) is None
    assert route.choose(np.array([1.0, 3.0, 3.0])) == 1


TASKS = {"no train": ("no folder", ["test/a/1.png"]),
         "class": ("which train/ lacks", ["train/a/1.png", "test/b/1.png"]),
         "flat": ("outside class folders", ["train/1.png", "test/1.png"])}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_folder_that_is_no_task_is_refused(tmp_path, name):
    said, files = TASKS[name]
    write_images(tmp_path, files)
    with pytest.raises(sdrnet.InputError, match=said.replace("outside", "outside of")):
        route.open_task(str(tmp_path), 16)


# ------------------------------------------------------------------------------------ signals

@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_saves_and_ends(tmp_path, number):
    data = write_images(tmp_path / "data", [f"{i}.png" for i in range(64)])
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", data, "--out",
               tmp_path / "out", *TINY, "--epochs", "10000"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    while "step" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in printed
    assert torch.load(tmp_path / "out" / "simsiam.last.pt", weights_only=True)["step"] > 0


# ------------------------------------------------------------------------------------ weights

def elsewhere(plain, form):
    """A ResNet's weights as other code bases save them."""
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    if form == "old":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    if form == "half":
        return {key: value.half() for key, value in state.items()}
    if form == "fc":
        return {**state, "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    if form in ("state_dict", "model"):
        return {form: {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    if form == "moco":
        both = {f"module.encoder_q.{key}": value for key, value in state.items()}
        both.update({f"module.queue.{key}": value for key, value in list(state.items())[:5]})
        return {"state_dict": {**both, "module.encoder_q.fc.0.weight": torch.zeros(3, 3)}}
    prefix = {"old": "", "plain": ""}.get(form, form)
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("form", ["plain", "old", "half", "fc", "state_dict", "model", "moco",
                                  "module.", "model.", "backbone.", "encoder_q.", "net.trunk."])
def test_weights_from_elsewhere_are_found(tmp_path, form):
    plain = sdrnet.resnet("resnet18", (8, 16, 32, 64), 8)
    torch.save(elsewhere(plain, form), tmp_path / "w.pth")
    net = sdrnet.SDRNet("resnet18", 8, 1)
    said = sdrnet.load_weights(net.resnet, tmp_path / "w.pth")
    count = len(plain.state_dict())
    found = count - 20 * (form == "old")               # which has no counters
    assert f"loaded {found} of {count} tensors" in said
    assert ("num_batches_tracked" in said) == (form == "old")
    assert ("removed" in said) == (form not in ("plain", "old", "half", "fc"))
    for key, value in plain.state_dict().items():
        assert torch.allclose(value.float(), net.resnet.state_dict()[key].float(), atol=1e-2)


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path):
    net = sdrnet.resnet("resnet18", (8, 16, 32, 64), 8)
    before, wrong = net.conv1.weight.clone(), dict(net.state_dict())
    short = {key: value for key, value in wrong.items() if key != "layer4.1.bn2.bias"}
    cases = {"lacks layer4.1.bn2.bias": short, "holds no ResNet": torch.zeros(3),
             "layer1.0.conv1.weight is (5, 8, 3, 3)": {
                 **wrong, "layer1.0.conv1.weight": torch.zeros(5, 8, 3, 3)},
             "holds layer3.2.conv1.weight, which": {
                 **wrong, "layer3.2.conv1.weight": torch.zeros(32, 32, 3, 3)},
             "no key ends in conv1.weight": {"a": torch.zeros(1)}}
    for said, content in cases.items():
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(sdrnet.InputError) as error:
            sdrnet.load_weights(net, tmp_path / "w.pth")
        assert said in str(error.value) and torch.equal(before, net.conv1.weight)


# ------------------------------------------------------------------------------------ wrong input

PRETRAIN = {"--data": ("nowhere", "no folder nowhere"), "--subset": ("nowhere.npy", "is not there"),
            "--clusters": ("nowhere.npy", "is not there"),
            "--init": ("nowhere.pt", "no file nowhere.pt"), "--arch": ("vit", "vit"),
            "--lr": ("nan", "nan is not a number"), "--epochs": ("0", "0 is not a number"),
            "--batch-size": ("1", "1 is not a number"), "--weight-decay": ("inf", "inf is not"),
            "--phases": ("1,1", "five shares"), "--kd-weight": ("-1", "-1"),
            "--shared": ("2", "2 is not a number"), "--image-size": ("0", "0 is not"),
            "--seed": ("x", "invalid int value"), "--unknown": ("1", "--unknown"),
            "--monitor-task": ("nowhere", "no folder nowhere")}


@pytest.mark.parametrize("option", sorted(PRETRAIN))
def test_a_wrong_option_is_one_line(tmp_path, option):
    value, said = PRETRAIN[option]
    data = write_images(tmp_path / "data", [f"{i}.png" for i in range(8)])
    refused(pretrain, said, "--data", data, "--out", tmp_path / "out", *TINY, option, value)
    assert not (tmp_path / "out" / "simsiam.pt").exists()


def test_images_of_ones_own_need_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(pretrain, "--out", "--data", write_images(tmp_path / "data", ["1.png", "2.png"]), *TINY)
    assert not (tmp_path / "runs").exists()


def test_options_of_subnets_are_refused_without_clusters(tmp_path):
    data = write_images(tmp_path / "data", ["1.png", "2.png"])
    for options in (("--kd-weight", 2), ("--phases", "0,0,0,0,1"), ("--shared-heads",)):
        refused(pretrain, f"{options[0]} means nothing without --clusters", "--data", data, "--out",
                tmp_path / "out", *TINY, *options)


def test_accuracy_is_monitored_ten_times(tmp_path):
    data = write_images(tmp_path / "data", [f"{i}.png" for i in range(40)])
    task = write_images(tmp_path / "task", [f"{part}/{c}/{i}.png" for part in ("train", "test")
                                            for c in "ab" for i in range(4)])
    status, printed, _ = run(pretrain, "--data", data, "--out", tmp_path / "out", *TINY,
                             "--epochs", 4, "--monitor-task", task)
    assert status == 0 and printed.count("task task  knn ") == 10


def test_a_broken_image_is_named(tmp_path):
    data = write_images(tmp_path / "data", [f"{i}.png" for i in range(8)])
    whole = (data / "5.png").read_bytes()
    for content in (b"", b"no image", whole[:len(whole) // 2]):
        (data / "5.png").write_bytes(content)
        refused(pretrain, "5.png cannot be read as an image", "--data", data, "--out",
                tmp_path / "out", *TINY)


def test_checkpoints_that_are_none_are_refused_by_name(tmp_path):
    net = sdrnet.SDRNet("resnet18", 8, 1)
    good = {"kind": "simsiam", "config": net.config, "backbone": net.resnet.state_dict(),
            "statistics": {}, "image_size": 16}
    cases = {"damaged": b"no zip", "names no kind": {"a": 1},
             "another kind": {**good, "kind": "pie"}, "lacks": {**good, "backbone": {}},
             "config": {**good, "config": {**net.config, "width": 16}},
             "config too": {**good, "config": {"depth": 3}}}
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(route, f"{name}.pt", "--network", path, "--task", tmp_path)
    torch.save(good, tmp_path / "good.pt")
    refused(sdrnet, "has no sub-nets", tmp_path / "good.pt", tmp_path, tmp_path / "f.npy", "--path",
            "0,0,0,0")
    refused(route, "no file", "--out", tmp_path, "--task", tmp_path)
