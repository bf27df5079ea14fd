"""The pieces, each against an independent reference: torchvision, brute force, or a few plain lines in float64."""
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import cluster
import pretrain
import route
import sdrnet
from sdrnet import BatchNorm, InputError, SDRNet, index_to_path, path_to_index


def shaken(net, seed=0):
    """A network whose BatchNorms have random scales, shifts and statistics, those of prefixes included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (BatchNorm, torch.nn.BatchNorm2d)):
                for name in ("weight", "running_var", "path_var"):
                    if getattr(m, name, None) is not None:
                        getattr(m, name).uniform_(0.5, 1.5, generator=generator)
                for name in ("bias", "running_mean", "path_mean"):
                    if getattr(m, name, None) is not None:
                        getattr(m, name).normal_(0, 0.3, generator=generator)
    return net.eval()


def close(a, b, relative):
    return (a - b).abs().max() <= relative * b.abs().max()


# ---------------------------------------------------------------------------- sdrnet.py

@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_largest_network_is_torchvisions(arch):
    torch.manual_seed(0)
    theirs = shaken(getattr(torchvision.models, arch)())
    theirs.fc = torch.nn.Identity()
    ours = SDRNet(arch, 64, groups=4).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(ours(x), theirs(x), 1e-5)
        assert close(ours.extract()(x), theirs(x), 1e-5)
    back = getattr(torchvision.models, arch)()
    back.fc = torch.nn.Identity()
    back.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("arch,groups,shared,small", [("resnet18", 1, 0.5, True), ("resnet18", 2, 0.25, True), ("resnet34", 3, 0.5, False), ("resnet50", 2, 0.5, False), ("resnet18", 4, 0.0, True)])
def test_every_path_runs_and_equals_its_extracted_network(arch, groups, shared, small):
    torch.manual_seed(1)
    net = shaken(SDRNet(arch, 16, groups, shared, small))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        walked = dict(net.walk(x))
        assert list(walked) == list(range(groups ** 4))
        outputs = []
        for i in range(groups ** 4):
            path = index_to_path(i, groups)
            assert path_to_index(path, groups) == i
            plain = net.extract(path)
            assert not any("sdr" in type(m).__name__.lower() for m in plain.modules())
            f = plain(x)
            assert close(net(x, path), f, 1e-5) and close(walked[i], f, 1e-5)
            outputs.append(f)
        if groups > 1:                                 # paths are different networks
            assert torch.pdist(torch.stack([o.flatten() for o in outputs])).min() > 1e-3
        some = [0, groups ** 4 - 1]
        assert [i for i, _ in net.walk(x, some)] == sorted(set(some))


def test_extracted_network_is_a_narrow_torchvision_resnet():
    from torchvision.models.resnet import BasicBlock, ResNet
    net = shaken(SDRNet("resnet18", 16, 2, 0.5))
    plain = net.extract((1, 0, 1, 1))
    theirs = ResNet(BasicBlock, [2, 2, 2, 2])
    theirs.conv1, theirs.bn1, theirs.inplanes = torch.nn.Conv2d(3, 16, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(16), 16
    for s, width in enumerate(plain.config["widths"]):
        setattr(theirs, f"layer{s + 1}", theirs._make_layer(BasicBlock, width, 2, stride=1 if s == 0 else 2))
    theirs.layer1[0].downsample = torch.nn.Sequential(theirs.layer1[0].downsample[0])             # it only selects channels
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(theirs.eval()(x), plain(x), 1e-5)


def test_widths_follow_the_table():
    net = SDRNet("resnet18", 64, 4, 0.5)
    assert [net.sub_width(64 * 2 ** s) for s in range(4)] == [40, 80, 160, 320] and net.split(64) == (32, 8)
    assert net.cut(64, [3, 0]) == (32, 8, (3, 0)) and net.cut(64, None) is None
    assert SDRNet("resnet50", 64, 4).sub_features == 4 * 320


@pytest.mark.parametrize("call", [lambda: path_to_index((0, 1, 2), 2), lambda: path_to_index((0, 1, 2, 0), 2), lambda: index_to_path(16, 2), lambda: index_to_path(-1, 2),
                                  lambda: SDRNet("resnet18", 4, groups=4), lambda: SDRNet("resnet19"), lambda: SDRNet(shared=1.0)])
def test_wrong_paths_and_widths_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_gradients_reach_exactly_the_shared_and_the_chosen_groups():
    torch.manual_seed(0)
    net = SDRNet("resnet18", 16, 2, 0.5, small_stem=True)
    with torch.no_grad():
        for m in net.modules():                        # every block but for zero-initialised scales
            if isinstance(m, BatchNorm):
                m.weight.fill_(1.0)
    path = (1, 0, 1, 0)
    s = net.stem(torch.randn(8, 3, 16, 16), "batch")
    net.trunk(s, [path], "batch").square().sum().backward()
    used = lambda channels, digit: set(range(channels // 2)) | set(range(channels // 2 + digit * channels // 4, channels // 2 + (digit + 1) * channels // 4))
    for stage in range(4):
        c = 16 * 2 ** stage
        for name, p in getattr(net, f"layer{stage + 1}").named_parameters():
            touched = set(p.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()) if p.dim() > 1 else set(p.grad.nonzero().flatten().tolist())
            assert touched == used(c, path[stage]), (stage, name)
            if p.dim() > 1:
                inputs = set(p.grad.transpose(0, 1).flatten(1).abs().sum(1).nonzero().flatten().tolist())
                first = name in ("0.conv1.weight", "0.downsample.0.weight")
                assert inputs == (used(c, path[stage]) if not first else set(range(16)) if stage == 0 else used(c // 2, path[stage - 1])), (stage, name)


@pytest.mark.parametrize("shared_grad", [True, False])
def test_cut_equals_indexing_with_autograd(shared_grad):
    w, v = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((12, 8, 3, 3), (12,)))
    rows, columns = [[0, 1, 2, 3, 4, 5, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 8, 9]], [[0, 1, 2, 3, 6, 7], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    out, inp = (6, 2, (1, 0, 1)), (4, 2, (1, 0, 0))
    for dims, cut_out, cut_inp in ((("out", "in"), out, inp), (("out",), out, None), (("in",), None, inp)):
        got = sdrnet.cut_weight(w, cut_out, cut_inp, shared_grad)
        want = torch.stack([w[r if "out" in dims else range(12)][:, c if "in" in dims else range(8)] for r, c in zip(rows, columns)])
        assert torch.equal(got, want)
        g, = torch.autograd.grad((got ** 3).sum(), w)
        h, = torch.autograd.grad((want ** 3).sum(), w)
        common = torch.zeros(12, 8, 1, 1, dtype=torch.bool)
        common[:6 if "out" in dims else 12, :4 if "in" in dims else 8] = not shared_grad
        assert torch.allclose(g, h.masked_fill(common, 0))
    got, want = sdrnet.cut_weight(v, out, None, shared_grad), torch.stack([v[r] for r in rows])
    assert torch.equal(got, want)
    g, = torch.autograd.grad((got ** 3).sum(), v)
    h, = torch.autograd.grad((want ** 3).sum(), v)
    assert torch.allclose(g, h if shared_grad else torch.cat([torch.zeros(6, dtype=h.dtype), h[6:]]))


def test_statistics_of_prefixes_are_plain_moments():
    torch.manual_seed(0)
    net = SDRNet("resnet18", 8, 2, 0.5, small_stem=True).double()
    x = torch.randn(24, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for part in x.split(12):                       # two batches, pooled
            net.stage(0, net.stem(part), [(1,)], "collect")
        net.finish_statistics(0)
        conv = net.layer1[0].conv1
        y = F.conv2d(net.stem(x), sdrnet.take(conv.weight, net.cut(8, [1]))[0], padding=1)
    bn = net.layer1[0].bn1
    assert torch.allclose(bn.path_mean[1], y.mean((0, 2, 3))) and torch.allclose(bn.path_var[1], y.var((0, 2, 3), correction=0))
    assert torch.equal(bn.path_mean[0], torch.zeros(6, dtype=torch.float64))      # nobody came by: the largest network's


def test_saved_is_whole_or_old_and_loads_without_running_code(tmp_path, monkeypatch):
    net, path = SDRNet("resnet18", 8, 2), str(tmp_path / "sdrnet.pt")
    sdrnet.save(path, sdrnet.checkpoint(net, "sdrnet"))
    before = open(path, "rb").read()
    loaded = sdrnet.load_network(path, ("sdrnet",))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in net.state_dict().items())
    for broken in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            def fail(*_, **__):
                raise OSError(28, "No space left on device")
            patch.setattr(*{"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[broken], fail)
            with pytest.raises(OSError):
                sdrnet.save(path, {"new": 1})
        assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["sdrnet.pt"]

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    torch.save({"format": 1, "kind": "sdrnet", "config": Evil()}, tmp_path / "evil.pt")
    for name, content in (("short.pt", before[:len(before) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"a": 1}, tmp_path / "other.pt")
    torch.save({**sdrnet.checkpoint(net, "sdrnet"), "format": 99}, tmp_path / "future.pt")
    narrow = sdrnet.checkpoint(net, "sdrnet")
    narrow["config"]["width"] = 16
    torch.save(narrow, tmp_path / "narrow.pt")
    nan = sdrnet.checkpoint(net, "sdrnet")
    nan["backbone"]["conv1.weight"][0] = math.nan
    torch.save(nan, tmp_path / "nan.pt")
    for name in ("evil.pt", "short.pt", "text.pt", "empty.pt", "other.pt", "future.pt", "narrow.pt", "nan.pt", "missing.pt"):
        with pytest.raises(InputError, match=name):
            sdrnet.load_network(str(tmp_path / name), ("sdrnet",))
    with pytest.raises(InputError, match="simsiam"):
        sdrnet.load_network(path, ("simsiam",))
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------------------- pretrain.py: loss, views, neighbours

def plain_simsiam(model, x):
    """SimSiam's loss in plain lines on torchvision-like modules: no code of ours but the weights."""
    net = model.net

    def norm(y, bn):
        dims = [d for d in range(y.dim()) if d != 1]
        shape = [1, -1] + [1] * (y.dim() - 2)
        y = (y - y.mean(dims).view(shape)) / (y.var(dims, correction=0).view(shape) + bn.eps).sqrt()
        return y if bn.weight is None else y * bn.weight.view(shape) + bn.bias.view(shape)
    y = norm(F.conv2d(x, net.conv1.weight, padding=1), net.bn1).relu()
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            stride = block.conv1.stride
            z = norm(F.conv2d(y, block.conv1.weight, stride=stride, padding=1), block.bn1).relu()
            z = norm(F.conv2d(z, block.conv2.weight, padding=1), block.bn2)
            y = (z + (y if block.downsample is None else norm(F.conv2d(y, block.downsample[0].weight, stride=stride), block.downsample[1]))).relu()
    z = y.mean((2, 3))
    head = model.projector
    z = norm(z @ head.linears[0].weight.T, head.norms[0]).relu()
    z = norm(z @ head.linears[1].weight.T, head.norms[1])
    head = model.predictor
    p = norm(z @ head.linears[0].weight.T + (0 if head.linears[0].bias is None else head.linears[0].bias), head.norms[0]).relu()
    p = p @ head.linears[1].weight.T + head.linears[1].bias
    n = len(x) // 2
    cos = lambda a, b: ((a / a.norm(dim=1, keepdim=True)) * (b / b.norm(dim=1, keepdim=True)).detach()).sum(1).mean()
    return -0.5 * cos(p[:n], z[n:]) - 0.5 * cos(p[n:], z[:n])


