"""What the first version computed, for the second to agree with: how the inputs are made.

The figures lie in fixtures/: extraction.npz, outputs of two networks whose weights are `fill`ed;
average_precision.json, figures of the table that `detections` makes, VOC's with a match over the
threshold where the first version took one at it too. Regenerate neither: they are what was so
before. The same numpy calls give the same inputs on every machine.
"""
import numpy as np

NETWORKS = {                                           # the largest network and three of its paths
    "resnet18": dict(arch="resnet18", width=16, groups=2, shared=0.5, small_stem=False),
    "resnet50": dict(arch="resnet50", width=8, groups=2, shared=0.5, small_stem=False),
}
PATHS = [(0, 0, 0, 0), (1, 0, 1, 1), (0, 1, 1, 0)]     # extraction.npz: "resnet18 1011", ...


def fill(shapes, rng):
    """{name: shape} -> {name: float32 array}, drawn in the order of the sorted names.

    Convolutions keep the scale of what they are given; names that end in var, and those of one
    dimension that end in weight, are uniform in 0.5 to 1.5; all others normal, of deviation 0.1.
    Leave out num_batches_tracked. A network takes two calls with one rng = default_rng(0): its
    state dict, then its statistics of prefixes as {"layer1.0.bn1.mean": ..., "layer1.0.bn1.var":
    ...}, row i being the prefix whose base-g digits are i."""
    arrays = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if len(shape) == 4:
            values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("weight", "var")):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape) * 0.1
        arrays[name] = values.astype(np.float32)
    return arrays


def images():
    """The batch: float32 (2, 3, 32, 32)."""
    return np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)


def detections(seed=0, count=40, classes=4):
    """(truth, found): objects and detections in `count` images, dicts of arrays, a row each.

    Both: image int64, label int64, box float64 (n, 4) [x1, y1, x2, y2], continuous; truth:
    difficult bool; found: score float64 of two decimals, so that many are equal. Coordinates are
    multiples of 1/8: overlaps, also of exactly 1/2, are the same by any order of operations.
    Every fifth image is empty; the last class has no object; some objects share a place, and
    some of those differ in being difficult; one image has 130 detections of a class."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for image in range(count):
        for _ in range(0 if image % 5 == 4 else rng.integers(1, 6)):
            corner, side = rng.integers(0, 60, 2), rng.integers(8, 33, 2)
            box = np.concatenate([corner, corner + side]).astype(float)
            label = rng.integers(classes - 1)
            difficult = rng.random() < 0.2
            objects.append((image, label, box, difficult))
            if rng.random() < 0.15:
                objects.append((image, label, box, not difficult))
            for _ in range(rng.integers(0, 4)):        # found well, badly, twice, not at all
                moved = box + np.round(rng.normal(0, 0.06, 4) * side.min() * 8) / 8
                found.append((image, label, moved, rng.random()))
            if rng.random() < 0.3:                     # an overlap of exactly 1/2
                half = np.array([box[0], box[1], box[2], (box[1] + box[3]) / 2])
                found.append((image, label, half, rng.random()))
        for _ in range(rng.integers(0, 4)):            # where nothing is
            corner = rng.integers(0, 60, 2)
            box = np.concatenate([corner, corner + 20]).astype(float)
            found.append((image, rng.integers(classes), box, rng.random()))
    for k in range(130):                               # COCO counts an image's best 100 of a class
        found.append((7, 0, np.array([0.0, 0.0, 3 + k % 9, 5.0]), rng.random()))
    truth = dict(zip(("image", "label", "box", "difficult"), map(np.array, zip(*objects))))
    found = dict(zip(("image", "label", "box", "score"), map(np.array, zip(*found))))
    found["score"] = np.round(found["score"], 2)
    return truth, found
