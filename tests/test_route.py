"""Scores, the choice and what is written, against plain references."""
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax

import route
import sdrnet


def run(monkeypatch, script, *arguments):
    """A script's main() by its command line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def write_task(folder, classes=3, train=6, test=4, side=24, noise=60, colour=150):
    """A task whose classes are colours; in much noise, little of them is to be seen."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            os.makedirs(folder / part / f"class{c}", exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, noise, (side, side, 3))
                pixels[:, :, c % 3] += colour
                path = folder / part / f"class{c}" / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_network(path, groups=2):
    """An sdrnet.pt with random weights and measured statistics."""
    net = sdrnet.SDRNet("resnet18", 8, groups)
    sdrnet.recalibrate_bn(net, lambda prefix: [torch.randn(32, 3, 24, 24)])
    sdrnet.save_checkpoint(path, {
        "kind": "sdrnet", "config": net.config, "image_size": 24,
        "backbone": net.resnet.state_dict(), "statistics": net.prefix_statistics(),
        "heads": {}, "origin": {}})
    return net


def hard_task(folder):
    """A task on which sub-nets differ."""
    return write_task(folder, train=12, test=20, noise=250, colour=3)


# ------------------------------------------------------------------------------------ scores

def test_accuracies_are_what_their_names_say():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    shares = torch.eye(3)[[0, 0, 1, 1, 0, 2]]
    assert route.measure(shares, labels, "top-1") == pytest.approx(100 * 4 / 6)
    wanted = 100 * (2 / 3 + 1 + 1 / 2) / 3
    assert route.measure(shares, labels, "mean-per-class") == pytest.approx(wanted)


def test_mean_average_precision_is_voc2007s():
    rng = np.random.default_rng(0)
    scores, truth = rng.random((30, 4)), rng.integers(0, 2, (30, 4))
    truth[rng.random((30, 4)) < 0.2] = -1
    truth[:, 3] = 0                                    # a class that no image holds does not count
    wanted = []
    for c in range(3):
        ranked = [t for _, t in sorted(zip(-scores[:, c], truth[:, c])) if t >= 0]
        hits = np.cumsum(ranked)
        precision, recall = hits / np.arange(1, len(ranked) + 1), hits / hits[-1]
        wanted.append(sum(max([0.0, *precision[recall >= r / 10 - 1e-9]]) for r in range(11)) / 11)
    ours = route.measure(torch.from_numpy(scores), torch.from_numpy(truth), "mAP")
    assert ours == pytest.approx(100 * np.mean(wanted), abs=1e-9)


def test_the_probe_is_logistic_regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    scale = np.sqrt((x ** 2).mean())

    def loss(flat):
        w = flat.reshape(6, 3)
        logits = x / scale @ w[:5] + w[5]
        return -log_softmax(logits, 1)[np.arange(60), y].mean() + 0.01 / 2 * (w[:5] ** 2).sum()
    w = minimize(loss, np.zeros(18), method="BFGS").x.reshape(6, 3)
    ours = route.linear_probe(torch.from_numpy(x).float(), torch.from_numpy(y),
                              torch.from_numpy(x).float(), 0.01)
    wanted = log_softmax(x / scale @ w[:5] + w[5], 1)
    assert np.allclose(torch.log_softmax(ours, 1), wanted, atol=5e-3)


def test_all_paths_score_as_one_by_one(tmp_path):
    net = write_network(tmp_path / "net.pt")
    task = route.open_task(str(hard_task(tmp_path / "colours")), 24)
    device = torch.device("cpu")
    scores, tests = route.score_all_paths(net.eval(), task, 5, device)
    assert len(set(scores)) > 4 and len(set(tests)) > 4
    for index in (0, 7, 11, 15):
        plain = net.extract(sdrnet.index_to_path(index, 2))
        train, test = route.task_features(plain, task, device)
        wanted = route.knn_accuracy(train, test, task, 5)
        assert (scores[index], tests[index]) == pytest.approx(wanted)