def test_simsiam_loss_and_gradient_equal_plain_lines():
    torch.manual_seed(0)
    model = pretrain.SDR(SDRNet("resnet18", 8, 2, small_stem=True), width=32).double()
    x = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    names = [n for n, _ in model.named_parameters() if "distiller" not in n]
    parameters = [p for n, p in model.named_parameters() if "distiller" not in n]
    loss, values = model(x)
    reference = plain_simsiam(model, x)
    assert abs(loss.item() - reference.item()) < 1e-10 and abs(values[0].item() - reference.item()) < 1e-10
    for name, a, b in zip(names, torch.autograd.grad(loss, parameters), torch.autograd.grad(reference, parameters)):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-10), name


def test_blur_by_convolution_equals_the_dense_matrix():
    torch.manual_seed(0)
    x, sigma = torch.rand(5, 3, 40, 40, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0], dtype=torch.float64)
    matrix = pretrain.blur_matrix(sigma, 40)
    assert close(pretrain.blur(x, sigma), matrix[:, None] @ x @ matrix[:, None].mT, 2e-4)
    assert torch.allclose(pretrain.blur(torch.ones_like(x), sigma), torch.ones_like(x))


def test_sdr_loss_is_the_sum_of_its_parts():
    """L = L_0 + mean_i (L_i + lambda KD_i), with L_i by plain lines on the extracted sub-net in training mode."""
    torch.manual_seed(0)
    net = SDRNet("resnet18", 8, 2, small_stem=True)
    model = pretrain.SDR(net, width=32, kd_weight=0.5).double()
    for bn in [m for m in net.modules() if isinstance(m, BatchNorm)]:
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    x, sub = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.randn(16, 3, 16, 16, dtype=torch.float64)
    paths = [(0, 1, 1, 0), (1, 1, 0, 1)]
    loss, values = model(x, sub, paths)
    cos = lambda p, z: -F.cosine_similarity(p, z.detach(), 1).mean()
    total = plain_simsiam(model, x)
    with torch.no_grad():                              # the teacher normalises by the uniform batch: put it beside
        stem = net.stem(x, "batch")
        model.projector(net.trunk(stem, None, "batch"))
        s = net.stem(sub, "last")
        teacher = model.projector(net.trunk(s, None, "last"), mode="last")
    for i, path in enumerate(paths):
        own = s[8 * i:8 * i + 8]
        plain = net.extract(path).train()
        y = own
        for stage in plain.stages():
            y = stage(y)
        f = y.mean((2, 3))
        z = f @ model.projector.linears[0].weight[:, list(range(32)) + list(range(32 + 16 * path[3], 48 + 16 * path[3]))].T
        head = model.projector
        z = F.batch_norm(z, None, None, head.norms[0].weight, head.norms[0].bias, True)
        z = F.batch_norm(z.relu() @ head.linears[1].weight.T, None, None, None, None, True)
        predict = lambda h: F.linear(F.batch_norm(F.linear(z, h.linears[0].weight, h.linears[0].bias), None, None, h.norms[0].weight, h.norms[0].bias, True).relu(),
                                     h.linears[1].weight, h.linears[1].bias)
        p, q, t = predict(model.predictor), predict(model.distiller), teacher[8 * i:8 * i + 8]
        total = total + (cos(p[:4], z[4:]) / 2 + cos(p[4:], z[:4]) / 2) / 2 + 0.5 * (cos(q[:4], t[4:]) / 2 + cos(q[4:], t[:4]) / 2) / 2
    assert abs(total.item() - loss.item()) < 1e-9
    model.zero_grad()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_gradient_from_sdr_into_the_teacher():
    torch.manual_seed(0)
    net = SDRNet("resnet18", 8, 2, small_stem=True)
    model = pretrain.SDR(net, width=32)
    x, sub, path = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), (0, 0, 0, 0)
    (model(x, sub, [path])[0] - model(x)[0]).backward()
    other = net.layer2[1].conv1.weight.grad[8 + 4:]    # group 1 of layer2: only the largest network uses it
    assert other.abs().max() < 1e-6


