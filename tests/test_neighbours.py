"""The neighbours of SDR, each against a few plain lines: SEPT's retrieval, DATA's sizes and search, BYOL and MoCo v2."""
import copy
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cluster
import detect_voc
import pretrain
import route
import sdrnet
from sdrnet import InputError, SDRNet
from test_core import close, processes, shaken

SIZE = ((1, 7), (2, 6), (1, 8), (2, 6))


def main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    module.main()


# ---------------------------------------------------------------------------- SEPT

def plain_round_robin(pool, targets, budget, taken):
    unit = lambda x: x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    pool, targets, taken, claims = unit(pool), unit(targets), set(np.flatnonzero(taken)), []
    while len(claims) < budget:
        a = targets[len(claims) % len(targets)]
        cosine = (pool * a).sum(1)
        cosine[list(taken)] = -2
        claims.append(int(cosine.argmax()))            # the first of equals
        taken.add(claims[-1])
    return claims


@pytest.mark.parametrize("case", ["plain", "far from the origin", "doubles in the pool", "equal targets", "the whole pool", "one target", "little memory"])
@pytest.mark.parametrize("bf16", [True, False])
def test_retrieval_equals_brute_force(case, bf16, monkeypatch):
    rng = np.random.default_rng(0)
    pool, targets, taken, budget = rng.normal(size=(700, 12)), rng.normal(size=(9, 12)), rng.random(700) < 0.1, 300
    if case == "far from the origin":                  # as pooled features after ReLU are: all cosines near 1
        pool, targets = pool * 0.1 + 3, targets * 0.1 + 3
    if case == "doubles in the pool":
        pool = pool[rng.integers(0, 60, 700)]
    if case == "equal targets":
        targets = np.repeat(targets[:1], 9, 0)
    if case == "one target":
        targets = targets[:1]
    if case == "the whole pool":
        budget = int((~taken).sum())
    if case == "little memory":
        monkeypatch.setattr(cluster, "ENTRIES", 400)
    monkeypatch.setattr(cluster, "computes_in_bf16", lambda kind: bf16)
    pool, targets = pool.astype(np.float32), targets.astype(np.float32)
    claims, cosines = cluster.retrieve(pool, torch.from_numpy(targets), budget, taken)
    assert claims.tolist() == plain_round_robin(pool, targets, budget, taken)
    owner = targets[np.arange(budget) % len(targets)].astype(np.float64)
    assert np.allclose(cosines, (owner * pool[claims]).sum(1) / np.linalg.norm(owner, axis=1) / np.linalg.norm(pool[claims].astype(np.float64), axis=1))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with an untrained simsiam.pt and a datanet.pt, and a subset of the toy images."""
    out = tmp_path_factory.mktemp("neighbours")
    np.save(out / "half.npy", np.arange(0, 800, 2))
    torch.manual_seed(0)
    for kind, net in (("simsiam", SDRNet("resnet18", 8, 1, 0.5, True)), ("datanet", SDRNet("resnet18", 8, 1, 0.5, True, sizes=(1, 6)))):
        model = pretrain.SDR(shaken(net), width=16)
        content = sdrnet.checkpoint(net, kind, heads={"projector": model.projector.state_dict()}, origin={"config": {"objective": "simsiam", "layers": 2, "head": 16, "data": "toy", "seed": 0}})
        content["config"]["image_size"] = 32
        sdrnet.save(str(out / f"{kind}.pt"), content)
    return out


def test_retrieve_by_its_command_line(toy, tmp_path, monkeypatch, capsys):
    """subset.npy indexes the whole listing, claims come from --subset alone; images equal to a target can be left out; 2
    processes and a memory-mapped features file give the same."""
    common = ["--checkpoint", toy / "simsiam.pt", "--amp", "off", "--workers", "0"]
    from PIL import Image
    folder = tmp_path / "targets"
    os.makedirs(folder)
    for i in (10, 11, 500):                            # three toy images; 10 and 500 lie in the subset
        Image.fromarray(pretrain.toy_images(np.array([i]))[0][0].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    subset = np.load(toy / "half.npy")
    for drop in (False, True):
        main(cluster, monkeypatch, *common, "--subset", toy / "half.npy", "--retrieve", folder, "--budget", 40, "--out", tmp_path / "one", *["--drop-duplicates"] * drop)
        found = np.load(tmp_path / "one" / "subset.npy")
        assert found.dtype == np.int64 and len(found) == 40 and (np.diff(found) > 0).all() and set(found) <= set(subset)
        assert {10, 500} <= set(found) if not drop else not {10, 500} & set(found)
        assert ("2 of the 400 images equal a target" in capsys.readouterr().out) == drop and os.path.getsize(tmp_path / "one" / "subset.png") > 500
    images, net = pretrain.toy_listing(4096, 0).subset(subset), sdrnet.load_network(str(toy / "simsiam.pt"))
    f, t = (pretrain.embed(net, listing, size=32, device=torch.device("cpu"), amp="off").numpy() for listing in (images, pretrain.folder_listing(str(folder)).pack()))
    dropped = np.isin(subset, (10, 500))
    assert found.tolist() == sorted(subset[plain_round_robin(f, t, 40, dropped)])
    script = os.path.join(ROOT, "cluster.py")
    processes(script, 2, *common, "--subset", toy / "half.npy", "--retrieve", folder, "--budget", 40, "--out", tmp_path / "two", "--drop-duplicates")
    with pytest.raises(InputError, match="made from another listing"):
        main(pretrain, monkeypatch, "--seed", "1", "--subset", tmp_path / "one" / "subset.npy", "--out", tmp_path / "other")         # other toy images
    assert np.array_equal(np.load(tmp_path / "two" / "subset.npy"), found)
    np.save(tmp_path / "f.npy", f)
    main(cluster, monkeypatch, *common, "--features", tmp_path / "f.npy", "--retrieve", folder, "--budget", 40, "--out", tmp_path / "three")
    assert sorted(subset[np.load(tmp_path / "three" / "subset.npy")]) == sorted(subset[plain_round_robin(f, t, 40, np.zeros(400, bool))])


# ---------------------------------------------------------------------------- sizes

def norm(y, bn):
    shape = [1, -1] + [1] * (y.dim() - 2)
    y = F.batch_norm(y, None, None, None, None, True, 0.0, bn.eps)
    return y if bn.weight is None else y * bn.weight[:y.shape[1]].view(shape) + bn.bias[:y.shape[1]].view(shape)


def plain_features(net, x, size=((2, 8),) * 4):
    """Pooled features of a ResNet-18 of nested size, in training mode, with torch functions alone."""
    y = norm(F.conv2d(x, net.conv1.weight, padding=1), net.bn1).relu()
    for stage, (depth, e) in zip((net.layer1, net.layer2, net.layer3, net.layer4), size):
        for block in stage[:depth]:
            n, i = block.conv2.out_channels * e // 8, y.shape[1]
            z = norm(F.conv2d(y, block.conv1.weight[:n, :i], stride=block.conv1.stride, padding=1), block.bn1).relu()
            z = norm(F.conv2d(z, block.conv2.weight[:n, :n], padding=1), block.bn2)
            y = z + (y[:, :n] if block.downsample is None else norm(F.conv2d(y, block.downsample[0].weight[:n, :i], stride=block.conv1.stride), block.downsample[1]))
            y = y.relu()
    return y.mean((2, 3))


def plain_head(head, y):
    for i, linear in enumerate(head.linears):
        y = F.linear(y, linear.weight[:, :y.shape[1]], linear.bias)
        y = norm(y, head.norms[i]) if i < len(head.norms) else y
        y = y.relu() if i < len(head.linears) - 1 else y
    return y


def crossed(p, z, distance=lambda p, z: -F.cosine_similarity(p, z, 1).mean()):
    n = len(p) // 2
    return (distance(p[:n], z[n:].detach()) + distance(p[n:], z[:n].detach())) / 2


@pytest.mark.parametrize("arch,small", [("resnet18", True), ("resnet50", False)])
def test_every_size_equals_its_extracted_network_and_costs_its_flops(arch, small):
    torch.manual_seed(0)
    net = shaken(SDRNet(arch, 8, 1, 0.5, small, sizes=(1, 6)))
    rng, x, flops = np.random.default_rng(0), torch.randn(2, 3, 32, 32), route.flops_of_sizes(net, 32)
    sizes = [tuple(c[rng.integers(len(c))] for c in net.sizes()) for _ in range(4)] + [tuple(c[i] for c in net.sizes()) for i in (0, -1)]
    with torch.no_grad():
        for size in sizes:
            plain = net.extract(size)
            assert close(net(x, size), plain(x), 1e-5)
            with FlopCounterMode(display=False) as counter:
                plain(x[:1])
            assert counter.get_total_flops() == flops(size)
            twin = copy.deepcopy(net).double()
            y = twin.trunk(twin.stem(x.double(), "batch"), [size], "batch")[:, 0]
            assert close(y, twin.extract(size).train()(x.double()), 1e-6)
        assert close(net(x, sizes[-1]), net(x), 1e-5) and len({flops(s) for s in sizes}) == len(set(sizes))
    for wrong in (((0, 6),) * 4, ((1, 5),) * 4, ((1, 8),) * 3, ((9, 8),) * 4):
        with pytest.raises(InputError):
            net.extract(wrong)


@pytest.mark.parametrize("objective", ["simsiam", "byol", "mocov2"])
def test_loss_and_gradient_of_each_objective_with_sizes_equal_plain_lines(objective):
    """The largest network and two sizes on one batch, the target the largest network's (momentum copy's): values, gradients,
    and what the step leaves in the queue."""
    torch.manual_seed(0)
    net = SDRNet("resnet18", 8, 1, 0.5, True, sizes=(1, 6))
    model = pretrain.SDR(net, width=16, objective=objective, queue=40).double()
    online = [p for n, p in model.named_parameters() if p.requires_grad and "distiller" not in n]
    with torch.no_grad():
        for p in model.parameters():                   # the momentum copy is another network by now
            p.add_(0.2 * torch.randn_like(p))
    if objective == "mocov2":
        model.queue = F.normalize(model.queue, dim=1)      # it was made in fp32
    x, sizes = torch.randn(12, 3, 16, 16, dtype=torch.float64), [((1, 6),) * 4, SIZE]
    before = model.queue.clone() if objective == "mocov2" else None
    loss, values = model(x, None, sizes)
    got = torch.autograd.grad(loss, online)

    def contrast(q, k):                                # logit by logit
        total = 0.0
        for a, b in zip(q, k):
            cosine = lambda c: (a @ c) / a.norm() / c.norm() / 0.2
            total = total - cosine(b) + torch.logsumexp(torch.stack([cosine(b)] + [cosine(c) for c in before]), 0)
        return total / len(q)
    distance = contrast if objective == "mocov2" else crossed.__defaults__[0]
    target_net, target_head = (net, model.projector) if objective == "simsiam" else model.target
    target = plain_head(target_head, plain_features(target_net, x)).detach()
    parts = [crossed(plain_head(model.predictor, plain_head(model.projector, plain_features(net, x, size))), target, distance) for size in (((2, 8),) * 4, *sizes)]
    reference = parts[0] + (parts[1] + parts[2]) / 2
    assert abs(loss.item() - reference.item()) < 1e-9 and abs(values[1].item() - (parts[1] + parts[2]).item() / 2) < 1e-9
    for a, b in zip(got, torch.autograd.grad(reference, online)):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    if objective == "mocov2":
        assert torch.allclose(model.queue, torch.cat([F.normalize(target, dim=1), before])[:40])


@pytest.mark.parametrize("objective", ["byol", "mocov2"])
def test_sub_nets_of_paths_aim_at_the_momentum_network(objective):
    """BYOL: along the sub-net's own path; MoCo: the largest network's key."""
    torch.manual_seed(0)
    net = SDRNet("resnet18", 8, 2, 0.5, True)
    model = pretrain.SDR(net, width=16, objective=objective, queue=24, distill="none").double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x, sub, path = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randn(8, 3, 16, 16, dtype=torch.float64), (0, 1, 1, 0)
    queue = model.queue.clone() if objective == "mocov2" else None
    _, values = model(x, sub, [path])

    def z(net, head, way):                             # after model(x): "last" is the uniform batch's
        if way is None:
            return head(net.trunk(net.stem(sub, "last"), None, "last"), mode="last")
        y, plain = net.stem(sub, "last"), net.extract(way).train()
        for stage in plain.stages():
            y = stage(y)
        kept = list(range(32)) + list(range(32 + 16 * way[3], 48 + 16 * way[3]))
        head = copy.deepcopy(head)
        head.linears[0].weight = torch.nn.Parameter(head.linears[0].weight[:, kept])
        return plain_head(head, y.mean((2, 3)))
    with torch.no_grad():
        p, t = plain_head(model.predictor, z(net, model.projector, path)), z(*model.target, path if objective == "byol" else None)
        distance = crossed.__defaults__[0] if objective == "byol" else lambda q, k: F.cross_entropy(
            torch.cat([F.cosine_similarity(q, k, 1)[:, None], F.normalize(q, dim=1) @ queue.T], 1) / 0.2, torch.zeros(len(q), dtype=torch.int64))
        assert abs(values[1].item() - crossed(p, t, distance).item()) < 1e-9


def test_momentum_follows_as_the_papers_say():
    for objective, tau in (("byol", lambda k: 1 - (1 - 0.9) * (math.cos(math.pi * k / 10) + 1) / 2), ("mocov2", lambda k: 0.9)):
        torch.manual_seed(0)
        model = pretrain.SDR(SDRNet("resnet18", 8, 1, small_stem=True), width=16, objective=objective, tau=0.9, queue=8).double()
        weight, copied = model.net.layer2[0].conv1.weight, model.target[0].layer2[0].conv1.weight
        for k in range(4):
            with torch.no_grad():
                weight.add_(torch.randn_like(weight))
            expected = weight.detach().clone() if k == 0 else tau(k) * expected + (1 - tau(k)) * weight.detach()
            model.follow(k, 10)
            assert torch.allclose(copied, expected, rtol=1e-12) and not copied.requires_grad
        assert all(p.requires_grad for g in pretrain.make_optimizer(model, pretrain.parse(["--objective", objective, "--lr", "1", "--weight-decay", "0"])).param_groups for p in g["params"])


@pytest.mark.parametrize("arguments,name", [(["--objective", "byol"], "byol"), (["--objective", "mocov2", "--queue", "100"], "mocov2"), (["--sizes", "1,4"], "datanet")])
def test_an_interrupted_run_ends_with_the_same_weights_target_and_queue(arguments, name, toy, tmp_path, monkeypatch, capsys):
    common = ["--subset", toy / "half.npy", "--width", "8", "--head", "16", "--batch-size", "80", "--epochs", "1", "--amp", "off", *arguments]
    main(pretrain, monkeypatch, *common, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(pretrain.Stopped):
        add = pretrain.Log.add

        def stop(self, **line):
            pretrain.Signals.caught = 15 if line["step"] == 2 else None
            add(self, **line)
        patch.setattr(pretrain.Log, "add", stop)
        main(pretrain, patch, *common, "--out", tmp_path / "cut")
    pretrain.Signals.caught = None
    assert sdrnet.load(str(tmp_path / "cut" / f"{name}.last.pt"))["step"] < 5
    main(pretrain, monkeypatch, *common, "--out", tmp_path / "cut")
    assert "continuing" in capsys.readouterr().out
    one, two = (sdrnet.load(str(tmp_path / run / f"{name}.last.pt"))["model"] for run in ("whole", "cut"))
    assert all(torch.equal(v, two[k]) for k, v in one.items()) and ("queue" in one) == (name == "mocov2") and any("target" in k for k in one) == (name != "datanet")
    content = sdrnet.load(str(tmp_path / "cut" / f"{name}.pt"))
    assert content["origin"]["images_seen"] == (3 * 400 if name == "datanet" else 400) and sdrnet.network(content).config.get("sizes") == ([1, 4] if name == "datanet" else None)


def test_two_processes_equal_one_for_every_objective(tmp_path):
    (tmp_path / "step.py").write_text(textwrap.dedent("""
        import sys, argparse, torch, pretrain, sdrnet
        device, results = pretrain.start(argparse.Namespace(device="cpu", seed=0, out=".")), {}
        for objective, sizes in (("simsiam", (1, 4)), ("byol", None), ("mocov2", None)):
            torch.manual_seed(0)
            model = pretrain.SDR(sdrnet.SDRNet("resnet18", 8, 1, 0.5, True, sizes), width=16, objective=objective, queue=50).double()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            wrapped, plan, losses = pretrain.parallel(model, device), pretrain.Plan(64, 16, 1, 0), []
            for step, x, _, _ in pretrain.training_batches(pretrain.toy_listing(64, 0), plan, 0, size=32, seed=0, device=device, workers=0):
                model.follow(step, plan.steps)
                loss, _ = wrapped(x.double(), None, pretrain.sandwich(model.net, [0, step]) if sizes else [])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += pretrain.agree(loss.detach()[None], device)
            results[objective] = losses, getattr(model, "queue", torch.zeros(1)), model.net.layer3[0].conv1.weight.detach()
        if pretrain.rank() == 0:
            torch.save(results, sys.argv[1])
        if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
    """))
    for count in (1, 2):
        processes(tmp_path / "step.py", count, tmp_path / f"{count}.pt")
    one, two = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    for objective in one:
        assert len(one[objective][0]) == 4 and np.allclose(one[objective][0], two[objective][0], atol=1e-7)       # the views are fp32
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one[objective][1:], two[objective][1:]))


def test_search_over_sizes_chooses_by_similarity_and_exports(toy, tmp_path, monkeypatch):
    net = sdrnet.load_network(str(toy / "datanet.pt"))
    flops = route.flops_of_sizes(net, 32)
    low, high = 0.4 * flops(((2, 8),) * 4) / 1e9, 0.6 * flops(((2, 8),) * 4) / 1e9
    arguments = ["--checkpoint", toy / "datanet.pt", "--task", "toy:weaves", "--amp", "off", "--max-images", "64", "--samples", "3", "--probe", "--budget-gflops", low, high]
    main(route, monkeypatch, "--out", tmp_path, *arguments)
    result = json.load(open(tmp_path / "toy-weaves" / "sizes" / "result.json"))
    assert len(result["sampled"]) == 3 and all(low <= s["gflops"] <= high for s in result["sampled"])
    assert result["chosen"]["similarity"] == max(s["similarity"] for s in result["sampled"]) and result["best"]["test"] == max(s["test"] for s in result["sampled"])
    processes(os.path.join(ROOT, "route.py"), 2, "--out", tmp_path / "two", *arguments)
    two = json.load(open(tmp_path / "two" / "toy-weaves" / "sizes" / "result.json"))
    assert two["chosen"]["size"] == result["chosen"]["size"] and all(a["similarity"] == pytest.approx(b["similarity"], abs=1e-6) for a, b in zip(two["sampled"], result["sampled"]))
    plain = sdrnet.load_network(str(tmp_path / "toy-weaves" / "sizes" / "subnet.pt"), ("subnet",))
    backbone, shape, _ = detect_voc.load_backbone(str(tmp_path / "toy-weaves" / "sizes" / "subnet.pt"))
    assert shape["depths"] == [depth for depth, _ in result["chosen"]["size"]] and torch.equal(backbone.conv1.weight, plain.conv1.weight)
    task = pretrain.open_tasks(["toy:weaves"])[0]
    few = route.decoded(task, 32, 64, 0)
    pair = [route.plain_features(plain, part.packed, torch.device("cpu"), "off") for part in (few.train, few.test)]
    assert route.probe(*pair, few)[0] == pytest.approx(result["chosen"]["probe"]) and 0 <= result["largest"]["probe"] <= 100
    x = pretrain.plain_input(task.train.packed[route.stratified(task.train.labels, 64)], torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f = plain(x)
        assert counter.get_total_flops() == len(x) * round(result["chosen"]["gflops"] * 1e9)
        size = tuple(tuple(pair) for pair in result["chosen"]["size"])
        largest = plain_features(net, x)               # one batch of all images: its statistics are theirs, variances but for n / (n - 1)
        assert torch.allclose(f, plain_features(net, x, size), rtol=0.02, atol=0.02 * f.abs().max().item())
        model = pretrain.SDR(net, width=16)
        model.projector.load_state_dict(sdrnet.load(str(toy / "datanet.pt"))["heads"]["projector"])
        similar = F.cosine_similarity(plain_head(model.projector, plain_features(net, x, size)), plain_head(model.projector, largest), 1).mean().item()
    assert result["chosen"]["similarity"] == pytest.approx(similar, abs=0.01)


# ---------------------------------------------------------------------------- bad input

CASES = [
    (cluster, ["--checkpoint", "{t}/simsiam.pt", "--subset", "{t}/half.npy", "--retrieve", "toy:weaves", "--budget", "401"], "there are 400 images"),
    (cluster, ["--checkpoint", "{t}/simsiam.pt", "--subset", "{t}/half.npy", "--retrieve", "{e}", "--budget", "4"], "no images in"),
    (cluster, ["--checkpoint", "{t}/simsiam.pt", "--subset", "{t}/half.npy", "--retrieve", "{e}/none", "--budget", "4"], "no such folder"),
    (cluster, ["--retrieve", "toy:weaves"], "--budget K go together"),
    (route, ["--checkpoint", "{t}/datanet.pt", "--task", "toy:weaves", "--budget-gflops", "5", "6"], "no network has so many"),
    (route, ["--checkpoint", "{t}/simsiam.pt", "--task", "toy:weaves", "--budget-gflops", "5", "6"], "trained without sizes"),
    (route, ["--checkpoint", "{t}/datanet.pt", "--budget-gflops", "5", "6", "--search", "halving"], "--search"),
    (route, ["--checkpoint", "{t}/datanet.pt", "--task", "toy:weaves"], "'datanet'"),
    (pretrain, ["--sizes", "3,4"], "has no sizes from 3 block(s)"),
    (pretrain, ["--sizes", "1,4", "--clusters", "{t}/half.npy"], "sizes or paths"),
    (pretrain, ["--sizes", "1;4"], "two as in 1,4"),
    (pretrain, ["--tau", "0.9"], "--tau is not an option of --objective simsiam"),
    (pretrain, ["--objective", "byol", "--queue", "9"], "--queue is not an option"),
    (pretrain, ["--objective", "mocov2", "--queue", "0"], "argument --queue: 0 is not from 1"),
    (pretrain, ["--objective", "mocov2", "--tau", "2"], "argument --tau: 2 is not from 0 to 1"),
]


@pytest.mark.parametrize("module,arguments,text", CASES, ids=[c[2] for c in CASES])
def test_bad_input_is_one_clear_line(module, arguments, text, toy, tmp_path, monkeypatch):
    os.makedirs(tmp_path / "empty")
    with pytest.raises(InputError) as caught:
        main(module, monkeypatch, "--out", tmp_path / "new", *[a.format(t=toy, e=tmp_path / "empty") for a in arguments])
    assert text in str(caught.value) and not (tmp_path / "new").exists()


def test_bad_input_ends_with_status_2(toy, tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "cluster.py"), "--checkpoint", str(toy / "simsiam.pt"), "--retrieve", "toy:weaves", "--budget", "9999", "--out", str(tmp_path / "new")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cluster.py: error: --budget 9999") and done.stderr.count("\n") == 1
