"""The network and the losses against independent references."""
import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.transforms.v2 import functional as T

import frozen
import pretrain
import sdrnet

HERE = os.path.dirname(os.path.abspath(__file__))


def random_net(arch="resnet18", width=8, groups=2, shared=0.5, **options):
    """A network whose BatchNorms, running statistics and prefixes are all at random."""
    net = sdrnet.SDRNet(arch, width, groups, shared, **options)
    for bn in sdrnet.batch_norms(net):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.1)
    sdrnet.recalibrate_bn(net, lambda prefix: [torch.randn(32, 3, 32, 32)])
    return net


# ------------------------------------------------------------------------------------ network

def test_paths_are_numbered_by_their_digits():
    for groups in (1, 2, 3, 4):
        for index in range(groups ** 4):
            path = sdrnet.index_to_path(index, groups)
            assert index == sum(digit * groups ** (3 - s) for s, digit in enumerate(path))
            assert sdrnet.path_to_index(path, groups) == index
    assert sdrnet.path_to_index((1, 0, 1, 1), 2) == 11
    for wrong in ((2, 0, 0, 0), (-1, 0, 0, 0)):
        with pytest.raises(ValueError):
            sdrnet.path_to_index(wrong, 2)
    with pytest.raises(ValueError):
        sdrnet.index_to_path(16, 2)


@pytest.mark.parametrize("arch", sorted(frozen.NETWORKS))
def test_outputs_are_those_of_the_first_version(arch):
    net = sdrnet.SDRNet(**frozen.NETWORKS[arch])
    rng = np.random.default_rng(0)
    state = {k: v for k, v in net.resnet.state_dict().items() if "num_batches" not in k}
    filled = frozen.fill({k: v.shape for k, v in state.items()}, rng)
    net.resnet.load_state_dict({k: torch.from_numpy(v) for k, v in filled.items()}, strict=False)
    sdrnet.recalibrate_bn(net, lambda prefix: [])      # makes the tables of the prefixes
    tables = {f"{name}.{part}": table for name, both in net.prefix_statistics().items()
              for part, table in both.items()}
    for name, value in frozen.fill({k: v.shape for k, v in tables.items()}, rng).items():
        tables[name].copy_(torch.from_numpy(value))
    x, outputs = torch.from_numpy(frozen.images()), np.load(f"{HERE}/fixtures/extraction.npz")
    with torch.no_grad():
        assert np.allclose(net(x), outputs[arch], rtol=1e-4, atol=1e-4)
        for path in frozen.PATHS:
            wanted = outputs[f"{arch} {''.join(map(str, path))}"]
            assert np.allclose(net(x, path), wanted, rtol=1e-4, atol=1e-4)
            assert np.allclose(net.extract(path)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch, groups, small", [("resnet18", 2, False), ("resnet50", 1, True),
                                                 ("resnet34", 1, True)])
def test_tree_forward_and_extraction_agree_on_all_paths(arch, groups, small):
    net = random_net(arch, groups=groups, small_stem=small)
    x = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        seen = []
        for path, f in net.tree(x):
            seen.append(sdrnet.path_to_index(path, groups))
            plain = net.extract(path)
            assert type(plain) is torchvision.models.ResNet and f.shape[1] == plain.features
            assert torch.allclose(f, net(x, path), atol=1e-5)
            assert torch.allclose(f, plain(x), atol=1e-4)
            again = sdrnet.resnet(**plain.config)
            again.load_state_dict(plain.state_dict())
            assert torch.allclose(f, again.eval()(x), atol=1e-4)
        assert seen == list(range(groups ** 4))
        assert torch.allclose(net(x), net.extract()(x), atol=1e-4)
        x = torch.randn(16, 3, 32, 32)                 # and as it is trained on
        assert torch.allclose(net.train()(x, path), plain.train()(x), atol=1e-3)


def test_running_the_tree_in_training_moves_no_statistics():
    net = random_net().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    table = net.resnet.layer1[0].bn1.prefix_mean.clone()
    with torch.no_grad():
        x = torch.randn(8, 3, 32, 32)
        for path, f in net.tree(x):
            assert torch.allclose(f, net(x, path), atol=1e-5)
        net.stage(0, net.stem(x), (0,))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(table, net.resnet.layer1[0].bn1.prefix_mean)


