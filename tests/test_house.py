"""The laws of the house: pieces that lift, arrows that point one way, sizes, help texts."""
import ast
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import frozen
from conftest import ROOT

SCRIPTS = ("sdrnet", "cluster", "pretrain", "route", "detect_voc")


def source(script):
    with open(os.path.join(ROOT, f"{script}.py")) as file:
        return file.read()


def lift(script, *names):
    """Functions cut out of a script by name, in a namespace of torch and numpy alone."""
    space = {"torch": torch, "F": F, "nn": nn, "np": np, "math": math}
    text = source(script)
    found = {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef)}
    for name in names:
        exec(found[name], space)
    return space


# ------------------------------------------------------------------------------------ lifting

def test_sinkhorn_lifts():
    S = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 5)))
    U, v, error, _ = lift("cluster", "sinkhorn")["sinkhorn"](
        S, 0.3, torch.zeros(5, dtype=torch.float64), tolerance=1e-9)
    wanted = np.exp(S.numpy() / 0.3)                   # rows and columns in turn, written out
    for _ in range(2000):
        wanted /= wanted.sum(0) * 5 / 60
        wanted /= wanted.sum(1, keepdims=True)
    assert np.allclose(U, wanted, atol=1e-7) and error < 1e-8


def test_learn_centroids_lifts():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 4)))[0].T
    kinds = np.repeat(np.arange(4), 100)
    f = torch.from_numpy(centres[kinds] + 0.05 * rng.normal(size=(400, 8))).float()
    f = F.normalize(f - f.mean(0))
    C = lift("cluster", "sinkhorn", "learn_centroids")["learn_centroids"](f, 4, epochs=5, batch=32)
    found = (f @ C.T).argmax(1).numpy()
    assert all(len(set(found[kinds == kind])) == 1 for kind in range(4)) and len(set(found)) == 4


def test_losses_lift():
    space = lift("pretrain", "cosine_loss", "symmetric_loss", "feature_std")
    p, z = np.random.default_rng(0).normal(size=(2, 2, 6, 5))
    cosine = [-np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
              for a, b in ((p[0], z[1]), (p[1], z[0]))]
    tensors = torch.from_numpy(p), torch.from_numpy(z)
    assert float(space["cosine_loss"](tensors[0][0], tensors[1][1])) == pytest.approx(cosine[0])
    assert float(space["symmetric_loss"](*tensors)) == pytest.approx(np.mean(cosine))
    unit = z[0] / np.linalg.norm(z[0], axis=1, keepdims=True)
    wanted = unit.std(0, ddof=1).mean() * 5 ** 0.5
    assert float(space["feature_std"](tensors[1][0])) == pytest.approx(wanted, rel=1e-5)


def plain_knn(train, labels, queries, k, alone):
    """Votes of the k nearest, by loops."""
    shares = np.zeros((len(queries), labels.max() + 1))
    for i, query in enumerate(queries):
        cosines = [(query @ f / np.linalg.norm(query) / np.linalg.norm(f), j)
                   for j, f in enumerate(train) if not (alone and i == j)]
        near = sorted(cosines, reverse=True)[:k]
        for cosine, j in near:
            shares[i, labels[j]] += math.exp(cosine / 0.07)
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize("k", [5, 1000])
def test_knn_lifts(k):
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(40, 6)), rng.normal(size=(9, 6)), rng.integers(0, 3, 40)
    knn = lift("route", "knn")["knn"]
    tensors = torch.from_numpy(train), torch.from_numpy(labels)
    assert np.allclose(knn(*tensors, torch.from_numpy(test), k=k),
                       plain_knn(train, labels, test, k, False), atol=1e-5)
    assert np.allclose(knn(*tensors, k=k, chunk=7), plain_knn(train, labels, train, k, True),
                       atol=1e-5)
    several = F.one_hot(torch.from_numpy(labels))
    assert torch.allclose(knn(tensors[0], several, k=k), knn(*tensors, k=k))


def test_paths_and_slices_lift():
    space = lift("sdrnet", "path_to_index", "index_to_path", "slice_weight")
    assert [space["index_to_path"](i, 3) for i in (0, 1, 80)] == [(0,) * 4, (0, 0, 0, 1), (2,) * 4]
    assert space["path_to_index"]((1, 0, 2, 1), 3) == 27 + 6 + 1
    weight = torch.arange(24.0).view(4, 6)
    part = space["slice_weight"](weight, torch.tensor([0, 3]), torch.tensor([5]))
    assert part.tolist() == [[5.0], [23.0]] and space["slice_weight"](weight) is weight


def test_retrieve_lifts():
    pool, targets = np.random.default_rng(0).normal(size=(2, 50, 4))
    claims = lift("tests/neighbours", "retrieve")["retrieve"](pool, targets[:1], 50)
    cosine = pool @ targets[0] / np.linalg.norm(pool, axis=1)
    assert claims.tolist() == np.argsort(-cosine).tolist()


def test_average_precision_lifts():
    space = lift("detect_voc", "box_iou", "match_voc", "match_coco", "precision_recall",
                 "average_11_point", "average_area", "average_coco", "evaluate")
    with open(os.path.join(ROOT, "tests", "fixtures", "average_precision.json")) as file:
        wanted = json.load(file)
    for rule, table in space["evaluate"](*frozen.detections(), 4).items():
        assert 100 * np.nanmean(table) == pytest.approx(wanted[rule]["AP"], abs=1e-6)


# ------------------------------------------------------------------------------------ laws

# Lines of a script. These figures may only fall.
MOST_LINES = {"sdrnet": 942, "cluster": 313, "pretrain": 874, "route": 598, "detect_voc": 886}
# Different names of sdrnet that a script uses. These figures may only fall.
MOST_NAMES = {"sdrnet": 1, "cluster": 1, "pretrain": 39, "route": 26, "detect_voc": 37}
ARROWS = {"sdrnet": set(), "cluster": set(), "pretrain": {"sdrnet", "route"}, "route": {"sdrnet"},
          "detect_voc": {"sdrnet"}}


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_point_one_way(script):
    imported = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(SCRIPTS) == ARROWS[script]


def test_lines_fit_the_page():
    for path in [*pathlib.Path(ROOT).glob("*.py"), *pathlib.Path(ROOT).glob("tests/*.py")]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_read(script):
    text = source(script)
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MOST_LINES[script]
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "sdrnet"} | {"InputError"}
    assert len(used) <= MOST_NAMES[script]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            assert ast.get_docstring(node), f"{script}.{node.name} has no docstring"


@pytest.mark.parametrize("script, most", [("sdrnet", 6), ("cluster", 12), ("pretrain", 30),
                                          ("route", 14), ("detect_voc", 22)])
def test_every_option_says_what_it_does(script, most):
    calls = re.findall(r"add_argument\((.*?)\)\n", source(script), re.S)
    assert 0 < len(calls) <= most
    assert all("help=" in call for call in calls)


def test_the_lesson_names_the_first_file_that_is_missing(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "lesson.py"), "--run",
                           str(tmp_path), "--out", str(tmp_path / "page")],
                          capture_output=True, text=True)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("lesson.py: error: ")
    assert str(tmp_path / "images.txt") in line and not (tmp_path / "page").exists()


def test_the_headers_loop_runs_in_an_empty_file(tmp_path):
    text = source("sdrnet").split("SDR in your own loop:")[1].split("As a script:")[0]
    (tmp_path / "loop.py").write_text(textwrap.dedent(text))
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([5, 96])") == 16
