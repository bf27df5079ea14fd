"""The scripts as a user runs them: the whole pipeline, running again, several processes, and everything that can be given wrongly."""
import argparse
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import pretrain
import route
import sdrnet

SMALL = ["--width", "8", "--head", "32", "--batch-size", "32", "--amp", "off", "--sub-batch", "16", "--phases", "1,1,1,1,4", "--distill", "siamkd"]     # every phase and loss


def script(name, *arguments, processes=1, expect=0, **environment):
    """Runs a script by its command line; returns (stdout, stderr)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, os.path.join(ROOT, name), *map(str, arguments)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})
    assert (done.returncode == 0) == (expect == 0) and (processes > 1 or done.returncode == expect), (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout, done.stderr


def contents(folder):
    return {os.path.relpath(os.path.join(w, f), folder): hashlib.sha256(open(os.path.join(w, f), "rb").read()).hexdigest() for w, _, fs in os.walk(folder) for f in fs}


def weights(path):
    return sdrnet.load(str(path))["backbone"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A pipeline on 320 toy images, run by its command lines."""
    where = tmp_path_factory.mktemp("toy")
    subset = where / "subset.npy"
    np.save(subset, np.arange(320))
    out, common = where / "run", ["--out", where / "run", "--subset", subset]
    script("pretrain.py", *common, *SMALL, "--epochs", "1", "--monitor-task", "toy:weaves", "--monitor-every", "1")
    script("cluster.py", *common, "--amp", "off", "--epochs", "5", "--save-features", "--balanced")
    printed, _ = script("pretrain.py", *common, *SMALL, "--epochs", "2", "--clusters", out / "clusters.npy")
    assert "16 sub-nets" in printed
    script("route.py", "--out", out, "--amp", "off", "--task", "toy:weaves", "--task", "toy:shapes", "--probe", "--export")
    return out, common


def test_the_pipeline_leaves_the_files_that_are_promised(toy):
    out, _ = toy
    clusters, centroids, features = (np.load(out / f"{n}.npy") for n in ("clusters", "centroids", "features"))
    assert clusters.dtype == np.int64 and clusters.shape == (320,) and set(clusters) == set(range(16))
    assert centroids.dtype == np.float32 and centroids.shape == (16, 64) and features.dtype == np.float32 and features.shape == (320, 64)
    about = json.load(open(out / "clusters.json"))
    assert about["n"] == 320 and about["k"] == 16 and len(about["sha256"]) == 64
    net = sdrnet.load_network(str(out / "simsiam.pt"))
    x = pretrain.toy_images(np.arange(64, 72))[0]
    with torch.no_grad():
        assert torch.allclose(net(pretrain.plain_input(x, torch.device("cpu"))), torch.from_numpy(features[64:72]), atol=1e-4)
    content = sdrnet.load(str(out / "sdrnet.pt"), ("sdrnet",))
    assert content["centroids"].shape == (16, 64) and content["cluster_sizes"].sum() == 320
    assert content["origin"]["images_seen"] == sum(32 + 8 * len(json.loads(l).get("subnets", [])) for l in open(out / "sdrnet.log.jsonl"))
    steps = [json.loads(line)["step"] for line in open(out / "sdrnet.log.jsonl")]
    assert steps == list(range(20))
    for task in ("toy-weaves", "toy-shapes"):
        scores, tests = np.load(out / task / "scores.npy"), np.load(out / task / "test_scores.npy")
        result = json.load(open(out / task / "result.json"))
        assert scores.shape == tests.shape == (16,) and scores.dtype == np.float32
        assert result["chosen"]["index"] == int(np.argmax(scores)) and result["chosen"]["test"] == pytest.approx(float(tests[scores.argmax()]), abs=1e-3)
        assert 0 <= result["chosen"]["probe"] <= 100 and os.path.getsize(out / task / "cluster.png") > 500


