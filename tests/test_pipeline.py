"""The scripts as a user runs them: the whole pipeline, going on after a kill, several processes."""
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import pretrain
import sdrnet
import toy
from conftest import ROOT

SMALL = ["--width", "8", "--no-small-stem", "--head", "32", "--batch-size", "16",
         "--image-size", "16", "--lr", "0.1", "--amp", "off", "--workers", "0"]


@pytest.fixture(autouse=True, scope="module")
def few_images_for_statistics():
    """64 images a prefix do here; scripts that tests start by themselves keep their 512."""
    kept = pretrain.calibration_batches.__defaults__
    pretrain.calibration_batches.__defaults__ = (64, 32)
    yield
    pretrain.calibration_batches.__defaults__ = kept


def script(name, *arguments, status=0):
    """Runs a script's main() with these arguments, in this process; returns what it printed."""
    printed = io.StringIO()
    printed.reconfigure = lambda **options: None       # as sys.stdout has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", printed)
        try:
            importlib.import_module(name.removesuffix(".py")).main()
            ended = 0
        except SystemExit as end:
            ended = end.code
    assert ended == status, printed.getvalue()[-2000:]
    return printed.getvalue()


def processes(world, name, *arguments):
    """Runs a script by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(world), os.path.join(ROOT, name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def weights(path):
    """All tensors of a checkpoint, by name."""
    content = torch.load(path, weights_only=True)
    heads = {f"{head}.{k}": v for head, part in content["heads"].items() for k, v in part.items()}
    rows = {f"{bn}.{k}": v for bn, part in content["statistics"].items() for k, v in part.items()}
    return {**content["backbone"], **heads, **rows}


def same(a, b):
    """Whether two checkpoints hold the same bits."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 192 toy images, and tasks."""
    folder = tmp_path_factory.mktemp("toy")
    toy.draw(str(folder), pool=192, per_part=16)
    return folder


@pytest.fixture(scope="module")
def start(images, tmp_path_factory):
    """A finished SimSiam run with its clusters."""
    out = tmp_path_factory.mktemp("start")
    script("pretrain.py", "--data", images / "images", "--out", out, *SMALL, "--epochs", 1)
    script("cluster.py", "--out", out, "--data", images / "images")
    return out


def sdr(images, start, out, *more):
    """The arguments of an SDR run of 24 steps, of which the first 3 are phase 0."""
    return ["pretrain.py", "--data", images / "images", "--out", out, *SMALL, "--epochs", 2,
            "--sub-batch", 8, "--clusters", start / "clusters.npy", "--init", start / "simsiam.pt",
            *more]


@pytest.mark.slow
def test_the_pipeline_leaves_what_the_headers_promise(images, start, tmp_path):
    names = (start / "images.txt").read_text().splitlines()
    assert names == sorted(os.listdir(images / "images")) and len(names) == 192
    features, clusters = np.load(start / "features.npy"), np.load(start / "clusters.npy")
    assert features.shape == (192, 64) and features.dtype == np.float32
    assert clusters.shape == (192,) and len(np.unique(clusters)) >= 14
    net = sdrnet.load_network(start / "simsiam.pt")
    crop = functools.partial(sdrnet.center_crop, size=16)
    dataset = sdrnet.Images(images / "images", names, crop)
    again = sdrnet.embed(net, dataset, torch.device("cpu"), "off")
    assert np.allclose(features, again, atol=1e-4)
    script("sdrnet.py", start / "simsiam.pt", images / "images", tmp_path / "f.npy", "--amp", "off")
    assert np.allclose(np.load(tmp_path / "f.npy"), features, atol=1e-4)
    assert (tmp_path / "f.txt").read_text() == (start / "images.txt").read_text()

    printed = script(*sdr(images, start, tmp_path))
    log = [json.loads(line) for line in open(tmp_path / "sdrnet.log.jsonl")]
    assert {10, 12, 24} <= {line["step"] for line in log} and "phase 4" in printed
    assert all(-1 <= line["loss"] <= 1 for line in log)
    assert "is finished" in script(*sdr(images, start, tmp_path))
    changed = script(*sdr(images, start, tmp_path, "--kd-weight", 2), status=2)
    assert "kd_weight 1.0 -> 2.0" in changed and "--fresh" in changed

    task = images / "tasks" / "weaves"
    script("route.py", "--out", tmp_path, "--task", task, "--data", images / "images")
    result = json.loads((tmp_path / "weaves" / "result.json").read_text())
    assert result["train_images"] == 16 and len(np.load(tmp_path / "weaves" / "scores.npy")) == 16
    sdrnet.load_network(tmp_path / "weaves" / "subnet.pt")