def test_the_largest_network_is_torchvisions():
    net = random_net("resnet18", width=64)
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.load_state_dict(net.resnet.state_dict())     # strict
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), net(x), atol=1e-4)
    net.resnet.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("path", [(1, 0, 1, 1), (0, 0, 0, 0), (None, None, 1, 0)])
def test_gradients_reach_the_path_and_nothing_else(path):
    net = random_net().train()
    net(torch.randn(8, 3, 32, 32), path).pow(2).sum().backward()
    for s, width in enumerate((8, 16, 32, 64)):
        group, used = width // 4, torch.zeros(width, dtype=torch.bool)
        used[:width // 2] = True
        if path[s] is None:
            used[:] = True
        else:
            start = width // 2 + path[s] * group
            used[start:start + group] = True
        weight = net.blocks(s)[1].conv1.weight.grad    # (O, I, 3, 3), both of this stage
        touched = weight.abs().sum((2, 3)) > 0
        assert torch.equal(touched, used[:, None] & used[None])
        assert torch.equal(net.blocks(s)[1].bn1.bias.grad != 0, used)


def test_statistics_of_a_prefix_are_those_of_its_images():
    net, images = random_net(), torch.randn(3, 64, 3, 32, 32)
    sdrnet.recalibrate_bn(net, lambda prefix: images)
    path, x = (1, 0, 1, 1), images.flatten(0, 1)
    plain = net.extract(path)
    with torch.no_grad():                              # by the plain network, layer after layer
        entry = plain.conv1(x)
        mean, var = entry.mean((0, 2, 3)), entry.var((0, 2, 3))
        assert torch.allclose(plain.bn1.running_mean, mean, atol=1e-5)
        assert torch.allclose(plain.bn1.running_var, var, rtol=2e-2)
        y = plain.layer1(plain.maxpool(F.relu(plain.bn1(entry))))
        inner = plain.layer2[0].conv1(y)
        assert torch.allclose(plain.layer2[0].bn1.running_mean, inner.mean((0, 2, 3)), atol=1e-4)
        row = sdrnet.path_to_index(path[:2], 2)
        table = net.blocks(1)[0].bn1.prefix_mean
        assert torch.equal(table[row], plain.layer2[0].bn1.running_mean)
    assert net.resnet.bn1.momentum == 0.1 and not net.training


# ------------------------------------------------------------------------------------ losses

def plain_cosine(p, z):
    """-cos, a row at a time, in float64 and without torch's function."""
    p, z = [view.detach() for view in (p, z)]
    cosines = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(p, z)]
    return -sum(cosines) / len(p)