def test_the_subnet_loads_without_this_project(toy, tmp_path):
    """subnet.pt2 by torch.export in a process that cannot import sdrnet; the same outputs as the supernet's path."""
    out, _ = toy
    content = sdrnet.load(str(out / "toy-weaves" / "subnet.pt"), ("subnet",))
    x = torch.rand(3, 3, 32, 32)
    net = sdrnet.load_network(str(out / "sdrnet.pt"))
    with torch.no_grad():
        expected = net(x, content["config"]["path"])
        assert torch.allclose(sdrnet.load_network(str(out / "toy-weaves" / "subnet.pt"))(x), expected, rtol=1e-4, atol=1e-5)
    torch.save((x, expected), tmp_path / "x.pt")
    code = ("import sys, torch; x, y = torch.load(sys.argv[1]); z = torch.export.load(sys.argv[2]).module()(x); assert torch.allclose(z, y, rtol=1e-4, atol=1e-5)\n"
            "try:\n import sdrnet\nexcept ImportError: print('alone')")
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "x.pt"), str(out / "toy-weaves" / "subnet.pt2")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "alone", done.stderr[-2000:]


def test_running_again_says_finished_and_changed_arguments_are_refused(toy):
    out, common = toy
    before = contents(out)
    printed, _ = script("pretrain.py", *common, *SMALL, "--epochs", "1", "--subnets", "4")     # which means nothing to SimSiam
    assert "mean nothing: --distill, --phases, --sub-batch, --subnets" in printed
    assert "is finished" in printed
    _, error = script("pretrain.py", *common, *SMALL, "--epochs", "2", "--clusters", out / "clusters.npy", "--subnets", "4", expect=2)
    assert "subnets 2 -> 4" in error
    _, error = script("pretrain.py", *common, *SMALL, "--epochs", "3", expect=2)
    assert error.startswith("pretrain.py: error:") and error.count("\n") == 1 and "epochs 1.0 -> 3.0" in error and "--fresh" in error
    assert contents(out) == before


