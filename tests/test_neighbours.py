"""SEPT, DATA and MoCo v2 against independent references, and their commands."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import neighbours
import pretrain
import sdrnet
import toy
from test_folders import TINY, few_images_for_statistics, run

TRAINING = ["--recipe", "toy", "--width", 8, "--epochs", 0.5, "--batch-size", 16, "--workers", 0]
NARROW = neighbours.Size((4, 14, 20, 40), (1, 2, 1, 1))
UNEVEN = neighbours.Size((8, 8, 32, 64), (2, 1, 2, 1))


def test_claims_are_those_of_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    pool, targets = np.split(rng.normal(size=(218, 6)), [211])
    targets[3] = 2 * targets[0] + 0.01 * targets[3]    # two that want the same images
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (targets, pool)]
    cosine = unit[0] @ unit[1].T                       # float64
    assert np.diff(np.sort(cosine, axis=1)).min() > 1e-6           # no ties for float32
    np.save(tmp_path / "pool.npy", pool.astype(np.float32))
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    for budget in (1, 5, 60, 211):
        free, wanted = set(range(211)), []
        for claim in range(budget):
            wanted.append(max(free, key=cosine[claim % 7].__getitem__))
            free.remove(wanted[-1])
        for given, chunk in ((pool, 8192), (mapped, 50), (mapped, 1)):
            claims = neighbours.retrieve(given, targets, budget, chunk=chunk)
            assert claims.dtype == np.int64 and claims.tolist() == wanted
    holed = pool.copy()
    holed[100, 2] = np.nan
    for given, of, budget in ((pool, targets, 212), (pool, targets[:0], 5), (holed, targets, 5)):
        with pytest.raises(ValueError):
            neighbours.retrieve(given, of, budget)


def size_net(arch="resnet18"):
    """A SizeNet whose weights and running statistics are all at random, in eval mode."""
    net = neighbours.SizeNet(arch, 8, groups=1)
    for bn in sdrnet.batch_norms(net):
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
        torch.nn.init.normal_(bn.bias, std=0.1)
    net(torch.randn(16, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("arch, size", [("resnet18", NARROW), ("resnet18", UNEVEN),
                                        ("resnet50", NARROW)])
def test_an_extracted_size_is_the_networks_own(arch, size):
    net, x = size_net(arch), torch.randn(256, 3, 32, 32)
    plain = net.extract(size)
    complete = sdrnet.resnet(**plain.config).eval()    # as subnet.pt holds it, of all blocks
    missing, unexpected = complete.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.allclose(plain(x), net(x, size), atol=1e-5)
        assert torch.allclose(complete(x), net(x, size), atol=1e-5)
    assert missing and not unexpected
    assert [len(getattr(plain, f"layer{s}")) for s in (1, 2, 3, 4)] == list(size.depths)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(x)
    assert 256 * net.flops(size, 32) == counter.get_total_flops()
    with torch.no_grad():                              # statistics of a batch, and by that batch
        sdrnet.average_statistics(plain, (plain(v) for v in [x]))
        assert torch.allclose(plain(x), net.train()(x, size), rtol=0.03, atol=0.03)


def test_gradients_reach_a_size_and_nothing_else():
    net = size_net().train()
    kept = {name: value.clone() for name, value in net.resnet.named_buffers()}
    net(torch.randn(8, 3, 32, 32), NARROW).pow(2).sum().backward()
    for s, (width, depth) in enumerate(zip(*NARROW)):
        for b, block in enumerate(net.blocks(s)):
            assert {weight.grad is not None for weight in block.parameters()} == {b < depth}
        used = torch.arange(net.widths[s]) < width
        weight = net.blocks(s)[0].conv2.weight.grad    # (O, I, 3, 3), both of this stage
        assert torch.equal(weight.abs().sum((2, 3)) > 0, used[:, None] & used[None])
        assert torch.equal(net.blocks(s)[0].bn1.bias.grad != 0, used)
    assert all(torch.equal(value, kept[name]) for name, value in net.resnet.named_buffers())


def test_all_sizes_aim_at_the_largest_network():
    model = neighbours.SimSiam(size_net().train(), layers=2, width=16)
    x = torch.randn(2, 12, 3, 32, 32)
    z = [neighbours.embedding(model, v) for v in x]
    p = [model.predictor(neighbours.embedding(model, v, UNEVEN)) for v in x]
    wanted = pretrain.cosine_loss(p[0], z[1]) / 2 + pretrain.cosine_loss(p[1], z[0]) / 2
    assert torch.allclose(model(x, [UNEVEN])[1]["smallest"], wanted, atol=1e-6)


def test_momentum_and_queue_over_three_steps():
    model = neighbours.MoCo(size_net().train(), width=16, keys=20).double()
    optimizer = pretrain.make_optimizer(model, 0.0)    # of a learning rate of 0.1
    online = torch.nn.Sequential(model.net, model.projector)
    copied, queue = copy.deepcopy(online), model.queue.clone()
    for _ in range(3):
        x = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
        with torch.no_grad():
            q, k = F.normalize(online(x[0]), dim=1), F.normalize(copied(x[1]), dim=1)
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1)
        wanted = -(scores / 0.2).softmax(1)[:, 0].log().mean().item()
        values = pretrain.train_step(model, optimizer, x, [], torch.device("cpu"), "off")
        assert values["loss"] == pytest.approx(wanted, abs=1e-5)
        model.update_target(0.999)
        for old, new in zip(copied.parameters(), online.parameters()):
            old.data = 0.999 * old.data + 0.001 * new.data
        queue = torch.cat([queue, k])[8:]
        assert torch.allclose(model.queue, queue, atol=1e-6)
    for kept, wanted in zip(model.target.parameters(), copied.parameters()):
        assert torch.allclose(kept, wanted, atol=1e-6) and kept.grad is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 64 toy images and tasks of 32, and in base/ a short SimSiam run."""
    folder = tmp_path_factory.mktemp("neighbours")
    toy.draw(folder / "toy", pool=64, per_part=32)
    # At 16 px the last stage is of one pixel, where torch 2.14's bf16 gradient of a strided 3x3 on
    # CPU was seen to read memory that is not its own: now and then NaN.
    assert run(pretrain, "--data", folder / "toy/images", "--out", folder / "base", *TINY,
               "--image-size", 32)[0] == 0
    return folder


