"""The claims: what reproduce.py runs, and what claims.py makes of the lines."""
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import claims
import reproduce
from conftest import ROOT


def job(tmp_path, name):
    """A job on a toy seed whose base was run: 4,096 names, clusters of 16."""
    base = tmp_path / "base"
    base.mkdir(exist_ok=True)
    (tmp_path / "toy/images").mkdir(parents=True, exist_ok=True)
    (base / "images.txt").write_text("".join(f"seed3_{i:06d}.png\n" for i in range(4096)))
    np.save(base / "clusters.npy", np.arange(4096) % 16)
    return reproduce.Job(name, reproduce.rows_of("toy")[name], "toy", 3, tmp_path, tmp_path)


def option(command, name):
    return str(command[command.index(name) + 1])


def test_currencies_count_what_they_name(tmp_path):
    """SDR of E epochs of N images, B a step, four sub-nets of B / 2 in 7 of 8 steps."""
    epochs = {name: float(option(reproduce.commands_of(job(tmp_path, name))[0], "--epochs"))
              for name in ("sdr", "simsiam", "simsiam_images", "simsiam_cost")}
    steps = 4096 / 64 * epochs["sdr"]
    assert epochs["simsiam"] == epochs["sdr"] == 10
    assert epochs["simsiam_images"] * 4096 == steps * (64 + 7 / 8 * 4 * 32)
    assert epochs["simsiam_cost"] * 4096 == pytest.approx(64 * steps * (1 / 8 + 7 / 8 * 4.7))


def test_a_kind_alone_sees_as_many_images(tmp_path):
    command, = [c for c in reproduce.commands_of(job(tmp_path, "only_lands"))
                if c[0] == "pretrain.py"]
    members = np.load(tmp_path / "only_lands/subset.npy")
    assert len(members) == 1024
    epochs = float(option(command, "--epochs"))        # of 1,024 images, a third of 10 of 4,096
    assert epochs * len(members) == pytest.approx(10 / 3 * 4096, rel=1e-4)
    order = np.random.default_rng([3, 8]).permutation(4096)            # lands: the third world
    assert set(order[members] % 32) == set(range(16, 24))


def test_random_and_renumbered_clusters_keep_their_sizes(tmp_path):
    reproduce.commands_of(job(tmp_path, "literal"))
    number = np.load(tmp_path / "literal/clusters.npy")
    first = np.load(tmp_path / "base/clusters.npy")
    assert len(np.unique(16 * first + number)) == 16 and not np.array_equal(first, number)
    reproduce.commands_of(job(tmp_path, "random"))
    clusters = np.load(tmp_path / "random/clusters.npy")
    assert (np.bincount(clusters) == 256).all() and (clusters != np.arange(4096) % 16).any()


def test_pixels_are_compared_without_their_brightness(tmp_path, monkeypatch):
    """Two classes, dark left and dark right; how bright an image is says nothing of its class."""
    rng, ramp = np.random.default_rng(0), np.linspace(0, 40, 32)
    for part in ("train", "test"):
        for c, slope in (("left", ramp), ("right", ramp[::-1])):
            (tmp_path / "task" / part / c).mkdir(parents=True)
            for i in range(12):
                pixels = np.tile(slope, (32, 1)) + rng.integers(0, 200)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"task/{part}/{c}/{i}.png")
    monkeypatch.setattr(reproduce, "open_pool", lambda job: (None, [tmp_path / "task"]))
    line = reproduce.run_job(job(tmp_path, "pixels"), "c")
    assert line["tasks"] == {"task": {"largest": 100.0, "images": 24}} and line["commit"] == "c"


def line(row, seed, routed, largest):
    tasks = {name: {"largest": largest, "routed": routed, "images": 400, "mean": 30.0, "best": 40.0,
                    "tests": [30.0, 40.0]} for name in reproduce.POOLS["toy"].kind_of}
    if row != "sdr":
        tasks = {name: {"largest": largest, "images": 400} for name in tasks}
    clusters = {name: {"pool": 0.25, "chosen": 0.75, "pure": 0.5, "above": 0.25} for name in tasks}
    return {"pool": "toy", "seed": seed, "row": row, "commit": "c", "images": 1000, "tasks": tasks,
            "clusters": clusters, "sub_std": 0.9}