def test_an_interrupted_run_ends_with_the_same_weights(toy, tmp_path):
    """SIGTERM between two steps: saved, 143; the same command continues; bitwise the uninterrupted run's weights."""
    out, common = toy
    arguments = ["--out", tmp_path / "run", *common[2:], *SMALL, "--epochs", "2", "--clusters", out / "clusters.npy", "--init", out / "simsiam.pt", "--save-every", "3"]
    running = subprocess.Popen([sys.executable, os.path.join(ROOT, "pretrain.py"), *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "sdrnet.last.pt").exists() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143, running.stderr.read()
    stopped = sdrnet.load(str(tmp_path / "run" / "sdrnet.last.pt"))["step"]
    assert 0 < stopped < 20 and not (tmp_path / "run" / "sdrnet.pt").exists()
    (tmp_path / "run" / "sdrnet.last.pt").write_bytes(b"broken")       # the newest state is damaged: the one before serves
    printed, _ = script("pretrain.py", *arguments)
    assert "falling back" in printed and "continuing" in printed
    ours, theirs = weights(tmp_path / "run" / "sdrnet.pt"), weights(out / "sdrnet.pt")
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert [json.loads(line)["step"] for line in open(tmp_path / "run" / "sdrnet.log.jsonl")] == list(range(20))


def test_two_processes_give_the_same_clusters_scores_and_losses(toy, tmp_path):
    out, common = toy
    script("cluster.py", "--out", tmp_path / "two", *common[2:], "--checkpoint", out / "simsiam.pt", "--amp", "off", "--epochs", "5", "--balanced", processes=2)
    assert np.array_equal(np.load(tmp_path / "two" / "clusters.npy"), np.load(out / "clusters.npy"))
    script("route.py", "--out", tmp_path / "two", "--checkpoint", out / "sdrnet.pt", "--amp", "off", "--task", "toy:weaves", processes=2)
    assert np.allclose(np.load(tmp_path / "two" / "toy-weaves" / "scores.npy"), np.load(out / "toy-weaves" / "scores.npy"), atol=0.26)      # one image of 400
    script("pretrain.py", "--out", tmp_path / "two", *common[2:], *SMALL, "--epochs", "2", "--clusters", out / "clusters.npy", "--init", out / "simsiam.pt", processes=2)
    losses = [[json.loads(line)["loss"] for line in open(folder / "sdrnet.log.jsonl")] for folder in (tmp_path / "two", out)]
    assert len(losses[0]) == len(losses[1]) and np.allclose(losses[0][:3], losses[1][:3], atol=1e-4)    # rounding grows from there: trust.py has float64
    assert abs(np.mean(losses[0]) - np.mean(losses[1])) < 0.05


# ---------------------------------------------------------------------------- bad input

@pytest.fixture(scope="module")
def wrong(toy, tmp_path_factory):
    """A folder of things that cannot be used."""
    out, _ = toy
    w = tmp_path_factory.mktemp("wrong")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)
    for folder in ("photos", "broken", "short/train/a", "short/test/a", "notest/train/a", "extra/train/a", "extra/test/a", "extra/test/b"):
        os.makedirs(w / folder)
        for i in range(20 if folder in ("photos", "broken") else 3):
            Image.fromarray(pictures[i]).save(w / folder / f"{i:02d}.jpg")
    data = (w / "broken" / "07.jpg").read_bytes()
    (w / "broken" / "07.jpg").write_bytes(data[:len(data) // 2])
    os.makedirs(w / "empty")
    clusters = np.load(out / "clusters.npy")
    about = json.load(open(out / "clusters.json"))
    for name, array, note in (("length", clusters[:100], None), ("float", clusters.astype(np.float32), None), ("table", clusters[:, None], None), ("range", np.where(clusters == 3, 99, clusters), about),
                              ("negative", clusters - 1, None), ("seventeen", np.where(np.arange(320) == 5, 16, clusters), None), ("listing", clusters, {**about, "sha256": "0" * 64}), ("hole", np.where(clusters == 3, 4, clusters), about)):
        np.save(w / f"{name}.npy", array)
        if note:
            json.dump(note, open(w / f"{name}.json", "w"))
    np.save(w / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(w / "nan.npy", np.full((50, 8), np.nan, np.float32))
    np.save(w / "far.npy", np.array([0, 10 ** 6]))
    (w / "text.pt").write_text("not a checkpoint")
    return w


CASES = [
    ("pretrain.py", ["--data", "{w}/nowhere"], "nowhere"),
    ("pretrain.py", ["--data", "{w}/empty"], "no images in"),
    ("pretrain.py", ["--data", "{w}/broken", *SMALL], "07.jpg"),
    ("pretrain.py", ["--data", "{w}/broken", *SMALL, "--workers", "0", "--arch", "resnet18", "--image-size", "16"], "07.jpg"),
    ("pretrain.py", ["--data", "CIFAR10"], "--root"),
    ("pretrain.py", ["--subset", "{w}/far.npy"], "indices must lie in 0 .. 4095"),
    ("pretrain.py", ["--colour", "red"], "--colour"),
    ("pretrain.py", ["--epoch", "3"], "--epoch"),
    ("pretrain.py", ["--epochs", "many"], "many"),
    ("pretrain.py", ["--clusters", "{out}/clusters.npy", "--phases", "1,2"], "five"),
    ("pretrain.py", ["--clusters", "{out}/clusters.npy", "--kd-weight", "0.5"], "add --distill"),
    ("pretrain.py", ["--clusters", "{out}/clusters.npy", "--phases", "nan,0,0,0,1"], "none negative"),
    ("pretrain.py", ["--clusters", "{out}/clusters.npy", "--phases", "1,0,0,0,0"], "trains no sub-net"),
    ("pretrain.py", ["--root", "x"], "--root does nothing with --data toy"),
    *[("pretrain.py", [option, value], f"argument {option}: {value} is not from") for option, value in
      (("--epochs", "nan"), ("--epochs", "inf"), ("--lr", "0"), ("--seed", "-1"), ("--head", "3"), ("--weight-decay", "-1"), ("--max-bad", "2"), ("--monitor-every", "0"), ("--width", "99999"))],
    *[("cluster.py", [option, value], f"argument {option}: {value} is not from") for option, value in (("--k", "0"), ("--eps", "nan"), ("--temperature", "inf"), ("--rate", "-1"))],
    ("cluster.py", ["--retrieve", "toy:weaves", "--budget", "4", "--balanced"], "--balanced does nothing with --retrieve"),
    ("route.py", ["--samples", "3"], "--samples does nothing without --budget-gflops"),
    ("detect_voc.py", ["--test-sets", "2012:val"], "--test-sets does nothing without --voc"),
    ("detect_voc.py", ["--backbone", "{out}/sdrnet.pt", "--path", "a,b"], "four digits"),
    ("pretrain.py", ["--device", "tpu"], "tpu"),
    ("pretrain.py", ["--subset", "{sub}", *SMALL, "--clusters", "{out}/clusters.npy", "--width", "1"], "width 1"),
    ("pretrain.py", ["--init", "{w}/text.pt", *SMALL], "text.pt"),
    ("pretrain.py", ["--init", "{out}/simsiam.pt", "--width", "16"], "another architecture"),
    ("pretrain.py", ["--monitor-task", "{w}/notest"], "test"),
    ("pretrain.py", ["--clusters", "{w}/missing.npy"], "missing.npy"),
    *[("pretrain.py", ["--subset", "{sub}", *SMALL, "--clusters", f"{{w}}/{name}.npy"], text) for name, text in
      (("length", "100 entries"), ("float", "float32"), ("table", "(320, 1)"), ("range", "holds clusters 0 to 99"), ("negative", "holds clusters -1 to"), ("seventeen", "17 clusters"),
       ("listing", "another listing"), ("hole", "cluster 3 has no image"), ("pickled", "not a plain .npy"))],
    ("pretrain.py", ["--subset", "{sub}", *SMALL, "--clusters", "{out}/clusters.npy", "--sub-batch", "17"], "does not divide"),
    ("pretrain.py", ["--subset", "{sub}", *SMALL, "--clusters", "{out}/clusters.npy", "--groups", "3"], "--groups 3"),
    ("cluster.py", [], "no checkpoint"),
    ("cluster.py", ["--checkpoint", "{w}/text.pt"], "text.pt"),
    ("cluster.py", ["--subset", "{sub}", "--checkpoint", "{out}/simsiam.pt", "--k", "321"], "321 clusters cannot be made of 320"),
    ("cluster.py", ["--features", "{w}/nan.npy", "--k", "2"], "not finite"),
    ("cluster.py", ["--features", "{w}/length.npy", "--k", "2"], "length.npy"),
    ("cluster.py", ["--features", "{w}/pickled.npy", "--k", "2"], "not a plain .npy"),
    ("route.py", [], "no checkpoint"),
    ("route.py", ["--checkpoint", "{out}/simsiam.pt"], "'simsiam'"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--task", "{w}/nowhere"], "nowhere"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--task", "{w}/notest"], "test"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--task", "{w}/extra"], "class b is in test/ but not in train/"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--task", "toy:moon"], "toy worlds are"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--task", "pets"], "--root"),
    ("route.py", ["--checkpoint", "{out}/sdrnet.pt", "--simsiam", "{w}/none.pt"], "none.pt"),
]


@pytest.mark.parametrize("name,arguments,text", CASES, ids=[f"{c[0][:-3]}-{c[2]}" for c in CASES])
def test_bad_input_is_one_clear_line(name, arguments, text, toy, wrong, tmp_path, monkeypatch):
    out, common = toy
    arguments = [a.format(w=wrong, out=out, sub=common[3]) for a in arguments]
    before = contents(out), contents(wrong)
    monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "new"), *arguments])
    with pytest.raises(sdrnet.InputError) as caught:
        importlib.import_module(name[:-3]).main()
    assert text in str(caught.value)
    assert (contents(out), contents(wrong)) == before
    assert not (tmp_path / "new").exists() or not any(p.endswith((".pt", ".npy")) for p in contents(tmp_path / "new"))


