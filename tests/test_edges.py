"""Odd folders, files and weights; beside the table of test_folders.py."""
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cluster
import pretrain
import route
import sdrnet
import toy
from conftest import ROOT
from test_folders import TINY, refused, run, write_images


@pytest.fixture(autouse=True)
def few_images_for_statistics(monkeypatch):
    monkeypatch.setattr(pretrain.calibration_batches, "__defaults__", (64, 32))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with data/ of 32 images, an SDR run on its 16 clusters in out/, and a task."""
    folder = tmp_path_factory.mktemp("done")
    write_images(folder / "data", [f"{i:02d}.png" for i in range(32)])
    write_images(folder / "task", [f"{part}/{c}/{i}.png" for part in ("train", "test")
                                   for c in "ab" for i in range(3)])
    options = ["--data", folder / "data", "--out", folder / "out", *TINY]
    assert run(pretrain, *options)[0] == 0
    np.save(folder / "out" / "clusters.npy", np.arange(32) % 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.calibration_batches, "__defaults__", (64, 32))
        more = ["--clusters", folder / "out" / "clusters.npy", "--sub-batch", 4]
        assert run(pretrain, *options, *more)[0] == 0
    return folder


# ------------------------------------------------------------------------------------ listings

def test_of_two_links_to_a_folder_the_first_by_name_counts(tmp_path, monkeypatch):
    write_images(tmp_path / "data", ["a.png"])
    write_images(tmp_path / "elsewhere", ["1.png"])
    for name in ("z", "b", "m"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    walk = os.walk
    for backwards in (False, True):                    # disks have orders of their own
        def listed(top, **options):
            for where, folders, files in walk(top, **options):
                folders.sort(reverse=backwards)
                yield where, folders, files
        monkeypatch.setattr(os, "walk", listed)
        assert sdrnet.list_images(tmp_path / "data") == ["a.png", "b/1.png"]


def test_names_keep_their_line(tmp_path):
    """U+2028 and its like end a line for Python alone; a carriage return for images.txt too."""
    names = ["a\u2028b.png", "c\x85d.png", "e\x0bf.png", "g .png", " h.png"]
    write_images(tmp_path, [*names, "i\rj.png", "k\nl.png"])
    assert sdrnet.list_images(tmp_path) == sorted(names)
    sdrnet.save_names(tmp_path / "images.txt", sorted(names))
    assert sdrnet.load_names(tmp_path / "images.txt") == sorted(names)
    assert cluster.read_listing(tmp_path / "images.txt", len(names)) == sorted(names)


def test_a_dead_link_is_named(tmp_path):
    write_images(tmp_path / "data", [f"{i}.png" for i in range(8)])
    (tmp_path / "data" / "dead.png").symlink_to(tmp_path / "nowhere")
    refused(pretrain, "dead.png cannot be read", "--data", tmp_path / "data", "--out",
            tmp_path / "out", *TINY)


@pytest.mark.parametrize("name", ["zürich 日本", os.fsdecode(b"t\xe4sk: #1"), "-x *[?]", ".hidden"])
def test_tasks_and_classes_of_any_name_are_routed(done, tmp_path, name):
    write_images(tmp_path / name, [f"{part}/{c}/{i}.png" for part in ("train", "test")
                                   for c in (name, "trail ") for i in range(2)])
    status, _, err = run(route, "--network", done / "out" / "sdrnet.pt", "--out", tmp_path / "out",
                         "--task", f"{tmp_path / name}/", "--workers", 0)
    assert status == 0 and err == "" and (tmp_path / "out" / name / "story.png").exists()


# ------------------------------------------------------------------------------------ pixels

def test_integers_of_32_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.int32)).save(tmp_path / "a.tif")
    sentence = sdrnet.Images(tmp_path, ["a.tif"], torch.clone)[0]
    assert "a.tif cannot be read" in sentence and "32-bit" in sentence


def test_the_contact_sheet_shows_what_training_sees(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    shown = {"16.png": Image.fromarray((ramp * 65535).astype(np.uint16)),
             "float.tif": Image.fromarray(ramp.astype(np.float32)),
             "8.png": Image.fromarray((ramp * 255).round().astype(np.uint8))}
    Image.fromarray((ramp * 4095).astype(np.uint16)).save(tmp_path / "12.png")
    for name, image in {**shown, "ink.png": Image.new("RGBA", (8, 8))}.items():
        image.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    sheets = {}
    for name in (*shown, "12.png", "ink.png", "broken.png"):
        cluster.contact_sheet(torch.ones(1, 1), np.zeros(1, int), [name], tmp_path,
                              tmp_path / "sheet.png")
        sheets[name] = np.array(Image.open(tmp_path / "sheet.png"))[:64, 66:130].astype(int)
    for name in shown:
        assert np.abs(sheets[name] - sheets["8.png"]).max() <= 2, name
    assert 0 < sheets["12.png"].max() <= 16            # of 65,535, and not stretched
    assert (sheets["ink.png"] == 255).all() and (sheets["broken.png"] == 255).all()


# ------------------------------------------------------------------------------------ weights

def test_heads_of_others_are_left_alone(tmp_path):
    write_images(tmp_path / "data", [f"{i}.png" for i in range(16)])
    net = sdrnet.resnet("resnet18", (8, 16, 32, 64), 8)
    torch.save({"backbone": net.state_dict(), "heads": [torch.zeros(3)]}, tmp_path / "w.pt")
    status, printed, _ = run(pretrain, "--data", tmp_path / "data", "--out", tmp_path / "out",
                             *TINY, "--init", tmp_path / "w.pt")
    assert status == 0 and "heads start at random" in printed


@pytest.mark.parametrize("content", [None, torch.tensor(3.0), [1, 2], {1: torch.zeros(2)},
                                     {"conv1.weight": "words"}, {"model": None}])
def test_files_without_a_network_are_one_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(sdrnet.InputError, match="holds no ResNet's weights"):
        sdrnet.load_weights(sdrnet.resnet("resnet18", (8, 16, 32, 64), 8), tmp_path / "w.pt")


# ------------------------------------------------------------------------------------ signals

@pytest.mark.slow
def test_nohup_is_respected_and_nothing_to_save_ends_at_once(done, tmp_path):
    """A run under nohup outlives its terminal; a script that only reads ends where it stands."""
    command = [sys.executable, os.path.join(ROOT, "pretrain.py"), "--data", done / "data", "--out",
               tmp_path / "out", *TINY, "--epochs", "30"]
    process = subprocess.Popen(["nohup", *map(str, command)], stdout=subprocess.PIPE, text=True,
                               stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "simsiam.pt" in printed
    before = {number: signal.getsignal(number) for number in sdrnet.SIGNALS}
    try:
        sdrnet.catch_signals(False)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        sdrnet.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert sdrnet.CAUGHT == [signal.SIGTERM]
    finally:
        sdrnet.CAUGHT.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------ features

@pytest.mark.parametrize("features", [np.zeros((50, 8)), np.outer(np.arange(1, 51), np.ones(8))])
def test_rows_that_are_alike_are_one_line(tmp_path, features):
    np.save(tmp_path / "f.npy", features)
    refused(cluster, "nothing to cluster", "--features", tmp_path / "f.npy", "--out",
            tmp_path / "out", "--k", 2)


def test_a_mistyped_folder_leaves_the_clusters_alone(tmp_path):
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(64, 8)))
    refused(cluster, "no folder nowhere", "--out", tmp_path, "--data", "nowhere", "--k", 2)
    assert not (tmp_path / "clusters.npy").exists()


def test_arrays_in_any_layout_give_the_same_centroids():
    f = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    read_only = f.copy()
    read_only.setflags(write=False)
    wanted = cluster.learn_centroids(cluster.Centred(f, torch.zeros(8)), 4, epochs=1)
    for array in (read_only, np.asfortranarray(f), f.astype(">f4"), f.astype(np.float64),
                  np.repeat(f, 2, 1)[:, ::2]):
        found = cluster.learn_centroids(cluster.Centred(array, torch.zeros(8)), 4, epochs=1)
        assert torch.allclose(found, wanted, atol=1e-4)


def test_workers_need_no_file_descriptor_for_each_tensor():
    """A batch of 300 images from a worker, where a process may open 128 files."""
    text = ("import resource, torch, sdrnet\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
            "data = [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(300)]\n"
            "print(sum(len(b) for b in sdrnet.load_batches(data, [range(300)] * 2, workers=1)))\n")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": ROOT})
    assert done.stdout.strip() == "600", done.stderr


# ------------------------------------------------------------------------------------ wrong input

@pytest.mark.parametrize("place", ["file", "file/run"])
def test_an_output_that_cannot_be_is_one_line(done, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    refused(pretrain, "cannot be made", "--data", done / "data", "--out", out, *TINY)
    refused(cluster, "cannot be made", "--features", done / "out" / "features.npy", "--out", out)
    refused(route, "cannot be made", "--network", done / "out" / "sdrnet.pt", "--out", out,
            "--task", done / "task", "--workers", 0)
    assert (tmp_path / "file").read_text() == "mine"


ARRAYS = {"archive": None, "checkpoint": None, "text": None, "floats": np.zeros(32),
          "a table": np.zeros((32, 1), int), "negative": np.full(32, -1),
          "no row": np.zeros(0, int), "bools": np.zeros(32, bool), "objects": np.array([{}] * 32),
          "far": np.full(32, 10 ** 6)}


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_arrays_that_are_no_clusters_are_one_line(done, tmp_path, name):
    path = tmp_path / f"{name}.npy"
    if name == "archive":
        with open(path, "wb") as file:
            np.savez(file, a=np.arange(32))
    elif name == "checkpoint":
        path = done / "out" / "simsiam.pt"
    elif name == "text":
        path.write_text("0 1 2")
    else:
        np.save(path, ARRAYS[name])
    more = ["--data", done / "data", "--out", tmp_path / "out", *TINY, "--init", "none"]
    refused(pretrain, path.name, *more, "--clusters", path)
    if name != "far":
        refused(cluster, path.name, "--features", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "sdrnet.pt").exists()


WRONG = [(pretrain, ["--seed", 10 ** 20], "100000000000000000000 is not"),
         (pretrain, ["--phases", "nan,0,0,0,1"], "five shares"),
         (pretrain, ["--phases", "1,0,0,0,0"], "five shares"),
         (pretrain, ["--lr", -1], "-1 is not"), (pretrain, ["--lr", 1e30], "not finite"),
         (pretrain, ["--head", 3], "3 is not"),
         (pretrain, ["--device", "tpu"], "tpu"), (pretrain, ["extra"], "unrecognized"),
         (cluster, ["--eps", "1e-45"], "--eps"), (cluster, ["--lr", "1e39"], "--lr"),
         (cluster, ["--temperature", "inf"], "--temperature"),
         (cluster, ["--k", 33], "32 rows only")]


@pytest.mark.parametrize("script, options, said", WRONG)
def test_a_number_out_of_range_is_one_line(done, tmp_path, script, options, said):
    start = {pretrain: ["--data", done / "data", *TINY],
             cluster: ["--features", done / "out" / "features.npy"]}[script]
    refused(script, said, "--out", tmp_path / "out", *start, *options)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.npy"))


def test_states_of_other_runs_are_refused_and_kept(done, tmp_path):
    whole = (done / "out" / "simsiam.last.pt").read_bytes()
    other = (done / "out" / "simsiam.pt").read_bytes()
    half = whole[:len(whole) // 2]
    cases = {"simsiam.last.pt": [(half, "damaged"), (other, "training is needed")],
             "simsiam.pt": [(b"", "damaged"), (whole, "was made with other arguments")]}
    for name, contents in cases.items():
        for content, said in contents:
            (tmp_path / name).write_bytes(content)
            refused(pretrain, said, "--data", done / "data", "--out", tmp_path, *TINY)
            assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()


def test_without_init_is_another_run_than_with(done, capsys):
    more = ["--data", done / "data", "--out", done / "out", *TINY, "--lr", 0.1, "--clusters",
            done / "out" / "clusters.npy", "--sub-batch", 4]
    refused(pretrain, "init", *more, "--init", "none")
    content = torch.load(done / "out" / "sdrnet.pt", weights_only=True)
    assert len(content["origin"]["arguments"]["init"]) == 16


def test_alone_the_largest_network_has_its_own_heads_only(done):
    heads = {name: torch.load(done / "out" / f"{name}.pt", weights_only=True)["heads"]
             for name in ("simsiam", "sdrnet")}
    assert set(heads["simsiam"]) == {"projector", "predictor"}
    assert set(heads["sdrnet"]) == {"projector", "predictor", "sub_projector", "sub_predictor",
                                    "distiller"}


def test_a_folder_holds_the_features_of_one_objective(done):
    features = (done / "out" / "features.npy").read_bytes()
    refused(pretrain, "features.npy is of", "--data", done / "data", "--out", done / "out", *TINY,
            "--objective", "byol", "--fresh")
    assert (done / "out" / "features.npy").read_bytes() == features


def test_features_of_other_images_are_not_clustered_into_a_run(done, tmp_path):
    names = (done / "out" / "images.txt").read_text()
    (tmp_path / "images.txt").write_text(names.replace("07.png", "70.png"))
    refused(cluster, "name different images", "--features", done / "out" / "features.npy",
            "--out", tmp_path)
    assert not (tmp_path / "clusters.npy").exists()


def test_features_and_their_listing_are_of_one_folder(done, tmp_path):
    target, checkpoint = tmp_path / "f.npy", done / "out" / "simsiam.pt"
    assert run(sdrnet, checkpoint, done / "data", target, "--workers", 0)[0] == 0
    assert len(sdrnet.load_names(tmp_path / "f.txt")) == 32
    write_images(tmp_path / "bad", [f"{i:02d}.png" for i in range(31)])
    (tmp_path / "bad" / "99.png").write_bytes(b"no image")
    refused(sdrnet, "99.png", checkpoint, tmp_path / "bad", target, "--workers", 0)
    refused(cluster, "0 lines", "--features", target, "--out", tmp_path / "out", "--k", 1)
    (tmp_path / "alone").mkdir()
    np.save(tmp_path / "alone" / "f.npy", np.eye(10))                  # no listing: it is the run's
    refused(cluster, "10 rows", "--features", tmp_path / "alone" / "f.npy", "--out", done / "out",
            "--k", 1)
    assert run(sdrnet, checkpoint, done, target, "--workers", 0)[0] == 0
    assert not any(name.startswith("out") for name in sdrnet.load_names(tmp_path / "f.txt"))


def test_weights_that_are_not_finite_are_refused(done, tmp_path):
    content = torch.load(done / "out" / "sdrnet.pt", weights_only=True)
    content["backbone"]["layer4.0.conv1.weight"][0] = float("nan")
    torch.save(content, tmp_path / "sdrnet.pt")
    refused(route, "not all weights are finite", "--out", tmp_path, "--task", done / "task")


def test_a_path_of_a_plain_network_is_one_line(done, tmp_path):
    assert run(route, "--out", tmp_path, "--network", done / "out" / "sdrnet.pt", "--task",
               done / "task", "--workers", 0)[0] == 0
    refused(sdrnet, "has no sub-nets", tmp_path / "task" / "subnet.pt", done / "data",
            tmp_path / "f.npy", "--path", "0,0,0,0")
    before = (tmp_path / "task" / "result.json").read_text()
    refused(route, "give another --out", "--out", tmp_path, "--task", done / "task", "--network",
            done / "out" / "simsiam.pt", "--workers", 0)
    assert (tmp_path / "task" / "result.json").read_text() == before


def test_a_story_shows_no_images_of_other_clusters(done, tmp_path, capsys):
    """Clustered anew beside a network that was trained on the clusters before."""
    for name in ("sdrnet.pt", "images.txt", "clusters.npy"):
        (tmp_path / name).write_bytes((done / "out" / name).read_bytes())
    command = ["--out", tmp_path, "--task", done / "task", "--data", done / "data", "--workers", 0]
    assert run(route, *command)[0] == 0
    content = sdrnet.load_checkpoint(tmp_path / "sdrnet.pt")
    args = SimpleNamespace(out=tmp_path, data=done / "data", image_size=16, network="sdrnet.pt",
                           trained_on=content["origin"]["arguments"]["clusters"])
    assert len(route.cluster_images(args, 3, 12)) == 2 and capsys.readouterr().out == ""
    args.data = tmp_path / "mistyped"
    assert route.cluster_images(args, 3, 12) == [] and "give --data" in capsys.readouterr().out
    args.data = done / "data"
    np.save(tmp_path / "clusters.npy", np.arange(500) % 16)
    assert route.cluster_images(args, 3, 12) == []
    assert "is not what sdrnet.pt was trained on" in capsys.readouterr().out
    assert run(route, *command)[0] == 0


@pytest.mark.parametrize("name", ["images", "tasks", "VOCdevkit"])
def test_toy_images_are_drawn_over_nothing(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=name):
        toy.draw(tmp_path, pool=4, per_part=1)
    assert [path.name for path in tmp_path.rglob("*")] == [name, "mine"]
