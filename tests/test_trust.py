"""Nothing lost, the same result, a clear word: short versions of trust.py's series, broken images, and what stops a run."""
import argparse
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import trust
import pretrain
import sdrnet
from sdrnet import InputError


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = trust.Lab(tmp_path_factory.mktemp("lab"), epochs=2)
    yield lab
    lab.close()


def test_a_killed_run_ends_with_the_same_weights(lab):
    text, holds = trust.kills(lab, ("sdr",), 1)
    assert holds, text


def test_sigterm_to_the_whole_group_saves_and_the_run_ends_with_the_same_weights(lab):
    """On photographs, so that loader workers are in that group; two of the photographs are broken."""
    text, holds = trust.terms(lab, ("photos",))
    assert holds, (text, lab.err.read_text())
    assert [line.split("\t")[0][-6:] for line in open(lab.straight("photos")[0] / "bad_images.txt")] == ["07.jpg", "08.jpg"]


def test_sigterm_ends_clustering_with_143_and_nothing_half_written(lab):
    text, holds = trust.terms(lab, ("cluster",))
    assert holds, (text, lab.err.read_text())


def test_damaged_and_hostile_files_are_refused(lab):
    text, holds = trust.fuzz(lab, 150, 3)
    assert holds, text


def test_clusters_of_one_and_two_images_train(lab):
    text, holds = trust.tiny(lab)
    assert holds, text


def test_a_failing_save_leaves_the_state_before(lab):
    text, holds = trust.saving(lab)
    assert holds, text


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(lab):
    """No file may grow beyond 64 kB, which is what a full disk looks like to the one who writes."""
    out, status, seconds = lab.stop("simsiam", 0.3, signal.SIGINT)
    assert status == 130 and seconds < 10
    before = trust.hashes(out)
    status, _ = lab.run("simsiam", out, limit=65_536)
    error = lab.err.read_text()
    assert status == 2 and error.startswith("pretrain.py: error: ") and error.count("\n") == 1 and "simsiam.last.pt" in error
    after = trust.hashes(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".pt")) and not any(name.endswith((".tmp", ".new")) for name in after)
    assert lab.finish("simsiam", out)[0]


def test_a_changed_bit_and_a_compressed_checkpoint_are_refused(lab, tmp_path):
    """torch.load would take both: it does not compare checksums, and unpacks whatever size a file claims."""
    data, file = bytearray((lab.base / "simsiam.pt").read_bytes()), tmp_path / "x.pt"
    for at in np.random.default_rng(0).integers(len(data) // 8, len(data) * 7 // 8, 20):         # the weights lie there
        data[at] ^= 4
        file.write_bytes(data)
        torch.load(file, weights_only=True)
        with pytest.raises(InputError, match="x.pt is not a checkpoint, or it is damaged"):
            sdrnet.load(str(file))
        data[at] ^= 4
    with zipfile.ZipFile(lab.base / "simsiam.pt") as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="x.pt is not a checkpoint"):
        sdrnet.load(str(file))


# ---------------------------------------------------------------------------- what stops a run