def test_crop_and_resize_equal_torchvision():
    from torchvision.transforms.v2 import functional as T
    torch.manual_seed(0)
    images = torch.rand(6, 3, 40, 52)
    u = torch.rand(6, pretrain.COLUMNS)
    top, left, h, w = pretrain.crop_boxes(u, 40, 52)
    ry, rx = pretrain.resize_matrix(top, h, 40, 24), pretrain.resize_matrix(left, w, 52, 24)
    ours = ry[:, None] @ images @ rx.mT[:, None]
    for i in range(6):
        theirs = T.resized_crop(images[i], int(top[i]), int(left[i]), int(h[i]), int(w[i]), [24, 24], antialias=True)
        assert (ours[i] - theirs).abs().max() < 2e-3


def test_crop_boxes_have_torchvisions_distribution():
    torch.manual_seed(0)
    top, left, h, w = pretrain.crop_boxes(torch.rand(4000, pretrain.COLUMNS), 60, 100)
    assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all() and (top + h <= 60).all() and (left + w <= 100).all()
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(torch.empty(3, 60, 100), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]).float()
    ours = torch.stack([top, left, h, w], 1).float()
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 1.5 and (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.06


def test_colour_maps_equal_torchvision_where_nothing_is_clamped():
    from torchvision.transforms.v2 import functional as T
    torch.manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(8, 3, 12, 12)      # mid-grey: no step reaches 0 or 1
    u = torch.rand(8, 10)
    u[:, 3], u[:, 8] = 0.5, 0.0                        # hue is turned in another plane: leave it out
    u[:4, 9], u[4:, 9] = 0.9, 0.1                      # the last four end grey
    m, t = pretrain.colour_maps(u, images.mean((2, 3)))
    ours = torch.einsum("nij,njhw->nihw", m, images) + t[:, :, None, None]
    for i in range(8):
        x, f = images[i], (0.6 + 0.8 * u[i, :3]).tolist()
        for k in u[i, 4:8].argsort().tolist():
            x = [lambda: T.adjust_brightness(x, f[0]), lambda: T.adjust_contrast(x, f[1]), lambda: T.adjust_saturation(x, f[2]), lambda: x][k]()
        if i >= 4:
            x = T.rgb_to_grayscale(x, 3)
        assert (ours[i] - x).abs().max() < 2e-3
    u[:, 3], u[:, 8:] = torch.linspace(0, 1, 8), 0.9
    m, t = pretrain.colour_maps(u, images.mean((2, 3)))
    assert torch.allclose(m, torch.eye(3).expand(8, 3, 3), atol=1e-6) and t.abs().max() == 0       # neither jitter nor grey
    u[:, 8], u[:, :3] = 0.0, 0.5
    m, _ = pretrain.colour_maps(u, images.mean((2, 3)))
    assert torch.allclose(m.sum(1), torch.ones(8, 3), atol=1e-6) and torch.allclose(m @ m.mT, torch.eye(3).expand(8, 3, 3), atol=1e-6)    # a turn about the grey axis
    assert torch.allclose(m.diagonal(dim1=1, dim2=2).sum(1), 1 + 2 * torch.cos((u[:, 3] - 0.5) * 0.4 * math.pi), atol=1e-6)                # by up to 36 degrees
    for i in range(8):                                 # torchvision's shift of hue is another function, but goes the same way round
        ours, back = (torch.einsum("ij,njhw->nihw", turn, images) for turn in (m[i], m[i].T))
        theirs = T.adjust_hue(images, (u[i, 3].item() - 0.5) * 0.2)
        assert (ours - theirs).abs().mean() < 0.9 * (back - theirs).abs().mean()


def test_views_flip_blur_and_normalise():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    u = torch.full((5, pretrain.COLUMNS), 0.9)         # no flip, no blur, no jitter, no grey
    u[1, 22], u[2, 23], u[2, 24] = 0.1, 0.1, 1.0       # image 1 is flipped, image 2 blurred with sigma 2
    out = pretrain.views(images, u, 32, cropped=True)
    plain = pretrain.plain_input(images, torch.device("cpu"))
    assert torch.allclose(pretrain.views(images[:1], u[:1], 32, cropped=True), plain[:1], atol=1e-5)   # none of a small batch is blurred
    assert torch.allclose(out[0], plain[0], atol=1e-5) and torch.allclose(out[1], plain[1].flip(2), atol=1e-5)
    blurred = torchvision.transforms.v2.functional.gaussian_blur(images[2].float(), 17, 2.0)
    theirs = pretrain.plain_input(blurred[None], torch.device("cpu"))[0]
    assert (out[2] - theirs)[:, 9:-9, 9:-9].abs().max() < 2e-3
    twice = pretrain.views(images, u, 32, cropped=True)
    assert torch.equal(out, twice)
    assert torch.equal(pretrain.draws(3, 5, 8)[:4], pretrain.draws(3, 5, 8)[:4]) and not torch.equal(pretrain.draws(3, 5, 8), pretrain.draws(3, 6, 8))


@pytest.mark.parametrize("multi", [False, True])
def test_leave_one_out_knn_equals_brute_force(multi):
    rng = np.random.default_rng(0)
    x, k, temperature = rng.normal(size=(57, 6)).astype(np.float32), 7, 0.07
    labels = torch.from_numpy(rng.integers(0, 2, (57, 4)) if multi else rng.integers(0, 4, 57))
    ours = pretrain.knn(torch.from_numpy(x), labels, None, 4, k, leave_one_out=True, chunk=10)
    for i in range(57):
        others = [j for j in range(57) if j != i]
        cos = {j: float(x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])) for j in others}
        votes = np.zeros(4)
        for j in sorted(others, key=lambda j: -cos[j])[:k]:
            votes += math.exp(cos[j] / temperature) * (labels[j].numpy() if multi else np.eye(4)[labels[j]])
        total = sum(math.exp(cos[j] / temperature) for j in sorted(others, key=lambda j: -cos[j])[:k])
        assert np.allclose(ours[i].numpy(), votes / total, atol=1e-5)