def test_bad_input_ends_a_script_with_status_2_and_one_line(toy, wrong, tmp_path):
    for name, arguments, text in (CASES[2], CASES[6], CASES[27]):
        _, error = script(name, "--out", tmp_path / "new", *[a.format(w=wrong, out=toy[0], sub=toy[1][3]) for a in arguments], expect=2)
        assert error.startswith(f"{name}: error: ") and error.count("\n") == 1 and text in error
    _, error = script("pretrain.py", "--out", tmp_path / "new", "--data", wrong / "nowhere", processes=2, expect=1)
    assert error.count("pretrain.py: error: ") == 1


def test_clusters_of_features_alone_are_checked_by_length(tmp_path, capsys):
    images = pretrain.toy_listing(20, 0)
    np.save(tmp_path / "clusters.npy", np.arange(20) % 16)
    (tmp_path / "clusters.json").write_text('{"n": 20, "k": 16, "sha256": null}')
    assert pretrain.load_clusters(str(tmp_path / "clusters.npy"), images)[1] == 2 and "only its length was checked" in capsys.readouterr().out


def test_pictures_are_of_the_clusters_that_trained_only(toy, tmp_path, capsys):
    """route.py shows no cluster of a clusters.npy that was written anew beside the checkpoint."""
    out = toy[0]
    content = sdrnet.load(str(out / "sdrnet.pt"))
    shown = lambda file: route.shown_clusters(argparse.Namespace(data="toy", clusters=None, out=str(file), root=None, checkpoint="sdrnet.pt"), content)
    assert (shown(out)[1] == np.load(out / "clusters.npy")).all()
    np.save(tmp_path / "clusters.npy", np.load(out / "clusters.npy")[::-1])
    assert shown(tmp_path) is None and "is not what sdrnet.pt was trained on" in capsys.readouterr().out