def pretrained(lab, out, *more, monkeypatch):
    """pretrain.py's main in this process, on the lab's SDR command."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, lab.commands["sdr"][1]), "--out", str(out), *more])
    pretrain.main()


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(lab, tmp_path, monkeypatch, capsys):
    def poisoned(*arguments, **options):               # step 15 is drawn with a sub-net's images gone bad
        for step, x, sub_x, subs in batches(*arguments, **options):
            if step == 15:
                sub_x[:len(sub_x) // len(subs)] = float("nan")
            yield step, x, sub_x, subs
    batches = pretrain.training_batches
    monkeypatch.setattr(pretrain, "training_batches", poisoned)
    with pytest.raises(InputError, match=r"step 15: the loss is not finite \(largest network -0\.\d+, sub-nets {\d+: nan, \d+: -?0\.\d+}"):
        pretrained(lab, tmp_path, "--collapse-std", "50", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("features collapse") == 1     # healthy features do not reach 50: warned of once
    state = sdrnet.load(str(tmp_path / "sdrnet.last.pt"))
    assert state["step"] == 15 and all(bool(torch.isfinite(v).all()) for v in state["model"].values()) and not (tmp_path / "sdrnet.pt").exists()
    monkeypatch.setattr(pretrain, "training_batches", batches)
    pretrained(lab, tmp_path, monkeypatch=monkeypatch)
    assert trust.same(trust.value(tmp_path / "sdrnet.pt"), trust.value(lab.base / "sdrnet.pt"))


def test_collapse_stops_if_asked_to(lab, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="step 0: features collapsed"):
        pretrained(lab, tmp_path, "--collapse-std", "50", "--stop-on-collapse", monkeypatch=monkeypatch)
    assert sdrnet.load(str(tmp_path / "sdrnet.last.pt"))["step"] == 1


def test_a_fault_ends_a_run_whose_loader_workers_ignore_signals(tmp_path):
    (tmp_path / "fault.py").write_text("import torch, pretrain\n\ndef main():\n"
                                       "    loader = torch.utils.data.DataLoader(range(1000), num_workers=1, worker_init_fn=pretrain.quiet_worker)\n"
                                       "    for i in loader: raise KeyError('ours')\n\npretrain.run(main, 'fault.py')\n")
    done = subprocess.run([sys.executable, tmp_path / "fault.py"], capture_output=True, text=True, timeout=100, env=trust.ENV)
    assert done.returncode == 1 and "KeyError: 'ours'" in done.stderr


def test_fresh_is_obeyed_once_when_torchrun_restarts(monkeypatch):
    assert not pretrain.restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert pretrain.restarted()


# ---------------------------------------------------------------------------- images

def listing(folder, out, share=0.2):
    return pretrain.open_images(argparse.Namespace(data=str(folder), root=None, subset=None, download=False, seed=0, max_bad=share, out=str(out)))


def album(folder, sizes):
    """Photographs 00.png ... of these sizes."""
    os.makedirs(folder)
    for i, size in enumerate(sizes):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


def spoil(folder, numbers):
    for i in numbers:
        data = (folder / f"{i:02d}.png").read_bytes()
        (folder / f"{i:02d}.png").write_bytes(data[:len(data) // 2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")      # where there is but one core
@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_image_is_replaced_by_the_next_of_its_cluster(packed, tmp_path):
    """The batches are those of a folder in which a copy of the next one lies in its place, for any number of workers and
    from any step on."""
    sizes = [(24, 24) if packed else (24 + i, 40 - i) for i in range(16)]
    clusters = np.arange(16) % 2                       # 3 -> 5; 4 -> 6 -> 8, being broken too
    for name in ("broken", "mended"):
        album(tmp_path / name, sizes)
    spoil(tmp_path / "broken", (3, 4, 6))
    for i, j in ((3, 5), (4, 8), (6, 8)):
        shutil.copy(tmp_path / "mended" / f"{j:02d}.png", tmp_path / "mended" / f"{i:02d}.png")

    def batches(name, workers, first=0):
        images = listing(tmp_path / name, tmp_path).pack()
        images.clusters = clusters
        assert (images.packed is not None) == packed
        plan = pretrain.Plan(16, 8, 3, 0, np.arange(16), 2, 2, (0, 0, 0, 0, 1))
        found = list(pretrain.training_batches(images, plan, first, size=16, seed=0, device=torch.device("cpu"), workers=workers))
        images.share()
        return images, found
    _, expected = batches("mended", 0)
    for workers, first in ((0, 0), (2, 0), (1, 3)):
        images, found = batches("broken", workers, first)
        assert [step for step, *_ in found] == list(range(first, 6))
        assert all(torch.equal(x, y) and torch.equal(s, t) for (_, x, s, _), (_, y, t, _) in zip(found, expected[first:]))
        assert sorted(images.bad) == [3, 4, 6]
        assert [line.split("\t")[0][-6:] for line in open(tmp_path / "bad_images.txt")] == ["03.png", "04.png", "06.png"]


@pytest.mark.parametrize("packed", [True, False])
def test_more_broken_images_than_stated_stop_by_name(packed, tmp_path):
    album(tmp_path / "a", [(24, 24) if packed else (24 + i, 40) for i in range(16)])
    spoil(tmp_path / "a", (0, 5))
    with pytest.raises(InputError, match=r"0\d.png cannot be read .*2 of 16 are broken.*--max-bad.*bad_images.txt"):
        images = listing(tmp_path / "a", tmp_path, 0.1).pack()
        plan = pretrain.Plan(16, 8, 2, 0)
        for _ in pretrain.training_batches(images, plan, 0, size=16, seed=0, device=torch.device("cpu"), workers=0):
            pass
        images.share()
    assert len(open(tmp_path / "bad_images.txt").readlines()) == 2


def test_files_that_vanish_count_as_broken(tmp_path):
    album(tmp_path / "a", [(24 + i, 40) for i in range(16)])
    images = listing(tmp_path / "a", tmp_path).pack()
    os.remove(tmp_path / "a" / "09.png")
    assert torch.equal(images.pixels(9), images.decode(10))
    shutil.rmtree(tmp_path / "a")
    for _ in pretrain.training_batches(images, pretrain.Plan(16, 8, 1, 0), 0, size=16, seed=0, device=torch.device("cpu"), workers=0):
        break
    with pytest.raises(InputError, match="FileNotFoundError"):
        images.share()


def test_nothing_is_trained_when_all_images_have_vanished(tmp_path):
    """Whatever --max-bad: there is nothing left to stand in."""
    album(tmp_path / "a", [(24 + i, 40) for i in range(16)])
    images = listing(tmp_path / "a", tmp_path, 1.0).pack()
    shutil.rmtree(tmp_path / "a")
    next(pretrain.training_batches(images, pretrain.Plan(16, 8, 1, 0), 0, size=16, seed=0, device=torch.device("cpu"), workers=0))
    with pytest.raises(InputError, match="or all, are broken|a hundred in a row, or all"):
        images.share()


def test_a_broken_image_of_a_task_is_refused_by_name(tmp_path):
    album(tmp_path / "a", [(24, 24)] * 3)
    spoil(tmp_path / "a", (1,))
    images = pretrain.folder_listing(str(tmp_path / "a"))
    with pytest.raises(InputError, match="01.png cannot be read"):
        list(pretrain.batches(images, 16, workers=1))
    with pytest.raises(InputError, match="01.png cannot be read"):
        images.pack()


@pytest.mark.filterwarnings("ignore:Image size")       # pytest undoes pretrain's own filter
def test_long_thin_and_huge_images(tmp_path):
    """20,000 pixels by one are read, without being scaled up whole; 20,000 by 20,000 are refused by name."""
    os.makedirs(tmp_path / "a")
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "a" / "wide.png")
    Image.new("RGB", (1, 20_000), "red").save(tmp_path / "a" / "tall.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a" / "huge.png")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a" / "large.png")
    images = pretrain.folder_listing(str(tmp_path / "a"))
    found = {os.path.basename(name)[:-4]: i for i, name in enumerate(images.names)}
    for name in ("wide", "tall"):
        crop = pretrain.plain_crop(images.decode(found[name]), 224)
        assert crop.shape == (3, 224, 224) and crop[0].min() == 255
        crops, broken = pretrain.TrainCrops(images, 32)[found[name], torch.rand(2, pretrain.COLUMNS)]
        assert crops.shape == (2, 3, 32, 32) and not broken
    for name in ("huge", "large"):
        with pytest.raises(InputError, match=f"{name}.png cannot be read .*pixels"):
            images.decode(found[name])