def test_knn_shrinks_k_and_scores_by_each_metric():
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    assert pretrain.knn(x, y, x, 2, k=20).shape == (3, 2)
    shares, labels = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]), torch.tensor([0, 0, 1, 1])
    assert pretrain.score(shares, labels, "top-1") == 75 and pretrain.score(shares, torch.tensor([0, 1, 1, 1]), "mean-per-class") == pytest.approx(100 * (1 + 1 / 3) / 2)
    # ranked by class 0: images 0, 1, 3, 2. Positives 0 and 3: precision 1 at recall 0.5, 2/3 at recall 1.
    table = torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0]])
    assert pretrain.score(shares, table, "mAP") == pytest.approx(100 * (6 * 1 + 5 * 2 / 3) / 11)


def test_toy_images_depend_on_seed_and_index_alone():
    whole, world, label = pretrain.toy_images(np.arange(40), 3)
    part, _, _ = pretrain.toy_images(np.array([7, 33]), 3)
    assert torch.equal(whole[[7, 33]], part) and not torch.equal(whole, pretrain.toy_images(np.arange(40), 4)[0])
    assert sorted(set(world)) == [0, 1, 2, 3] and sorted(set(label)) == list(range(8))


def test_plan_is_unbiased_for_the_largest_network_and_serves_tiny_clusters():
    clusters = np.array([0] * 50 + [1] + [2] * 2 + list(range(3, 16)) * 3)
    plan = pretrain.Plan(len(clusters), 16, 20, 0, clusters, 2, 2, (1, 1, 1, 1, 4))
    drawn = np.concatenate([plan.uniform(s) for s in range(plan.steps)])
    counts = np.bincount(drawn, minlength=len(clusters))
    assert counts.max() - counts.min() <= 1            # every image equally often
    seen = set()
    for step in range(plan.steps):
        phase, subs = plan.phase(step), plan.step(step)[1]
        assert len({i for i, _ in subs}) == len(subs) == (0 if phase == 0 else 2)
        for i, chosen in subs:
            assert all(d == 0 for d in index_to_path(i, 2)[:4 - phase]) and (clusters[chosen] == i).all() and len(chosen) == 4
            seen.add(i)
    assert seen >= {0} | set(range(3, 16))
    assert plan.phase_ends == [round(plan.steps * e / 8) for e in (1, 2, 3, 4, 8)]