def test_tables_say_what_the_lines_hold(tmp_path):
    lines = [line("sdr", 3, 36.0, 33.0), line("simsiam", 3, 0.0, 30.0), line("sdr", 4, 32.0, 31.0),
             line("simsiam", 4, 0.0, 33.0)]
    (tmp_path / "claims.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    claims.render(tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert "| 2: SDR over SimSiam, equal epochs | +2.5 ± 4.9: in 1 of 2 seeds |" in text
    assert "| 2: SDR over SimSiam, equal cost |  |" in text
    assert "| SDR | 34.0 ± 2.8 | 32.0 ± 1.4 | 30.0 ± 0.0 | 40.0 ± 0.0 | +2.5 ± 4.9 |" in text
    assert "+50.0 ± 0.0: holds, 8 of 8 cases |" in text
    assert "| 5: ... by chance in as many cases | 2.0 |" in text
    assert "| 4: SDR: std of the sub-nets' accuracies on a task | 7.1 ± 0.0 |" in text


def test_tasks_that_chose_settings_are_left_out_of_means():
    lines = [line("sdr", 3, 30.0, 30.0), line("simsiam", 3, 0.0, 20.0)]
    for one in lines:
        one["pool"], scores = "domains", one["tasks"]["lands"]
        one["tasks"] = {name: dict(scores) for name in reproduce.POOLS["domains"].kind_of}
    lines[0]["tasks"]["hands"]["routed"] = 100.0
    data = claims.Lines(lines, "domains")
    assert data.gains("sdr", "simsiam") == [10.0]
    assert data.gains("sdr", "simsiam", tasks=list(data.kind_of)) == [20.0]


def test_what_own_images_gain_is_set_against_what_sdr_gains():
    """Of four worlds the one that gains most by its own images gains least by SDR."""
    lines = [line("simsiam_third", 3, 0.0, 10.0), line("simsiam_images", 3, 0.0, 20.0),
             line("sdr", 3, 0.0, 0.0)]
    for i, world in enumerate(reproduce.POOLS["toy"].kind_of):
        lines[2]["tasks"][world]["routed"] = 25.0 - i
        lines.append(line(f"only_{world}", 3, 0.0, 10.0 + i))
    text = "1: ... and what SDR gains on a task, at equal images: correlation over all tasks"
    assert claims.claims(claims.Lines(lines, "toy"))[text] == "-1.00"
    assert claims.claims(claims.Lines(lines[:-1], "toy"))[text] == ""  # one world is not measured


@pytest.mark.parametrize("script, option, named", [("reproduce", "--only", "nonsense"),
                                                   ("claims", "--results", "nowhere")])
def test_what_is_not_there_is_one_line(tmp_path, script, option, named):
    run = subprocess.run([sys.executable, f"{ROOT}/tests/{script}.py", option, named], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and named in run.stderr


def test_what_goes_on_sees_other_views_than_its_base(tmp_path):
    seeds = {name: option(reproduce.commands_of(job(tmp_path, name))[0], "--seed")
             for name in ("base", "simsiam", "sdr", "scratch")}
    assert seeds == {"base": "3", "simsiam": "103", "sdr": "103", "scratch": "3"}


def test_a_row_without_its_base_is_one_line(tmp_path):
    run = subprocess.run([sys.executable, f"{ROOT}/tests/reproduce.py", "--only", "sdr",
                          "--results", str(tmp_path / "r"), "--work", str(tmp_path)],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "goes on from base" in run.stderr


def test_one_cluster_counts_the_one_sub_net_that_was_trained(tmp_path):
    result = {"chosen": {"index": 2, "test": 60.0}, "largest": {"test": 50.0}, "test_images": 400}
    (tmp_path / "result.json").write_text(json.dumps(result))
    for name in ("scores", "test_scores"):
        np.save(tmp_path / f"{name}.npy", np.arange(16.0))
    assert reproduce.read_result(tmp_path)["routed"] == 60.0
    line = reproduce.read_result(tmp_path, reproduce.ONE)
    assert (line["routed"], line["index"], line["mean"], line["best"]) == (15.0, 15, 15.0, 15.0)
