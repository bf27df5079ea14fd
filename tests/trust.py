"""trust.py - nothing lost, the same result, a clear word: the long series behind the README's table of promises.

    python tests/trust.py                                      # all of it, one line a figure: measured, bar, holds or FAILS
    python tests/trust.py --only kills,fuzz --seed 1           # some of it, at other moments, with other damage

The scripts run as a user runs them, each in a process of its own with its own command line; those that are stopped at
random moments are forked from one that has imported torch, so that the moments fall into the work. test_trust.py runs
short versions. Exit status 1 if a bar does not hold.
"""
import argparse
import copy
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import detect_voc
import pretrain
import sdrnet

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SMALL = ["--width", "8", "--head", "32", "--batch-size", "32", "--amp", "off", "--sub-batch", "16", "--phases", "1,1,1,1,4", "--distill", "siamkd"]     # every phase and loss

# Reads a line [argv, file for stdout, file for stderr, largest file that may be written, or 0], forks the script, prints
# its pid, then its exit status.
FORKS = """
    import json, os, resource, runpy, sys, traceback
    import torch, torchvision, scipy.optimize, PIL.Image
    sys.path.insert(0, {root!r})
    for line in sys.stdin:
        argv, out, err, limit = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv, status = argv, 0
            try:
                runpy.run_path(argv[0], run_name="__main__")
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Lab:
    """A folder with a small pipeline on 320 toy images and 40 photographs of mixed sizes, two of them broken."""

    def __init__(self, folder, seed=0, epochs=4):
        self.folder, self.rng, self.count = Path(folder), random.Random(seed), 0
        self.launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(FORKS).format(root=str(ROOT))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
        self.subset, self.photos, self.base = self.folder / "subset.npy", self.folder / "photos", self.folder / "base"
        np.save(self.subset, np.arange(320))
        os.makedirs(self.photos)
        for i in range(40):
            size = np.random.default_rng(i).integers(30, 70, 2)
            Image.fromarray(pretrain.toy_images([i])[0][0].permute(1, 2, 0).numpy()).resize(size).save(self.photos / f"{i:02d}.jpg")
        for i in (7, 8):
            data = (self.photos / f"{i:02d}.jpg").read_bytes()
            (self.photos / f"{i:02d}.jpg").write_bytes(data[:len(data) // 2])
        toy = ["--subset", self.subset, *SMALL, "--save-every", "3"]
        self.commands = {                              # name: script, arguments, the file that is the result
            "simsiam": ("pretrain.py", [*toy, "--epochs", "3"], "simsiam.pt"),
            "sdr": ("pretrain.py", [*toy, "--epochs", epochs, "--clusters", self.base / "clusters.npy", "--init", self.base / "simsiam.pt"], "sdrnet.pt"),
            "photos": ("pretrain.py", ["--data", self.photos, "--max-bad", "0.1", "--arch", "resnet18", "--image-size", "32", "--workers", "1", *SMALL, "--batch-size", "8",
                                       "--epochs", "5", "--save-every", "3"], "simsiam.pt"),
            "detect": ("detect_voc.py", ["--backbone", self.base / "sdrnet.pt", "--path", "0,1,0,1", "--scenes", "16", "--test-scenes", "8", "--batch", "2", "--iterations", "10", "--rois", "16",
                                         "--precise-bn", "2", "--test-side", "64", "--short-side", "64", "--workers", "2", "--amp", "off", "--save-every", "2"], "detector.pt"),
            "cluster": ("cluster.py", ["--subset", self.subset, "--checkpoint", self.base / "simsiam.pt", "--amp", "off", "--epochs", "60"], "clusters.npy"),
            "route": ("route.py", ["--checkpoint", self.base / "sdrnet.pt", "--task", "toy", "--amp", "off", "--probe"], "toy-shapes/scores.npy"),
        }
        self.straights = {}                            # name: (folder, seconds) of an uninterrupted run
        for name in ("simsiam", "cluster", "sdr"):
            self.straight(name, self.base)

    def close(self):
        self.launcher.stdin.close()
        self.launcher.wait()

    def fresh(self):
        self.count += 1
        return self.folder / f"run{self.count}"

    def start(self, name, out, *more, limit=0):
        """Starts one of the commands, or a script with these arguments; self.out and self.err are what it prints."""
        script, arguments, _ = self.commands.get(name, (name, [], None))
        self.count += 1
        self.out, self.err = (self.folder / f"{self.count}.{kind}" for kind in ("out", "err"))
        argv = [ROOT / script, *arguments, *more, "--out", out]
        self.launcher.stdin.write(json.dumps([[*map(str, argv)], str(self.out), str(self.err), limit]) + "\n")
        self.launcher.stdin.flush()
        return int(self.launcher.stdout.readline())

    def wait(self):
        return int(self.launcher.stdout.readline())

    def run(self, name, out, *more, **options):
        """(status, seconds from its first line of print to the end)"""
        pid = self.start(name, out, *more, **options)
        began = self.printed(pid)
        return self.wait(), time.time() - began

    def printed(self, pid):
        """Waits until the script has read its arguments: it has printed, or ended. Returns the time."""
        def runs():
            try:
                return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
            except OSError:                            # gone
                return False
        while not (self.out.exists() and self.out.stat().st_size) and runs():
            time.sleep(0.005)
        return time.time()

    def straight(self, name, out=None):
        """(folder, seconds) of an uninterrupted run, made once."""
        if name not in self.straights:
            out = out or self.folder / f"straight-{name}"
            status, seconds = self.run(name, out)
            assert status == 0, self.err.read_text()
            self.straights[name] = out, seconds
        return self.straights[name]

    def stop(self, name, share, number, group=False):
        """Sends a signal after this share of the time that the command takes: (folder, status, seconds that it took to
        end). A run that ended before is made anew, and stopped earlier."""
        straight, seconds = self.straight(name)
        while True:
            out = self.fresh()
            pid = self.start(name, out)
            self.printed(pid)
            time.sleep(share * seconds)
            sent = time.time()
            try:
                (os.killpg if group else os.kill)(pid, number)
            except ProcessLookupError:                 # it has ended
                pass
            status = self.wait()
            if status != 0:
                return out, status, time.time() - sent
            share *= 0.7

    def finish(self, name, out):
        """Gives the same command again: whether it ends with the straight run's result, and where it went on."""
        status, _ = self.run(name, out)
        result, straight = self.commands[name][2], self.straight(name)[0]
        words = self.out.read_text()
        step = int(words.split("continuing from")[1].split("step ")[1].split()[0]) if "continuing from" in words else 0
        logs = [[json.loads(line)["step"] for line in open(file)] for file in out.glob("*.log.jsonl")]
        return status == 0 and same(value(out / result), value(straight / result)) and all(log == list(range(len(log))) for log in logs), step


