"""Small data sets of the form of the real ones."""

import io
import tarfile

import numpy as np
from PIL import Image

from input_pipeline.specs import SPECS

# Three of ImageNet's classes, and their labels.
SYNSETS = ("n01440764", "n01443537", "n15075141")
LABELS = (0, 1, 999)


def small_images(name, count, seed=0):
    """Images of a data set's form, whose class can be learnt: it is their brightness."""
    spec, rng = SPECS[name], np.random.RandomState(seed)
    labels = rng.randint(0, spec.num_classes, count)
    noise = rng.randint(0, 56, (count, *spec.image_shape))
    return (noise + 200 * labels[:, None, None, None] // spec.num_classes).astype(np.uint8), labels


def photograph(height, width, seed=0, mode="RGB"):
    """A PIL image that is smooth, with some detail, as photographs are."""
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[:height, :width]
    planes = []
    for _ in Image.new(mode, (1, 1)).getbands():
        a, b, c = rng.uniform(5, 40, 3)
        planes.append(128 + 60 * np.sin(rows / a) + 50 * np.cos(columns / b + rows / c))
    pixels = np.stack(planes, axis=-1) + rng.normal(0, 4, (height, width, len(planes)))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).squeeze(), mode)


def encoded(image, **options):
    """The bytes of a JPEG, or of the ``format`` given."""
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "jpeg", "quality": 92} | options))
    return buffer.getvalue()


def write_tree(root, train, test, synsets=SYNSETS):
    """Writes small JPEGs as ``root/train/<synset>/*.JPEG`` and ``root/val/...``; returns root."""
    for split, count in (("train", train), ("val", test)):
        for i in range(count):
            synset = synsets[i % len(synsets)]
            path = root / split / synset / f"{synset}_{i:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            # A class is a seed, and so can be learnt.
            image = photograph(40 + i % 17, 60 - i % 13, seed=i % len(synsets))
            path.write_bytes(encoded(image))
    return root


def write_tars(folder, train, validation):
    """The two archives of ILSVRC 2012, with few images; returns the bytes of each by name."""
    images = {}

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    def image(name, **options):
        images[name] = encoded(photograph(30, 40, seed=len(images)), **options)
        return images[name]

    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset, names in train.items():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name in names:
                    add(inner, name, image(name))
            add(outer, f"{synset}.tar", buffer.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in validation:
            add(tar, name, image(name, format="png"))
    return images