def interrupt(arguments, number, word):
    """Runs a script until it prints a word, sends it a signal and returns its exit status."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, arguments[0]), *arguments[1:]],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while word not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate()
    return process.returncode


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(images, start, tmp_path):
    """Ended by a signal after ten of 48 steps, in phase 0, then killed where it has gone on."""
    more = ["--phases", "1,2,0,0,0", "--epochs", 4]
    script(*sdr(images, start, tmp_path / "whole", *more))
    arguments = list(map(str, sdr(images, start, tmp_path / "cut", *more)))
    state = tmp_path / "cut" / "sdrnet.last.pt"
    assert interrupt(arguments, signal.SIGTERM, "step 10 ") == 128 + signal.SIGTERM
    step = torch.load(state, weights_only=True)["step"]
    assert 10 <= step < 48
    assert interrupt(arguments, signal.SIGKILL, f"going on from {state}, step {step}") < 0
    assert torch.load(state, weights_only=True)["step"] == step
    assert f"step {step}" in script(*arguments)
    whole, cut = (torch.load(tmp_path / name / "sdrnet.last.pt", weights_only=True)
                  for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 48
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
    assert same(tmp_path / "whole" / "sdrnet.pt", tmp_path / "cut" / "sdrnet.pt")


@pytest.mark.slow
def test_processes_agree_across_the_border_of_phase_0(images, start, tmp_path):
    logs = {}
    for world in (1, 2):
        processes(world, *sdr(images, start, tmp_path / str(world), "--epochs", 1))
        with open(tmp_path / str(world) / "sdrnet.log.jsonl") as file:
            lines = [json.loads(line) for line in file]
        logs[world] = [line for line in lines if line["step"] in (10, 12)]     # slow ones add lines
    assert [line["phase"] for line in logs[1]] == [line["phase"] for line in logs[2]] == [4, 4]
    for key in ("loss", "sub_loss", "kd"):             # fp32 sums in another order; late they part
        assert logs[2][0][key] == pytest.approx(logs[1][0][key], abs=5e-3)
    first, other = (weights(tmp_path / world / "sdrnet.pt") for world in ("1", "2"))
    assert first.keys() == other.keys()
    norms = [(first[key] - other[key]).float().norm() / first[key].float().norm().clamp(min=1)
             for key in first]
    assert max(norms) < 0.2                            # and not another network's


@pytest.mark.slow
def test_features_of_processes_are_those_of_one(images, start, tmp_path):
    processes(2, "sdrnet.py", start / "simsiam.pt", images / "images", tmp_path / "f.npy",
              "--amp", "off")
    assert np.allclose(np.load(tmp_path / "f.npy"), np.load(start / "features.npy"), atol=1e-4)
    processes(2, "pretrain.py", "--data", images / "images", "--out", tmp_path, *SMALL,
              "--epochs", 0.25)
    net = sdrnet.load_network(tmp_path / "simsiam.pt")
    names = sdrnet.load_names(tmp_path / "images.txt")
    crop = functools.partial(sdrnet.center_crop, size=16)
    dataset = sdrnet.Images(images / "images", names, crop)
    alone = sdrnet.embed(net, dataset, torch.device("cpu"), "off")
    assert np.allclose(np.load(tmp_path / "features.npy"), alone, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--objective", "byol"), ("--distill", "l2", "--shared-heads", "--phases-literal"),
    ("--distill", "none", "--phases", "0,0,0,0,1", "--shared", "0.75", "--subnets", "3")])
def test_other_forms_of_the_method_train(images, start, tmp_path, options):
    if "byol" in options:
        script("pretrain.py", "--data", images / "images", "--out", tmp_path, *SMALL,
               "--epochs", 0.5, "--objective", "byol")
        options += ("--init", tmp_path / "byol.pt")
    script(*sdr(images, start, tmp_path, *options))
    last = json.loads(open(tmp_path / "sdrnet.log.jsonl").read().splitlines()[-1])
    assert last["phase"] == 4 and last["std"] > 0.1 and ("none" in options) == (last["kd"] == 0)


@pytest.mark.slow
def test_large_images_are_cropped_by_workers(images, tmp_path):
    """And whoever reads them, the run is the same."""
    arguments = ["pretrain.py", "--data", images / "images", *SMALL, "--epochs", 0.25,
                 "--image-size", 12]                   # images are more than twice as large
    script(*arguments, "--out", tmp_path / "a", "--workers", 2)
    script(*arguments, "--out", tmp_path / "b", "--workers", 0)
    assert same(tmp_path / "a" / "simsiam.pt", tmp_path / "b" / "simsiam.pt")