# ---------------------------------------------------------------------------- cluster.py

@pytest.mark.parametrize("eps", [0.5, 0.05, 0.001])
def test_sinkhorn_equals_a_float64_solution(eps):
    """Reference: alternate scaling in the log domain, dense, float64, run long. At 0.001 exp(S / eps) overflows."""
    rng = np.random.default_rng(0)
    s = rng.uniform(-1, 1, (60, 5))
    u, v = np.zeros(60), np.zeros(5)
    lse = lambda a, axis: np.log(np.exp(a - a.max(axis, keepdims=True)).sum(axis)) + a.max(axis)
    for _ in range(20000):
        u = -math.log(60) - lse(s / eps + v, 1)
        v = -math.log(5) - lse(s / eps + u[:, None], 0)
    reference = np.exp(s / eps + u[:, None] + v)
    assert np.allclose(reference.sum(0), 1 / 5, atol=1e-4) and (eps > 0.001 or not np.isfinite(np.exp(s / eps)).all())
    scores = torch.from_numpy(s)
    ours_v, error, _ = cluster.sinkhorn(lambda: iter([scores[:25], scores[25:]]), 5, 60, eps, tolerance=1e-4, iterations=20000)
    ours = cluster.posterior(scores, ours_v, eps).exp() / 60
    assert error <= 1e-4 and np.allclose(ours.sum(1), 1 / 60) and np.allclose(ours.sum(0), 1 / 5, rtol=1e-4)
    assert np.abs(ours.numpy() - reference).max() < 1e-4