def test_sept_writes_what_pretrain_takes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    data, subset = ["--data", "toy/images"], "base/weaves/subset.npy"
    assert run(neighbours, "sept", "--out", "base", *data, "--workers", 0, "--budget", 40,
               "--task", "toy/tasks/weaves")[0] == 0
    rows = np.load(subset)
    assert rows.dtype == np.int64 and len(rows) == 40 and (np.diff(rows) > 0).all()
    assert (folder / "base/weaves/sept.png").stat().st_size > 1000
    assert run(pretrain, *data, "--out", "own", *TINY, "--subset", subset)[0] == 0
    assert len(sdrnet.load_names("own/images.txt")) == 40


@pytest.mark.parametrize("options", ["moco --init base/simsiam.pt", "data", "data --loss moco"])
def test_training_and_search(folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(folder)
    options = [*options.split(), "--data", "toy/images", "--out", tmp_path, *TRAINING]
    if options[0] == "data":
        options += ["--task", "toy/tasks/weaves", "--samples", 3]
    status, printed, errors = run(neighbours, *options)
    assert status == 0 and ("smallest" in printed) == (options[0] == "data"), errors
    assert type(sdrnet.load_network(tmp_path / f"{options[0]}.pt")) is sdrnet.SDRNet
    if options[0] == "moco":
        assert "is finished" in run(neighbours, *options)[1]
        return
    sizes = json.loads((tmp_path / "weaves/search.json").read_text())["sizes"]
    best, net = sizes[np.argmax([size["score"] for size in sizes])], tmp_path / "weaves/subnet.pt"
    assert len(sizes) == 3 and sdrnet.load_network(net).config["widths"] == best["widths"]


@pytest.mark.parametrize("options, said", [
    ("sept --task toy/tasks/weaves --out base --data toy/images --budget 65",
     " sept: error: --budget 65: the pool has 64 images only"),
    ("sept --task t --budget many", " sept: error: argument --budget: invalid int value"),
    ("sept --task t --out none --data toy/images", " sept: error: no file none/simsiam.pt"),
    ("sept --task t --bugdet 3", ": error: unrecognized arguments: --bugdet 3"),
    ("moco --data none", " moco: error: no folder none"),
    ("data --init base/simsiam.pt --width 4 --data toy/images --out unfit",
     " data: error: base/simsiam.pt: conv1.weight is"),
    ("data --window 0.5 2", " data: error: argument --window: 2 is not a number"),
    ("data --window 0.6 0.3 --task toy/tasks/weaves --recipe toy --data toy/images --out unfit",
     " data: error: --window 0.6 0.3: the least comes first"),
    ("data --task typo --recipe small --data toy/images --out unfit",
     " data: error: task typo: no folder typo/train"),
    ("nothing", ": error: argument method: invalid choice: 'nothing'")])
def test_nonsense_is_one_line(folder, monkeypatch, options, said):
    monkeypatch.chdir(folder)
    status, _, errors = run(neighbours, *options.split())
    assert status == 2 and errors.count("\n") == 1 and errors.startswith(f"neighbours.py{said}")