def test_simsiams_loss_is_the_papers():
    p, z = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    wanted = plain_cosine(p[0], z[1]) / 2 + plain_cosine(p[1], z[0]) / 2
    assert float(pretrain.symmetric_loss(p, z)) == pytest.approx(wanted, abs=1e-12)
    z.requires_grad_()
    p.requires_grad_()
    pretrain.symmetric_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().min() > 0
    assert pretrain.cosine_loss(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def sdr(distill="siamkd", **options):
    net = random_net().train()
    return pretrain.SDR(net, layers=2, width=32, distill=distill, **options).double()


def batch_normed(module, x):
    """An mlp's layers one by one, normalised by the batch, written out."""
    for layer in module:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
            x = x if layer.weight is None else x * layer.weight + layer.bias
    return x


@pytest.mark.parametrize("distill", ["siamkd", "l2", "none"])
def test_the_loss_of_a_step_is_the_sum_of_the_paper(distill):
    model, paths = sdr(distill, kd_weight=0.7), [(1, 0, 1, 1), (None, None, None, 0)]
    x = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    subs = [(path, torch.randn(2, 5, 3, 32, 32, dtype=torch.float64)) for path in paths]
    loss, log = model(x, subs)
    net = copy.deepcopy(model.net)

    def heads(projector, predictor, f, columns=slice(None)):
        first = copy.deepcopy(projector[0])
        first.weight.data = first.weight.data[:, columns]
        z = [batch_normed([first, *projector[1:]], v) for v in f]
        return z, [batch_normed(predictor, v) for v in z]
    z, p = heads(list(model.projector), list(model.predictor), [net(v) for v in x])
    wanted = plain_cosine(p[0], z[1]) / 2 + plain_cosine(p[1], z[0]) / 2
    assert float(log["loss"]) == pytest.approx(wanted, abs=1e-9)
    for path, views in subs:
        start = 32 + 16 * path[3]
        columns = [*range(32), *range(start, start + 16)]
        z_i, p_i = heads(list(model.sub_projector), list(model.sub_predictor),
                         [net(v, path) for v in views], columns)
        wanted += (plain_cosine(p_i[0], z_i[1]) + plain_cosine(p_i[1], z_i[0])) / 4
        z_0, _ = heads(list(model.projector), list(model.predictor), [net(v) for v in views])
        if distill == "siamkd":
            q = [batch_normed(list(model.distiller), v) for v in z_i]
            wanted += 0.7 * (plain_cosine(q[0], z_0[1]) + plain_cosine(q[1], z_0[0])) / 4
        elif distill == "l2":
            wanted += 0.7 * sum(2 + 2 * plain_cosine(a, b) for a, b in zip(z_i, z_0)) / 4
    assert loss.item() == pytest.approx(float(wanted), abs=1e-8)


def explained_by_mean(z):
    """The share of unit z's mean square that the batch's mean explains."""
    z = F.normalize(z, dim=1)
    return (z.mean(0).pow(2).sum() / z.pow(2).sum(1).mean()).item()


def test_the_teacher_is_normalised_by_the_clusters_own_batch():
    model, caught = sdr().float(), []
    uniform = torch.randn(64, 3, 32, 32)
    cluster = 0.3 * torch.randn(32, 3, 32, 32) + torch.tensor([1.5, -1.0, 0.5]).view(3, 1, 1)
    hook = model.projector.register_forward_hook(lambda module, args, z: caught.append(z.detach()))
    model.subnet_loss((1, 0, 1, 1), [cluster, cluster.flip(3)])
    hook.remove()
    assert len(caught) == 2 and max(map(explained_by_mean, caught)) <= 0.10
    sdrnet.recalibrate_bn(model.net, lambda prefix: [uniform], prefixes=False)
    z, reference = model.net(cluster).detach(), model.net(uniform).detach()
    for layer in model.projector:                      # by the statistics of the uniform batch
        if isinstance(layer, nn.Linear):
            z, reference = layer(z), layer(reference)
        elif isinstance(layer, nn.ReLU):
            z, reference = z.clamp(min=0), reference.clamp(min=0)
        else:
            mean, std = reference.mean(0), reference.std(0)
            z, reference = (z - mean) / std, (reference - mean) / std
    assert explained_by_mean(z) > 0.10


def test_subnets_losses_leave_the_largest_networks_heads_and_statistics_alone():
    model = sdr().float()
    before = copy.deepcopy(model.net.resnet.state_dict())
    subs = [(path, torch.randn(2, 8, 3, 32, 32)) for path in ((1, 0, 1, 1), (0, 1, 0, 0))]
    parts = [model.subnet_loss(*sub) for sub in subs]
    sum(loss + kd for loss, kd, _ in parts).backward()
    for head in (model.projector, model.predictor):
        assert all(p.grad is None for p in head.parameters())
    for head in (model.sub_projector, model.sub_predictor, model.distiller):
        assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.net.resnet.state_dict().items())
    model(torch.randn(2, 8, 3, 32, 32), subs)          # while L_0's batch does move them
    assert not torch.equal(before["bn1.running_mean"], model.net.resnet.bn1.running_mean)