def test_clusters_are_found_numbered_and_never_empty(capsys):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(16, 24))
    truth = rng.integers(0, 16, 800)
    x = (centres[truth] + 0.15 * rng.normal(size=(800, 24))).astype(np.float32)
    found, centroids, mean, near, about = cluster.cluster(x, 16, torch.device("cpu"), seed=1)
    assert found.dtype == np.int64 and set(found) == set(range(16)) and about["marginal_error"] <= 0.01
    joint = np.zeros((16, 16))
    np.add.at(joint, (found, truth), 1)
    assert joint.max(1).sum() / 800 > 0.9
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    again = cluster.assign(torch.from_numpy(x), torch.from_numpy(centroids), torch.from_numpy(mean)).numpy()
    assert (again == found).mean() > 0.99
    balanced = np.bincount(cluster.cluster(x, 16, torch.device("cpu"), balanced=True, eps=0.02)[0], minlength=16)
    assert balanced.max() <= 75 and np.median(np.abs(balanced - 50)) <= 2       # near-twins may split a cluster unevenly
    same = np.tile(x[:1], (40, 1)) + np.eye(40, 24, dtype=np.float32) * 1e-3
    assert set(cluster.cluster(same, 16, torch.device("cpu"))[0]) == set(range(16))


def test_similar_clusters_share_the_first_digits():
    rng = np.random.default_rng(0)
    top, second = rng.normal(size=(2, 16)) * 9, rng.normal(size=(4, 16)) * 3
    c = np.stack([top[i // 8] + second[i // 4] + 0.3 * rng.normal(size=16) for i in range(16)])
    shuffled = rng.permutation(16)
    order = shuffled[cluster.tree_order(c[shuffled] / np.linalg.norm(c[shuffled], axis=1, keepdims=True), 2)]
    assert sorted(order) == list(range(16))
    assert all(len({i // 8 for i in order[a:a + 8]}) == 1 for a in (0, 8)) and all(len({i // 4 for i in order[a:a + 4]}) == 1 for a in (0, 4, 8, 12))


# ---------------------------------------------------------------------------- route.py

def random_task(train, test=32, classes=4, metric="top-1"):
    """A task of random images; train: how many, or their labels."""
    g, parts = torch.Generator().manual_seed(0), []
    for labels in (torch.arange(train) % classes if isinstance(train, int) else torch.tensor(train), torch.arange(test) % classes):
        packed = torch.randint(0, 256, (len(labels), 3, 16, 16), dtype=torch.uint8, generator=g)
        parts.append(pretrain.Images([str(i) for i in range(len(labels))], None, labels, [str(c) for c in range(classes)], packed))
    return pretrain.Task("t", *parts, metric)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_tree_scores_equal_one_by_one(groups):
    net, task, cpu = shaken(SDRNet("resnet18", 8, groups, 0.5, True)), random_task(64), torch.device("cpu")
    train, test = route.search_all(net, task, cpu, "off", 5)
    assert groups == 1 or len(np.unique(train)) > 3 and len(np.unique(test)) > 3   # else equal scores would say nothing
    for i in range(0, groups ** 4, max(1, groups ** 4 // 6)):
        plain = net.extract(index_to_path(i, groups))
        f, t = (pretrain.embed(plain, part, size=16, device=cpu, amp="off") for part in (task.train, task.test))
        assert abs(route.loo_score(f, task, 5) - train[i]) < 1e-5 and abs(pretrain.knn_score(f, t, task, 5) - test[i]) < 1e-5


@pytest.mark.parametrize("metric", ["top-1", "mAP"])
def test_halving_ends_with_full_scores_and_saves(metric):
    net, task, cpu = shaken(SDRNet("resnet18", 8, 2, 0.5, True)), random_task(64, metric=metric), torch.device("cpu")
    if metric == "mAP":                                # the labels of another image beside its own
        for part in (task.train, task.test):
            part.labels = (F.one_hot(part.labels, 4) + F.one_hot(part.labels.flip(0), 4)).clamp(max=1)
    full, _ = route.search_all(net, task, cpu, "off", 5)
    scores, passes = route.search_halving(net, task, cpu, "off", 5, keep=2, fewest=1)
    known = np.isfinite(scores)
    assert known.sum() == 2 and np.allclose(scores[known], full[known], atol=1e-4) and len(np.unique(full)) > 3
    assert passes == pytest.approx((16 + 8) / 8 / 16 + 4 / 4 / 16 + 2 / 2 / 16)    # sub-nets x new images of each round
    everything, passes = route.search_halving(net, task, cpu, "off", 5, keep=16, fewest=1)
    assert passes == 1 and np.allclose(everything, full, atol=1e-4)


def test_halving_keeps_the_sub_net_that_is_clearly_best(monkeypatch):
    """Features of sub-net 11 are the classes, those of all others noise."""
    task, g = random_task(160), torch.Generator().manual_seed(0)
    lookup = {tuple(p.flatten().tolist()): int(l) for p, l in zip(task.train.packed, task.train.labels)}

    def features(net, pixels, indices, device, amp):
        label = torch.tensor([lookup[tuple(p.flatten().tolist())] for p in pixels])
        return {i: F.one_hot(label, 4).float() if i == 11 else torch.randn(len(pixels), 4, generator=g) for i in indices}
    monkeypatch.setattr(route, "tree_features", features)
    scores, _ = route.search_halving(SDRNet("resnet18", 8, 2, 0.5, True), task, torch.device("cpu"), "off", 5)
    assert np.nanargmax(scores) == 11 and scores[11] == 100 and np.isfinite(scores).sum() == 8
    assert np.isfinite(route.search_halving(SDRNet("resnet18", 8, 2, 0.5, True), pretrain.Task("few", task.train.subset(np.arange(90)), task.test), torch.device("cpu"), "off", 5)[0]).all()


def test_the_centroid_search_counts_images_by_cluster():
    mean, centroids = torch.tensor([0.1, 0.2, 0.0]), F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
    wanted = [3, 3, 3, 5, 5, 9, 3, 0]
    unit = [next(u for s in np.linspace(0.3, 1.5, 2000) for u in [centroids[c] * s + mean] if abs(float(u.norm()) - 1) < 2e-3) for c in wanted]
    shares = route.search_centroid(7 * torch.stack(unit), {"feature_mean": mean, "centroids": centroids})
    assert np.allclose(shares, 100 * np.bincount(wanted, minlength=16) / 8)


def test_readme_loads_a_subnet_in_plain_torchvision(tmp_path):
    """README's lines, in a process that cannot import this project, on every architecture; the same outputs."""
    text = open(os.path.join(ROOT, "README.md"), encoding="utf8").read().split("as a plain torchvision ResNet of its widths:\n\n")[1]
    (tmp_path / "readme.py").write_text(textwrap.dedent(text.split("\nor with one file of it")[0]))
    x, folders = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)), []
    for arch, small, groups in (("resnet18", False, 2), ("resnet18", True, 1), ("resnet34", True, 4), ("resnet50", False, 3)):
        folders.append(tmp_path / f"{arch}{groups}")
        folders[-1].mkdir()
        plain = shaken(SDRNet(arch, 8, groups, 0.5, small)).extract((groups - 1, 0, groups // 2, 0))
        sdrnet.save(str(folders[-1] / "subnet.pt"), sdrnet.checkpoint(plain, "subnet"))
        with torch.no_grad():
            torch.save((x, plain(x)), folders[-1] / "x.pt")
    code = ("import os, sys, torch\nfor folder in sys.argv[2:]:\n os.chdir(folder); exec(open(sys.argv[1]).read()); x, y = torch.load('x.pt')\n"
            " with torch.no_grad(): assert y.std() > 1e-3 and torch.allclose(net(x), y, rtol=1e-4, atol=1e-5), folder\n"
            "try:\n import sdrnet\nexcept ImportError: print('alone')")
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path / "readme.py"), *map(str, folders)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == "alone", done.stderr[-2000:]


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], [0, 0, 0, 1, 1, 1]])
def test_routing_survives_tiny_tasks(labels):
    task = random_task(labels, classes=max(labels) + 1)
    net, cpu = shaken(SDRNet("resnet18", 8, 2, 0.5, True)), torch.device("cpu")
    train, test = route.search_all(net, task, cpu, "off", 20)
    assert np.isfinite(train).all() and np.isfinite(test).all()
    assert np.isfinite(route.search_halving(net, task, cpu, "off", 20)[0]).any()
    f, t = (pretrain.embed(net, part, size=16, device=cpu, amp="off") for part in (task.train, task.test))
    assert 0 <= route.probe(f, t, task)[0] <= 100


def test_logistic_regression_reaches_the_minimum():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randint(0, 3, (200,))
    w = torch.from_numpy(route.logistic_fit(x, y, 0.01, tolerance=1e-7)).double().requires_grad_()
    loss = F.cross_entropy(x.double() @ w[:-1] + w[-1], y) + 0.005 * w[:-1].pow(2).sum()
    gradient, = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-5


def test_stratified_keeps_every_class():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    chosen = labels[route.stratified(labels, 20)]
    assert np.bincount(chosen).tolist() == [18, 2, 1]
    for limit in range(1, 100):                        # a smaller part lies in a larger: halving goes on with what it has
        assert np.isin(route.stratified(labels, limit), route.stratified(labels, limit + 1)).all()


# ---------------------------------------------------------------------------- several processes

def processes(script, count, *arguments):
    """Runs a Python text under torchrun with gloo; returns its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_share_the_sub_trees_and_score_alike(tmp_path):
    (tmp_path / "route_two.py").write_text(textwrap.dedent("""
        import argparse, sys, numpy as np, torch, pretrain, route, sdrnet
        device = pretrain.start(argparse.Namespace(device="cpu", seed=0, out="."))
        net = sdrnet.SDRNet("resnet18", 8, 2, 0.5, True).eval()
        for m in net.modules():
            if isinstance(m, sdrnet.BatchNorm): torch.nn.init.uniform_(m.weight, 0.5, 1.5)
        task = pretrain.open_tasks(["toy:weaves"])[0]
        walked, run = [], net.walk
        net.walk = lambda x, indices: walked.extend(indices) or run(x, indices)
        scores = np.stack([*route.search_all(net, task, device, "off", 5), route.search_halving(net, task, device, "off", 5, keep=4)[0]])
        if pretrain.rank() == 0: np.savez(sys.argv[1], scores=scores, walked=len(set(walked)))
        if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
    """))
    for count in (1, 2):
        processes(tmp_path / "route_two.py", count, tmp_path / f"{count}.npz")
    one, two = (np.load(tmp_path / f"{count}.npz") for count in (1, 2))
    assert one["walked"] == 16 and two["walked"] == 8  # each process runs half of the sub-nets
    assert np.allclose(one["scores"], two["scores"], atol=1e-5, equal_nan=True) and np.isfinite(one["scores"][2]).sum() == 4


def test_two_processes_equal_one_in_loss_gradients_and_statistics(tmp_path):
    (tmp_path / "step.py").write_text(textwrap.dedent("""
        import sys, torch, torch.distributed as dist, pretrain, sdrnet
        import numpy as np, argparse, os
        out, dtype = sys.argv[1], getattr(torch, sys.argv[2])
        args = argparse.Namespace(device="cpu", seed=0, out=".")
        device = pretrain.start(args)
        torch.manual_seed(int(sys.argv[3]))
        net = sdrnet.SDRNet("resnet18", 8, 2, 0.5, True)
        model = pretrain.SDR(net, width=32).to(dtype).to(memory_format=torch.channels_last)
        for m in net.modules():
            if isinstance(m, sdrnet.BatchNorm): torch.nn.init.uniform_(m.weight, 0.5, 1.5)
        if sdrnet.world_size() > 1:
            for p in model.parameters(): dist.broadcast(p.data, 0)
        images = pretrain.toy_listing(64, 1)
        clusters = np.arange(64) % 16
        plan = pretrain.Plan(64, 32, 4, 0, clusters, 2, 2, (0, 0, 0, 0, 1))
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if sdrnet.world_size() > 1 else model
        step, x, sub, subs = next(pretrain.training_batches(images, plan, 0, size=32, seed=1, device=device, workers=0))
        loss, values = wrapped(x.to(dtype), sub.to(dtype), [sdrnet.index_to_path(i, 2) for i in subs])
        loss.backward()
        total = pretrain.agree(torch.stack([loss.detach(), *values[:3]]), device)
        if pretrain.rank() == 0:
            torch.save({"loss": total, "grad": {n: p.grad for n, p in model.named_parameters()}, "mean": net.layer3[0].bn1.running_mean}, out)
        if dist.is_initialized(): dist.destroy_process_group()
    """))
    size = lambda parts: torch.stack([p.norm() for p in parts]).norm()

    def apart(one, two, loss_bar, grad_bar):
        """What differs by more than the bars; no parameter by itself may be off either."""
        whole = size(one["grad"].values())
        return [name for name, differs in {
            "loss": not np.allclose(one["loss"], two["loss"], atol=loss_bar), "mean": not torch.allclose(one["mean"], two["mean"], atol=1e-6),
            "gradient": size([g - two["grad"][n] for n, g in one["grad"].items()]) > grad_bar * whole,
            **{n: (g - two["grad"][n]).norm() > 10 * grad_bar * max(g.norm(), 0.01 * whole) for n, g in one["grad"].items()}}.items() if differs]
    # in fp32 an activation of some seed may lie within rounding of 0: its ReLU decides otherwise, and gradients differ by 1e-3
    for dtype, loss_bar, grad_bar, seeds in (("float64", 1e-12, 1e-9, (1,)), ("float32", 1e-6, 1e-5, (1, 2, 3))):
        for seed in seeds:
            results = []
            for count in (1, 2):
                out = tmp_path / f"{dtype}{count}.pt"
                processes(tmp_path / "step.py", count, out, dtype, seed)
                results.append(torch.load(out))
            found = apart(*results, loss_bar, grad_bar)
            if not found:
                break
        assert not found, dtype


def test_narrow_networks_train_on_large_maps():
    """In a process of its own: with fewer than 16 channels torch's strided 1x1 convolution corrupted memory there (`convolve`)."""
    code = """
import torch, pretrain
from sdrnet import SDRNet, convolve
torch.manual_seed(0)
x, w = torch.randn(2, 8, 96, 96, dtype=torch.float64), torch.randn(12, 8, 1, 1, dtype=torch.float64)
assert torch.equal(convolve(x, w, None, (2, 2)), torch.nn.functional.conv2d(x[..., ::2, ::2], w))
for sizes, paths in ((None, ()), ((1, 4), [((1, 4),) * 4])):
    model = pretrain.SDR(SDRNet("resnet18", 8, 1, small_stem=True, sizes=sizes), width=16).to(memory_format=torch.channels_last)
    for _ in range(4):
        x = torch.randn(16, 3, 128, 128).contiguous(memory_format=torch.channels_last)
        model(x, None, paths)[0].backward()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165"})
    assert done.returncode == 0 and done.stdout == "done\n", (done.returncode, done.stderr[-2000:])


def test_a_learning_rate_that_equals_a_default_is_kept():
    for lr, expected in (("0.1", 0.1), (None, 0.05)):
        args = pretrain.parse(["--data", "photos", "--batch-size", "256", *(["--lr", lr] if lr else [])])
        pretrain.fill_defaults(args, pretrain.Images(["a"], None))
        assert args.lr == expected