def test_training_images_are_limited_class_by_class():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 20)
    task = route.Task("t", list(range(75)), labels, [], labels[:0], 3)
    small = route.limit_training(task, 24)
    assert torch.bincount(small.train_labels).tolist() in ([10, 5, 9], [9, 5, 10])
    assert [labels[i] for i in small.train.indices] == small.train_labels.tolist()
    assert route.limit_training(task, 75) is task
    labels = torch.arange(300) // 3                    # fewer than the classes: any of them
    few = route.limit_training(task._replace(train=list(range(300)), train_labels=labels), 40)
    classes = few.train_labels.tolist()
    assert len(set(classes)) == 40 and max(classes) >= 40


def test_voc_labels_leave_out_what_is_difficult_only(tmp_path):
    things = [("dog", 1), ("dog", 0), ("cat", 0), ("cat", 1), ("car", 1), ("car", 1)]
    text = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult></object>"
                   for name, hard in things)
    (tmp_path / "a.xml").write_text(f"<annotation>{text}</annotation>")
    labels = route.voc_labels(tmp_path / "a.xml")
    assert dict(zip(route.VOC_CLASSES, labels.tolist())) == {
        **{name: 0 for name in route.VOC_CLASSES}, "dog": 1, "cat": 1, "car": -1}


# ------------------------------------------------------------------------------------ the command

def test_a_task_is_routed_and_its_files_are_what_they_say(tmp_path, monkeypatch, capsys):
    out, task = tmp_path / "run", hard_task(tmp_path / "colours")
    out.mkdir()
    net = write_network(out / "sdrnet.pt")
    run(monkeypatch, route, "--out", out, "--task", task, "--workers", 0, "--k", 3, "--probe")
    result = json.loads((out / "colours" / "result.json").read_text())
    scores = np.load(out / "colours" / "scores.npy")
    tests = np.load(out / "colours" / "test_scores.npy")
    chosen, path = result["chosen"], tuple(result["chosen"]["path"])
    assert len(set(scores)) > 4 and chosen["index"] == scores.argmax()
    assert path == sdrnet.index_to_path(chosen["index"], 2)
    assert chosen["score"] == scores.max() and chosen["test"] == tests[chosen["index"]]
    plain, x = sdrnet.load_network(out / "colours" / "subnet.pt"), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.allclose(plain(x), net.eval()(x, path), atol=1e-4)
    assert result["best_by_test"]["test"] == tests.max() and "probe" in chosen
    with Image.open(out / "colours" / "story.png") as story:
        assert story.size[0] > 700
    assert "colours" in capsys.readouterr().out


def test_where_all_score_alike_the_largest_network_is_taken(tmp_path, monkeypatch, capsys):
    out, task = tmp_path / "run", write_task(tmp_path / "one", train=1)
    out.mkdir()
    net = write_network(out / "sdrnet.pt")
    run(monkeypatch, route, "--out", out, "--task", task, "--workers", 0)
    result = json.loads((out / "one" / "result.json").read_text())
    assert result["chosen"]["index"] is None
    assert result["chosen"]["test"] == result["largest"]["test"]
    assert "none can be chosen" in capsys.readouterr().out
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        plain = sdrnet.load_network(out / "one" / "subnet.pt")
        assert torch.allclose(plain(x), net.eval()(x), atol=1e-4)


def test_a_network_without_subnets_is_scored(tmp_path, monkeypatch, capsys):
    net, task = sdrnet.SDRNet("resnet18", 8, 1), write_task(tmp_path / "colours")
    sdrnet.save_checkpoint(tmp_path / "simsiam.pt", {
        "kind": "simsiam", "config": net.config, "image_size": 24, "statistics": {},
        "backbone": net.resnet.state_dict(), "heads": {}, "origin": {}})
    run(monkeypatch, route, "--network", tmp_path / "simsiam.pt", "--out", tmp_path, "--task", task,
        "--workers", 0)
    assert "colours" in capsys.readouterr().out
    assert not (tmp_path / "colours" / "subnet.pt").exists()