def value(path):
    """What is in a result: an array, or a checkpoint without the seconds that it took."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    content = torch.load(path, weights_only=True)
    content.get("origin", {}).pop("seconds", None)
    return content


def same(a, b):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------- stopped at random moments

def kills(lab, names=("simsiam", "photos", "detect") + ("sdr",) * 7, rounds=2):
    """kill -9, then the same command again. The moments of a command are spread over all of its run."""
    equal, steps, plan = 0, [], list(names) * rounds
    for name in sorted(set(plan)):
        for k in range(plan.count(name)):
            out, status, _ = lab.stop(name, (k + lab.rng.random()) / plan.count(name), signal.SIGKILL)
            good, step = lab.finish(name, out)
            equal, steps = equal + good, steps + [f"{name} {step}"]
    return f"{equal} of {len(plan)} equal; went on from step " + ", ".join(steps), equal == len(plan)


def terms(lab, names=("simsiam", "sdr", "sdr", "sdr", "photos", "photos", "detect", "detect", "cluster", "route")):
    """SIGTERM (to the whole process group, loader workers included, for photographs), then the same command again."""
    equal, slowest = 0, 0.0
    for name in sorted(set(names)):
        for k in range(names.count(name)):
            out, status, seconds = lab.stop(name, (k + lab.rng.random()) / names.count(name), signal.SIGTERM, group=name == "photos")
            whole = status == 143 and not list(out.rglob("*.tmp")) and not lab.err.read_text()
            saved = name in ("cluster", "route") or list(out.glob("*.last.pt"))
            equal, slowest = equal + bool(whole and saved and seconds < 10 and lab.finish(name, out)[0]), max(slowest, seconds)
    return f"{equal} of {len(names)} ended with 143, saved, then equal; the slowest took {slowest:.1f} s", equal == len(names)


# ---------------------------------------------------------------------------- several processes

STEPS = """
    import argparse, os, sys, numpy as np, torch, pretrain, sdrnet
    out, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    args = argparse.Namespace(device="cpu", seed=0, out=".", lr=float(sys.argv[3]), weight_decay=5e-4, image_size=32, workers=0, blur=0.0, amp="off", save_every=(1000, "steps"),
                              monitor_every=1, collapse_std=0.0, stop_on_collapse=False, objective="simsiam", sizes=None)
    device = pretrain.start(args)
    torch.manual_seed(0)
    model = pretrain.SDR(sdrnet.SDRNet("resnet18", 8, 2), width=32).to(dtype)
    views, step, calls = pretrain.views, torch.optim.SGD.step, []
    pretrain.views = lambda *a: views(*a).to(dtype)
    def keep_gradients(self):
        if not calls and pretrain.rank() == 0:
            torch.save([p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None], out + ".grad")
        calls.append(step(self))
    torch.optim.SGD.step = keep_gradients
    images, clusters = pretrain.toy_listing(320, 0), np.arange(320) % 16
    plan = pretrain.Plan(320, 32, 2, 0, clusters, 2, 2, (0, 0, 0, 0, 1))
    pretrain.train(model, images, plan, args, device, (out + ".last.pt", out + ".prev.pt"), {}, [])
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
"""


def torchrun(count, *command, restarts=0):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--max-restarts", str(restarts), *map(str, command)]


RATES = {"float64": 0.06, "float32": 0.001}            # see `processes`


def processes(lab, counts=(1, 2, 4), dtypes=("float64", "float32")):
    """20 steps of SDR on 1, 2 and 4 gloo processes: the losses of each step, the gradients of the first.

    In fp32 at a small rate: rounding decides some ReLUs and maxima the other way within 20 steps, and a larger rate
    carries that on (0.004: 1.5e-3, 0.06: 1.4e-1). In float64 it does not happen at the toy recipe's own rate."""
    script, words, holds = lab.folder / "steps.py", [], True
    script.write_text(textwrap.dedent(STEPS))
    for dtype in dtypes:
        found = []
        for count in counts:
            out = lab.fresh()
            done = subprocess.run(torchrun(count, script, out, dtype, RATES[dtype]), capture_output=True, text=True, env=ENV, timeout=500)
            assert done.returncode == 0, done.stderr[-3000:]
            found.append((np.array([json.loads(line)["loss"] for line in open(f"{out}.log.jsonl")]), torch.cat([g.flatten().double() for g in torch.load(f"{out}.grad")])))
        (loss, gradient), others = found[0], found[1:]
        first, last = (max(np.abs(other[:n] - loss[:n]).max() for other, _ in others) for n in (1, 20))
        relative = max(float((g - gradient).norm() / gradient.norm()) for _, g in others)
        bars = (1e-6, 1e-5, 1e-8 if dtype == "float64" else 1e-4)
        holds = holds and len(loss) == 20 and all(v <= bar for v, bar in zip((first, relative, last), bars))
        words.append(f"{dtype}: first loss {first:.1e}, gradients {relative:.1e}, 20 steps {last:.1e}")
    return "; ".join(words), holds