def test_heads_start_as_copies_when_subnets_enter():
    model = sdr(objective="byol")
    for parameter in [*model.projector.parameters(), *model.predictor.parameters()]:
        nn.init.normal_(parameter)
    model.enter_subnets()
    for ours, theirs in ((model.sub_projector, model.projector),
                         (model.sub_predictor, model.predictor),
                         (model.distiller, model.predictor)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_byols_target_follows_with_momentum():
    model = sdr(objective="byol")
    kept = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter += 1
    model.update_target(0.75)
    online = [*model.net.parameters(), *model.projector.parameters(),
              *model.sub_projector.parameters()]
    for old, new, target in zip(kept, online, model.target.parameters()):
        assert torch.allclose(target, 0.75 * old + 0.25 * new)
    assert not any(p.requires_grad for p in model.target.parameters())
    x = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    loss, _ = model(x)
    net, projector, _ = model.target
    z = [projector(net(v)) for v in x]
    p = [model.predictor(model.projector(model.net(v))) for v in x]
    assert loss.item() == pytest.approx(pretrain.symmetric_loss(p, z).item(), abs=1e-12)


def test_std_shows_collapse():
    assert float(pretrain.feature_std(torch.randn(4096, 64))) == pytest.approx(1, abs=0.02)
    assert float(pretrain.feature_std(torch.ones(64, 8))) == 0
    z = torch.ones(64, 8)                              # the least where the mean is 0
    z[0] = -63
    assert float(pretrain.feature_std(z)) == pytest.approx(2 / 64 ** 0.5, rel=0.02)


# ------------------------------------------------------------------------------------ processes

def worker(rank, world, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531", RANK=str(rank),
                      WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo")
    loss, gradients, state = one_step(rank, world)
    total = torch.tensor([loss], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    if rank == 0:
        torch.save((float(total) / world, gradients, state), f"{folder}/{world}.pt")
    torch.distributed.destroy_process_group()


def one_step(rank, world):
    """Loss, gradients and statistics after a step of SDR in float64, on this process's rows."""
    torch.manual_seed(1)
    model = pretrain.SDR(sdrnet.SDRNet("resnet18", 8, 2), 2, 16).double()
    ddp = model
    if world > 1:
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    x = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    x_i = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    rows = np.array_split(np.arange(8), world)[rank]
    loss, _ = ddp(x[:, rows], [((1, 0, 1, 1), x_i[:, rows])])
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()], model.net.resnet.state_dict()


@pytest.mark.slow
def test_two_and_four_processes_compute_what_one_does(tmp_path):
    loss, gradients, state = one_step(0, 1)
    for world in (2, 4):
        mp.spawn(worker, (world, str(tmp_path)), world)
        loss_n, gradients_n, state_n = torch.load(tmp_path / f"{world}.pt")
        assert loss_n == pytest.approx(loss, abs=1e-9)
        for a, b in zip(gradients, gradients_n):
            assert torch.allclose(a, b, atol=1e-9)
        assert all(torch.allclose(state[k], state_n[k], atol=1e-9) for k in state)


# ------------------------------------------------------------------------------------ views

def test_boxes_of_crops_are_distributed_as_torchvisions():
    u = torch.rand(4000, 22)
    ours = pretrain.crop_boxes(u, 48, 96).double()
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(3, 48, 96), (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]).double()
    for column in range(4):
        spread = theirs[:, column].std() / math.sqrt(4000)
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 6 * spread
    inside = (ours[:, 0] + ours[:, 2] <= 48) & (ours[:, 1] + ours[:, 3] <= 96) & (ours >= 0).all(1)
    assert inside.all()
    narrow = pretrain.crop_boxes(torch.rand(50, 22), 2, 300)           # where no shape fits
    assert (narrow[:, 2] == 2).all() and (narrow[:, 3] <= 3).all()


def test_a_crop_is_bilinear_interpolation():
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 20, 24], [4, 6, 10, 12], [3, 1, 8, 16]])
    ours = pretrain.crop_batch(images, boxes, 16)
    for image, (top, left, h, w), got in zip(images, boxes.tolist(), ours):
        for y, x in ((0, 0), (5, 9), (8, 8), (14, 3)):
            row = min(max(top + (y + 0.5) * h / 16 - 0.5, 0), 19)
            column = min(max(left + (x + 0.5) * w / 16 - 0.5, 0), 23)
            a, b = int(row), int(column)
            part = image[:, a:a + 2, b:b + 2].float() / 255
            part = F.pad(part, (0, 2 - part.shape[2], 0, 2 - part.shape[1]))
            down = torch.tensor([1 - row + a, row - a])
            right = torch.tensor([1 - column + b, column - b])
            wanted = (part * (down[:, None] * right)).sum((1, 2))
            assert torch.allclose(got[:, y, x], wanted, atol=1e-5)


