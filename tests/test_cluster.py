"""Balanced clustering against plain references, and the command on arrays of one's own."""
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import cluster


def run(monkeypatch, *arguments):
    """cluster.py by its command line."""
    monkeypatch.setattr(sys, "argv", ["cluster.py", *map(str, arguments)])
    cluster.main()


def mixture(n=600, d=16, kinds=16, seed=0):
    """Features of so many kinds, (n, d) float32, and the kind of each."""
    rng = np.random.default_rng(seed)
    centres, kind = rng.normal(size=(kinds, d)), rng.integers(0, kinds, n)
    return (centres[kind] + 0.3 * rng.normal(size=(n, d))).astype(np.float32), kind


def plain_sinkhorn(S, eps, rounds=3000):
    """Rows and columns normalised in turn, in float64."""
    U = np.exp((S - S.max()) / eps)
    for _ in range(rounds):
        U /= U.sum(0) * S.shape[1] / len(S)
        U /= U.sum(1, keepdims=True)
    return U


@pytest.mark.parametrize("eps", [1.0, 0.2])
def test_sinkhorn_is_the_balanced_posterior(eps):
    S = np.random.default_rng(0).normal(size=(80, 6))
    start = torch.zeros(6, dtype=torch.float64)
    U, v, error, _ = cluster.sinkhorn(torch.from_numpy(S), eps, start, tolerance=1e-8)
    assert np.allclose(U, plain_sinkhorn(S, eps), atol=1e-6) and error <= 1e-8
    again, _, _, rounds = cluster.sinkhorn(torch.from_numpy(S), eps, v, tolerance=1e-7)
    assert rounds == 1 and torch.allclose(U, again, atol=1e-6)         # warm


def test_no_eps_overflows():
    S = torch.randn(500, 8).clamp(-1, 1)
    for eps in (1e-3, 0.01):                           # exp(1 / 0.001) is no float
        U, v, error, _ = cluster.sinkhorn(S, eps, torch.zeros(8, dtype=torch.float64))
        assert torch.isfinite(U).all() and torch.isfinite(v).all()
        assert error <= 0.01 and torch.allclose(U.sum(1), torch.ones(500), atol=1e-5)
        assert (U.sum(0) / (500 / 8) - 1).abs().max() <= 0.011


def test_the_objective_is_the_headers():
    S = torch.randn(20, 3, dtype=torch.float64)
    U = torch.softmax(S, 1)
    wanted = sum(u * s for u, s in zip((U / 20).flatten(), S.flatten()))
    wanted -= 0.3 * sum(u * u.log() for u in (U / 20).flatten())
    assert cluster.objective(U, S, 0.3) == pytest.approx(float(wanted), abs=1e-12)


def test_kinds_are_found_and_balanced():
    f, kind = mixture(n=1600)
    f = torch.nn.functional.normalize(torch.from_numpy(f))
    f = torch.nn.functional.normalize(f - f.mean(0))
    C = cluster.learn_centroids(f, 16, batch=64)
    assert torch.allclose(C.norm(dim=1), torch.ones(16), atol=1e-5)
    found = cluster.scores(f, C).argmax(1).numpy()
    pure = sum(np.bincount(kind[found == i]).max() for i in np.unique(found)) / len(kind)
    assert pure > 0.8 and np.bincount(found, minlength=16).min() >= 30


def test_clusters_whose_index_ends_alike_are_alike():
    C = torch.nn.functional.normalize(torch.randn(256, 8))
    index = cluster.order_clusters(C, 4)
    assert sorted(index.tolist()) == list(range(256))
    ordered = C[index.argsort()]
    similarity = ordered @ ordered.T
    places = torch.arange(256)
    alike = [similarity[(places[:, None] % 4 ** p == places % 4 ** p)].mean() for p in range(5)]
    assert alike[0] < alike[1] < alike[2] < alike[3] < alike[4]


def test_an_array_of_ones_own(tmp_path, monkeypatch, capsys):
    f, _ = mixture()
    np.save(tmp_path / "mine.npy", f)
    for name in ("a", "b"):
        run(monkeypatch, "--features", tmp_path / "mine.npy", "--out", tmp_path / name,
            "--epochs", 3)
    clusters, C = (np.load(tmp_path / "a" / f"{name}.npy") for name in ("clusters", "centroids"))
    assert clusters.dtype == np.int64 and clusters.shape == (600,) and C.shape == (16, 16)
    assert np.array_equal(clusters, np.load(tmp_path / "b" / "clusters.npy"))
    about = json.loads((tmp_path / "a" / "clusters.json").read_text())
    assert about["sizes"] == np.bincount(clusters, minlength=16).tolist()
    unit = f / np.linalg.norm(f, axis=1, keepdims=True) - np.float32(about["feature_mean"])
    assert np.array_equal((unit @ C.T).argmax(1), clusters)            # as other features would be
    assert "no picture" in capsys.readouterr().out
    run(monkeypatch, "--features", tmp_path / "mine.npy", "--out", tmp_path / "c", "--k", 10)
    assert "not g^4" in capsys.readouterr().out