def children(pid):
    """{rank: pid} of the processes that a torchrun has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                environment = dict(part.split(b"=", 1) for part in (entry / "environ").read_bytes().split(b"\0") if b"=" in part)
                found[int(environment[b"RANK"])] = int(entry.name)
        except (OSError, KeyError):
            pass
    return found


def wait_for(path, process, newer=0):
    while not (path.exists() and path.stat().st_mtime_ns > newer) and process.poll() is None:
        time.sleep(0.01)


def restart(lab):
    """One of 2 processes killed under torchrun --max-restarts."""
    script, arguments, result = lab.commands["sdr"]
    outs = [lab.fresh(), lab.fresh()]
    for n, out in enumerate(outs):
        with open(lab.folder / "restart.log", "w") as log:
            running = subprocess.Popen(torchrun(2, ROOT / script, *arguments, "--out", out, restarts=n), stdout=log, stderr=log, env=ENV)
            if n:
                wait_for(out / "sdrnet.last.pt", running)
                os.kill(children(running.pid)[1], signal.SIGKILL)
            status = running.wait(500)
        words = open(lab.folder / "restart.log").read()
    good = status == 0 and "continuing from" in words and same(value(outs[0] / result), value(outs[1] / result))
    return "the run completed with equal weights" if good else f"status {status}: {words[-1000:]}", good


def growth(lab):
    """The same run on 1, then 2, then 4 processes: stopped by SIGTERM to torchrun in between. The rate is as in `processes`."""
    script, arguments, _ = lab.commands["sdr"]
    arguments = [*arguments, "--lr", RATES["float32"]]
    straight, out, steps, newer = lab.fresh(), lab.fresh(), [], 0
    assert lab.run(script, straight, *arguments)[0] == 0
    for count in (1, 2, 4):
        running = subprocess.Popen(torchrun(count, ROOT / script, *arguments, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
        if count < 4:
            wait_for(out / "sdrnet.last.pt", running, newer)
            running.terminate()
        running.wait(500)
        newer = (out / "sdrnet.last.pt").stat().st_mtime_ns
        steps.append(sdrnet.load(str(out / "sdrnet.last.pt"))["step"])
    a, b = ([json.loads(line) for line in open(folder / "sdrnet.log.jsonl")] for folder in (straight, out))
    apart = [abs(x["loss"] - y["loss"]) for x, y in zip(a, b)]
    good = [y["step"] for y in b] == list(range(len(a))) and (out / "sdrnet.pt").exists() and 0 < steps[0] < steps[1] < steps[2] and max(apart[:20]) <= 1e-4
    return f"processes 1, 2, 4 up to steps {steps}: losses of 20 steps within {max(apart[:20]):.1e}, of all within {max(apart):.1e}", good


# ---------------------------------------------------------------------------- damaged and hostile files

class Evil:
    """Makes a folder where a file is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(data, rng):
    """Bytes with one to four changes: bits, cuts, repeats, noise, numbers at their limits."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(max(1, len(data))), rng.randint(1, 64)
        if len(data) < 8:
            break
        kind = rng.randrange(7)
        if kind < 2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at + n] = rng.randbytes(n)
        elif kind == 3:
            del data[at:at + n]
        elif kind == 4:
            data[at:at] = data[at:at + n]
        elif kind == 5:
            data[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"9999"))
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def twisted(content, rng, evil):
    """A checkpoint that is whole but wrong: a value taken out or replaced at a random place in it."""
    content = copy.deepcopy(content)
    place = content
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and len(place[key]) and rng.random() < 0.8:
            place = place[key]
            continue
        choice = rng.choice([None, -1, 10 ** 12, 0.5, float("nan"), "text", [], {}, torch.zeros(3), torch.full((2, 2), float("nan")), Evil(evil), "gone"])
        if isinstance(choice, str) and choice == "gone":
            del place[key]
        else:
            place[key] = choice
        return content


def replaced(text, rng):
    """XML with numbers, names and heads exchanged for odd ones."""
    odd = ["inf", "nan", "-5", "1e999", "../../../etc/passwd", "/etc/passwd", "", "&x;", "\0", "é" * 50, "9" * 400]
    heads = ['<?xml version="1.0" encoding="nonsense"?>', '<!DOCTYPE a [<!ENTITY x "y">]>', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>', '<?xml version="1.0" encoding="utf-16"?>', "<a>" * 50_000]
    values = [v for v in ("40", "30", "5", "25", "photo.jpg", "dog", "0") if f">{v}<" in text]
    text = text.replace(f">{rng.choice(values)}<", f">{rng.choice(odd)}<", 1) if rng.random() < 0.7 else text
    return (rng.choice(heads) + text if rng.random() < 0.4 else text).encode("utf8", "surrogateescape")


class Hang(BaseException):
    pass


def fuzz(lab, count=500, by_script=20):
    """Mutated files through the functions that read them: read, or refused with an InputError that names the file."""
    rng, where, evil = lab.rng, lab.fresh(), lab.folder / "evil"
    os.makedirs(where / "JPEGImages")
    Image.new("RGB", (40, 30), "red").save(where / "JPEGImages" / "photo.jpg")
    annotation = ("<annotation><filename>photo.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size><object><name>dog</name><difficult>0</difficult>"
                  "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>25</xmax><ymax>25</ymax></bndbox></object></annotation>")
    photo, network, clusters = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), torch.load(lab.base / "sdrnet.pt", weights_only=True), (lab.base / "clusters.npy").read_bytes()
    images = lambda file: pretrain.Images([str(file)], lambda i: Image.open(file)).decode(0)
    readers = {                                        # suffix: what reads it
        "pt": lambda file: sdrnet.load_network(str(file), ("sdrnet",)),
        "npy": lambda file: pretrain.load_clusters(str(file), pretrain.toy_listing(320, 0)) if rng.random() < 0.5 else pretrain.load_array(str(file), "f", 2, mmap_mode="r"),
        "jpg": images, "png": images,
        "xml": lambda file: detect_voc.read_annotation(str(file), str(where / "JPEGImages")),
    }
    saved, weights = (lab.base / "sdrnet.pt").read_bytes(), dict(sdrnet.load_network(str(lab.base / "sdrnet.pt")).state_dict())

    def make(kind, file):
        if kind in ("jpg", "png"):
            Image.fromarray(photo).save(file)
            file.write_bytes(damage(file.read_bytes(), rng))
        elif kind == "npy" and rng.random() < 0.1:
            np.save(file, np.array([Evil(evil)], dtype=object), allow_pickle=True)
        elif kind == "npy":
            head = clusters[:128].replace(b"<i8", rng.choice((b"<i8", b">i8", b"<f8", b"|O8", b"<u8", b"<i1"))).replace(b"(320,)", rng.choice((b"(320,)", b"(9**9", b"(-1,) ", b"(40,8)")))
            file.write_bytes(damage(head, rng) + clusters[128:] if rng.random() < 0.5 else damage(head + clusters[128:], rng))
        elif kind == "xml":
            file.write_bytes(replaced(annotation, rng) if rng.random() < 0.5 else damage(annotation.encode(), rng))
        elif rng.random() < 0.5:
            torch.save(twisted(network, rng, evil), file)
        else:                                          # a changed bit is to be noticed, wherever it is
            file.write_bytes(damage(saved, rng))

    def late(*_):
        raise Hang()
    signal.signal(signal.SIGALRM, late)
    wrong, refused, files = [], 0, []
    for n in range(count):
        kind = list(readers)[n % len(readers)]
        file = where / f"{n}.{kind}"
        make(kind, file)
        files.append(file)
        before = hashlib.sha256(file.read_bytes()).digest()
        signal.alarm(20)
        try:
            content = readers[kind](file)
            if kind == "pt" and file.stat().st_size == len(saved) and not same(dict(content.state_dict()), weights):
                wrong.append(f"{file.name} loads with other weights")
        except sdrnet.InputError as error:
            refused += 1
            if file.name not in str(error):
                wrong.append(f"{file.name} is not named: {error}")
        except (Exception, Hang) as error:
            wrong.append(f"{file.name}: {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        if hashlib.sha256(file.read_bytes()).digest() != before:
            wrong.append(f"{file.name} was written to")
    wrong += [f"code of a file was run: {evil}"] if evil.exists() else []

    before = hashes(lab.base)
    for n in range(by_script):
        out = lab.fresh()
        kind = list(readers)[n % 4]                    # annotations through detect_voc.py need a whole folder: test_detect.py has them
        file = rng.choice([f for f in files if f.suffix == f".{kind}"])
        if kind in ("jpg", "png"):
            folder = lab.fresh()
            os.makedirs(folder)
            (folder / file.name).write_bytes(file.read_bytes())
            command = ["pretrain.py", out, "--data", folder, *SMALL, "--batch-size", "4", "--epochs", "4"]
        elif kind == "npy":
            command = ["pretrain.py", out, "--subset", lab.subset, *SMALL, "--epochs", "0.2", "--clusters", file]
        else:
            command = rng.choice([["pretrain.py", out, "--subset", lab.subset, *SMALL, "--groups", "2", "--epochs", "0.1", "--init", file], ["cluster.py", out, "--subset", lab.subset, "--checkpoint", file],
                                  ["route.py", out, "--task", "toy:weaves", "--checkpoint", file],
                                  ["detect_voc.py", out, "--scenes", "4", "--test-scenes", "2", "--iterations", "1", "--batch", "2", "--precise-bn", "1", "--rois", "8", "--backbone", file]])
        status = lab.run(*command)[0]
        lines = lab.err.read_text().splitlines()
        if not (status == 0 and not lines or status == 2 and len(lines) == 1 and lines[0].startswith(f"{command[0]}: error: ") and file.name in lines[0]):
            wrong.append(f"{command[0]} with {file.name}: status {status}, {lines[-3:]}")
    wrong += ["an input was overwritten"] if hashes(lab.base) != before else []
    return f"{count} files, {refused} refused, {by_script} of them through scripts: {len(wrong)} wrong" + "".join(f"\n    {w[:300]}" for w in wrong), not wrong


# ---------------------------------------------------------------------------- broken images, small clusters, saving

def images(lab):
    """Two of 40 photographs are broken: the same run on 0 and 2 workers, 1 and 2 processes."""
    script, arguments, _ = lab.commands["photos"]
    found = []
    for count, workers in ((1, 2), (1, 0), (2, 1)):
        out = lab.fresh()
        done = subprocess.run([*(torchrun(count) if count > 1 else [sys.executable]), ROOT / script, *map(str, arguments), "--workers", str(workers), "--out", out], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0 and "2 broken images skipped" in done.stdout, done.stderr[-3000:]
        found.append(((out / "bad_images.txt").read_text(), np.array([json.loads(line)["loss"] for line in open(out / "simsiam.log.jsonl")])))
    (names, loss), (others, losses) = found[0], zip(*found[1:])
    apart = max(np.abs(other - loss).max() for other in losses)
    good = set(others) == {names} and [line.split("\t")[0][-6:] for line in names.splitlines()] == ["07.jpg", "08.jpg"] and apart <= 1e-4
    return f"the same two listed on 0, 1, 2 workers and 1, 2 processes; losses within {apart:.1e}", good


def tiny(lab):
    """24 images in 16 clusters of 1 or 2, when a sub-net takes 8 a step."""
    clusters = np.arange(24) % 16
    np.save(lab.folder / "few.npy", np.arange(24)), np.save(lab.folder / "tiny.npy", clusters)
    out = lab.fresh()
    status, _ = lab.run("pretrain.py", out, "--subset", lab.folder / "few.npy", *SMALL, "--clusters", lab.folder / "tiny.npy", "--phases", "0,0,0,0,1", "--epochs", "16")
    log = [json.loads(line) for line in open(out / "sdrnet.log.jsonl")]
    drawn = {int(np.bincount(clusters)[i]) for line in log for i in line["subnets"]}
    finite = all(np.isfinite([line["loss"], line["ssl"], line["kd"], line["std_sub"]]).all() for line in log)
    weights = all(bool(torch.isfinite(v).all()) for v in sdrnet.load_network(str(out / "sdrnet.pt")).state_dict().values())
    return f"{len(log)} steps on clusters of {sorted(drawn)} images, 8 rows each: losses {'' if finite else 'NOT '}finite, weights {'' if weights else 'NOT '}finite", \
        status == 0 and finite and weights and drawn == {1, 2}


def saving(lab):
    """Every write, fsync and rename of a save fails in turn, also where the newest state was damaged before."""
    good, cases, model = 0, 0, torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    state = lambda step: {"format": sdrnet.FORMAT, "kind": "training", "config": {"a": 1}, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    real = {"write": torch.save, "fsync": os.fsync, "replace": os.replace}
    for damaged, name, turn in itertools.product((False, True), real, range(3)):
        out, calls = lab.fresh(), []
        os.makedirs(out)
        paths = [str(out / f"x.{part}.pt") for part in ("last", "prev")]
        pretrain.keep(*paths, state(1)), pretrain.keep(*paths, state(2))
        if damaged:                                    # the run went on from the state before
            Path(paths[0]).write_bytes(b"damaged")
            pretrain.resume(paths, {"a": 1}, model, optimizer)

        def failing(*arguments, **options):
            calls.append(0)
            if len(calls) == turn + 1:
                raise OSError(28, "No space left on device", *[a for a in arguments[:1] if isinstance(a, str)])
            return real[name](*arguments, **options)
        place = (torch, "save") if name == "write" else (os, name)
        setattr(*place, failing)
        try:
            pretrain.keep(*paths, state(3))
        except OSError as error:
            cases += 1
            good += pretrain.resume(paths, {"a": 1}, model, optimizer)["step"] == 2 - damaged and str(out) in f"{error.filename}"
        finally:
            setattr(*place, real[name])
    return f"{good} of {cases} failures left the state before, which loads", good == cases == 9


SERIES = {                                             # name: (function, bar)
    "kills": (kills, "kill -9 at 20 random moments: 20 of 20 bitwise equal"),
    "terms": (terms, "SIGTERM at 10 random moments: 10 of 10 saved within 10 s, then equal"),
    "processes": (processes, "1, 2, 4 processes: first loss to 1e-6, gradients to 1e-5; 20 steps to 1e-8 in float64, 1e-4 in fp32"),
    "growth": (growth, "1, then 2, then 4 processes: the losses of 1"),
    "restart": (restart, "one of 2 processes killed under torchrun --max-restarts: completes, equal weights"),
    "fuzz": (fuzz, "500 mutated files, 20 through scripts: 0 tracebacks, hangs, code run, overwritten"),
    "images": (images, "broken images: the same ones skipped whatever the workers and processes"),
    "tiny": (tiny, "clusters of 1 and 2 images, smaller than the batch: trains, no NaN"),
    "saving": (saving, "write, fsync and rename failing in turn: a state loads, always"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(SERIES), help="names with commas between: " + ", ".join(SERIES))
    parser.add_argument("--seed", type=int, default=0)
    args, failed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder, args.seed)
        for name in args.only.split(","):
            function, bar = SERIES[name]
            began = time.time()
            with redirect_stdout(io.StringIO()):       # what the functions that are called here say
                text, holds = function(lab)
            failed += not holds
            print(f"{'holds' if holds else 'FAILS'}  {name}: {text}  [{bar}; {time.time() - began:.0f} s]", flush=True)
        lab.close()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