def test_colour_jitter_is_torchvisions_step_by_step():
    x = torch.rand(4, 3, 9, 7)
    u = torch.tensor([0.5, 0.9, 0.2, 0.7, 0.5, 0.1, 0.2, 0.3, 0.4]).repeat(4, 1)
    u[1, 0] = 0.9                                      # this one is left alone
    u[2, 5:] = torch.tensor([0.4, 0.3, 0.2, 0.1])      # the other way round
    ours = pretrain.colour_jitter(x.clone(), u)
    factor = (0.6 + 0.8 * u[0, 1:4]).tolist()
    wanted = T.adjust_saturation(T.adjust_contrast(T.adjust_brightness(x, factor[0]), factor[1]),
                                 factor[2])
    assert torch.allclose(ours[[0, 3]], wanted[[0, 3]], atol=2e-3)
    assert torch.equal(ours[1], x[1])
    wanted = T.adjust_brightness(T.adjust_contrast(T.adjust_saturation(x, factor[2]), factor[1]),
                                 factor[0])
    assert torch.allclose(ours[2], wanted[2], atol=2e-3)
    turned = pretrain.turn_hue(x, torch.full((4, 1, 1, 1), 2 * math.pi / 3))
    assert torch.allclose(turned, x.roll(1, 1), atol=1e-5)             # a third: R -> G -> B -> R


def test_blur_is_torchvisions():
    x, sigma = torch.rand(3, 3, 24, 24), torch.tensor([0.3, 1.0, 2.0])
    for image, s, ours in zip(x, sigma.tolist(), pretrain.gaussian_blur(x, sigma)):
        assert torch.allclose(ours, T.gaussian_blur(image, [13, 13], [s, s]), atol=1e-4)


def test_views_are_a_function_of_seed_step_and_position():
    a, b = pretrain.uniform_numbers(3, 17, 8), pretrain.uniform_numbers(3, 17, 12)
    assert torch.equal(a, b[:8]) and not torch.equal(a, pretrain.uniform_numbers(3, 18, 8))
    assert len(np.unique(b.numpy())) > 0.99 * b.numel()
    x = torch.rand(12, 3, 16, 16)
    alone = torch.cat([pretrain.make_views(x[i:i + 1].clone(), b[i:i + 1, 0], 0.5)
                       for i in range(12)])
    assert torch.allclose(pretrain.make_views(x.clone(), b[:, 0], 0.5), alone, atol=1e-5)


# ------------------------------------------------------------------------------------ which images

def test_every_image_is_drawn_equally_often():
    drawn = np.concatenate([pretrain.uniform_batch(step, 5, 30, 8) for step in range(15)])
    assert (np.bincount(drawn, minlength=30) == 4).all()               # 120 = 4 epochs
    assert not np.array_equal(drawn[:30], drawn[30:60])


def test_phases_share_out_the_steps():
    phases = [pretrain.phase_of(step, 80, [1, 1, 1, 1, 4]) for step in range(80)]
    assert [phases.count(p) for p in range(5)] == [10, 10, 10, 10, 40] and phases == sorted(phases)
    assert {pretrain.phase_of(step, 9, [0, 0, 0, 0, 1]) for step in range(9)} == {4}


@pytest.mark.parametrize("literal", [False, True])
def test_a_phase_draws_its_subnets_and_their_images(literal):
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 16, 400)) if literal else rng.integers(0, 16, 400)
    clusters[clusters == 5] = 6                        # one is empty
    for phase in (1, 2, 3, 4):
        seen = {}
        for step in range(120):
            for path, images in pretrain.cluster_batches(step, 1, clusters, 2, phase, 2, 7,
                                                         literal):
                assert len(images) == 7
                seen[path] = seen.get(path, 0) + 1
                digits = [sdrnet.index_to_path(c, 2) for c in clusters[images]]
                if literal:
                    assert None not in path and all(d == path for d in digits)
                else:
                    assert path[:4 - phase] == (None,) * (4 - phase)
                    assert all(d[4 - phase:] == path[4 - phase:] for d in digits)
        if literal:
            assert len({path[:4 - phase] for path in seen}) == 1
        else:                                          # in proportion to their images
            for path, count in seen.items():
                size = np.mean([sdrnet.index_to_path(c, 2)[4 - phase:] == path[4 - phase:]
                                for c in clusters])
                assert abs(count / 240 - size) < 0.12
        assert len(seen) <= 2 ** phase and (phase == 4 or len(seen) == 2 ** phase or literal)