def test_the_picture_shows_the_nearest_images(tmp_path, monkeypatch):
    f, _ = mixture(n=200)
    (tmp_path / "images").mkdir()
    names = [f"ü {i:03d}.png" for i in range(200)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(tmp_path / "images" / name)
    np.save(tmp_path / "features.npy", f)
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(names).encode() + b"\r\n")
    run(monkeypatch, "--out", tmp_path, "--data", tmp_path / "images")
    clusters, C = np.load(tmp_path / "clusters.npy"), np.load(tmp_path / "centroids.npy")
    mean = torch.tensor(json.loads((tmp_path / "clusters.json").read_text())["feature_mean"])
    S = cluster.scores(cluster.Centred(f, mean), torch.from_numpy(C)).numpy()
    sheet = np.array(Image.open(tmp_path / "clusters.png"))
    for row, i in enumerate(np.unique(clusters)):
        members = np.flatnonzero(clusters == i)
        best = members[S[members, i].argmax()]
        assert sheet[row * 66 + 30, 66 + 30].tolist() == [best, 255 - best, 7]
        assert sheet[row * 66:row * 66 + 64, :66].min() < 128          # its index and size


def test_read_only_and_memory_mapped_arrays_give_no_warning(tmp_path):
    f, _ = mixture(n=50)
    f.setflags(write=False)
    np.save(tmp_path / "f.npy", f.astype(np.float16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = cluster.load_features(tmp_path / "f.npy")
        cluster.scores(loaded, torch.randn(3, 16))
        cluster.scores(cluster.Centred(f, loaded.mean), torch.randn(3, 16))


@pytest.mark.parametrize("scale, shift", [(1e30, 0), (1e-30, 0), (1, 1000)])
def test_features_of_any_scale_and_place_are_clustered(tmp_path, scale, shift):
    f, kind = mixture(n=400, kinds=4)
    np.save(tmp_path / "f.npy", (f + shift).astype(np.float64) * scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = cluster.load_features(tmp_path / "f.npy")
        C = cluster.learn_centroids(loaded, 4, batch=32)
    found = cluster.scores(loaded, C).argmax(1).numpy()
    pure = sum(np.bincount(kind[found == i]).max() for i in np.unique(found)) / len(kind)
    assert pure > 0.9


def test_what_was_not_reached_is_said(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "features.npy", mixture(n=60)[0])
    run(monkeypatch, "--out", tmp_path, "--k", 10, "--eps", 1e-6, "--epochs", 1)
    printed = capsys.readouterr().out
    assert "did not reach a marginal error of 0.01" in printed and "not g^4" in printed
    assert 1 < json.loads((tmp_path / "clusters.json").read_text())["effective_rank"] < 16


def test_effective_rank_counts_directions():
    f = np.random.default_rng(0).standard_normal((20000, 3)) @ np.eye(3, 9)            # three of 9
    assert cluster.effective_rank(torch.from_numpy(f)) == pytest.approx(3, abs=0.05)
    values = np.linalg.eigvalsh(np.cov((f * (1, 2, 3, 1, 1, 1, 1, 1, 1)).T, bias=True))
    f = torch.from_numpy(f * (1, 2, 3, 1, 1, 1, 1, 1, 1))
    expected = values.sum() ** 2 / (values ** 2).sum()
    assert cluster.effective_rank(f - f.mean(0)) == pytest.approx(expected)
    line = torch.arange(-5.0, 6)[:, None] * torch.tensor([1.0, 2.0])
    assert cluster.effective_rank(line) == pytest.approx(1)


def wrong(tmp_path):
    """{name: (array or None, options, what the line says)}"""
    f, _ = mixture(n=50)
    broken = f.copy()
    broken[7, 3] = np.nan
    return {"none": (None, (), "not there"), "dims": (f[0], (), "(N, D) are needed"),
            "integers": (np.zeros((9, 3), int), (), "(N, D) are needed"),
            "nan": (broken, (), "row 7 is not finite"),
            "alike": (np.ones((60, 4), np.float32), (), "all rows point the same way"),
            "more": (f, ("--k", 51), "50 rows only"), "k": (f, ("--k", 0), "--k 0"),
            "eps": (f, ("--eps", "nan"), "--eps nan"), "unknown": (f, ("--kk", 3), "--kk")}


@pytest.mark.parametrize("name", sorted(wrong(None)))
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, name):
    array, options, said = wrong(tmp_path)[name]
    if array is not None:
        np.save(tmp_path / "features.npy", array)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--out", tmp_path, *options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("cluster.py: error: ") and said in error
    assert not (tmp_path / "clusters.npy").exists()