def test_a_file_as_out_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sdrnet.InputError, match="this is a file"):
        pretrain.start(argparse.Namespace(out=str(tmp_path / "file"), device="cpu", seed=0))


def test_a_read_only_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    _, error = script("pretrain.py", *SMALL, "--out", tmp_path / "file" / "run", expect=2)
    assert error.startswith("pretrain.py: error: ") and error.count("\n") == 1


def test_a_small_task_shrinks_k_and_says_so(toy, wrong, tmp_path):
    printed, _ = script("route.py", "--out", tmp_path, "--checkpoint", toy[0] / "sdrnet.pt", "--task", wrong / "short", "--amp", "off")
    assert "k shrinks from 20 to 2" in printed


# ---------------------------------------------------------------------------- images of every kind

def test_images_of_all_modes_and_sizes_train(tmp_path):
    """Grey, palette, CMYK, RGBA, 16 bits, rotated by EXIF, tiny, large: through the loader that crops while decoding."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos" / "deep" / "er"
    os.makedirs(folder)
    base = Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    base.convert("L").save(folder / "grey.png")
    base.convert("P").save(folder / "palette.gif")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 65536, (50, 40), dtype=np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    base.resize((300, 20)).save(folder / "wide.bmp")
    listing = pretrain.folder_listing(str(tmp_path / "photos"))
    assert len(listing) == 8 and listing.pack().packed is None
    turned = listing.decode([os.path.basename(n) for n in listing.names].index("turned.jpg"))
    assert turned.shape == (3, 90, 70)
    sixteen = listing.decode([os.path.basename(n) for n in listing.names].index("sixteen.png"))
    assert 100 < sixteen.float().mean() < 155
    printed, _ = script("pretrain.py", "--data", tmp_path / "photos", "--out", tmp_path / "run", "--arch", "resnet18", "--image-size", "32", "--epochs", "2", "--workers", "1", "--width", "8", "--head", "32", "--batch-size", "8")
    assert "wrote" in printed
