"""Make a small set of images from real handwritten digits.

For detection and segmentation, or for classification.

The digits are the 1797 scans that come with scikit-learn (``load_digits``,
UCI "Optical Recognition of Handwritten Digits"), pasted at random sizes, in
random colours, on procedural textured ground or on plain dark one. Nothing is
downloaded, and a small detector learns the set within minutes on a CPU.

``--layout digits`` (default) writes::

    OUT/train/000000000001.png ...    images, RGB
    OUT/val/...
    OUT/annotations/train.json        COCO json, ten categories '0' ... '9'
    OUT/annotations/val.json
    OUT/seg/train/000000000001.png    class indices: 0 = ground, 1 + digit
    OUT/seg/val/...

``--layout coco`` writes the same images in the shape of COCO 2017
(``train2017/``, ``val2017/``, ``annotations/instances_*2017.json``, no
``seg/``) with all 80 COCO categories, so that a stock config runs on it
unchanged. Digits 0 to 9 stand in for the first ten categories in COCO's
order: 0 is ``person``, 1 is ``bicycle``, ... 9 is ``traffic light``.

``--layout classes`` writes images of one large digit each, on plain dark
ground, in folders named by it, as sets for classification are::

    OUT/train/0/000000000007.png ...  ... OUT/train/9/...
    OUT/val/0/...

Training and validation images use different scans of the digits.

Examples:
    python tools/dataset_converters/digits.py data/digits
    python tools/dataset_converters/digits.py data/coco --layout coco \
        --image-size 640 --num-train 256 --num-val 64
    python tools/dataset_converters/digits.py data/digits_classes \
        --layout classes
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

DIGIT_NAMES = tuple(str(digit) for digit in range(10))
COCO_NAMES = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train',
    'truck', 'boat', 'traffic light', 'fire hydrant', 'stop sign',
    'parking meter', 'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow',
    'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella',
    'handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard',
    'sports ball', 'kite', 'baseball bat', 'baseball glove', 'skateboard',
    'surfboard', 'tennis racket', 'bottle', 'wine glass', 'cup', 'fork',
    'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange',
    'broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair',
    'couch', 'potted plant', 'bed', 'dining table', 'toilet', 'tv',
    'laptop', 'mouse', 'remote', 'keyboard', 'cell phone', 'microwave',
    'oven', 'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase',
    'scissors', 'teddy bear', 'hair drier', 'toothbrush',
)  # fmt: skip
# COCO numbers its 80 categories 1 to 90 and leaves these out.
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# In the palette of the index images; the classes only need to look apart.
SEG_PALETTE = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200),
    (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212),
)  # fmt: skip

VAL_FRACTION = 0.25
MIN_IMAGE_SIZE = 16
# Below the 8 pixels of a scan, strokes fall between the pixels.
MIN_DIGIT_SIZE = 8
# A digit is not pasted where less than this share of one below would be left.
MIN_VISIBLE = 0.85
PLACEMENT_TRIES = 20
# Lightness between a digit and the mean of the ground, of 255.
MIN_CONTRAST = 70


@dataclass(frozen=True)
class Layout:
    """Paths, categories and defaults of a layout.

    Args:
        image_dir (str): Folder of a split's images; ``{split}`` is replaced
            by ``train`` or ``val``, here and below, and ``{label}`` by the
            digit, where images have one.
        ann_file (str, optional): Path of a split's COCO json. Defaults to
            None, for none.
        seg_dir (str, optional): Folder of a split's index images. Defaults
            to None, for none.
        category_ids (tuple[int]): Category ids; digit ``d`` has the one at
            position ``d``.
        category_names (tuple[str]): Names to these ids.
        textured (bool): Whether the ground has a texture. Defaults to True.
        defaults (dict): Defaults of options that depend on the layout.
    """

    image_dir: str
    ann_file: str | None = None
    seg_dir: str | None = None
    category_ids: tuple = tuple(range(1, 11))
    category_names: tuple = DIGIT_NAMES
    textured: bool = True
    defaults: dict = field(
        default_factory=lambda: dict(
            num_train=1000,
            num_val=200,
            image_size=128,
            digits=(2, 6),
            scale=(0.18, 0.45),
        )
    )

    @property
    def one_digit(self):
        """bool: Whether each image shows one digit."""
        return '{label}' in self.image_dir


LAYOUTS = {
    'digits': Layout(
        image_dir='{split}',
        ann_file='annotations/{split}.json',
        seg_dir='seg/{split}',
    ),
    'coco': Layout(
        image_dir='{split}2017',
        ann_file='annotations/instances_{split}2017.json',
        category_ids=tuple(
            i for i in range(1, 91) if i not in COCO_UNUSED_IDS
        ),
        category_names=COCO_NAMES,
    ),
    'classes': Layout(
        image_dir='{split}/{label}',
        textured=False,
        defaults=dict(
            num_train=3000,
            num_val=1000,
            image_size=32,
            digits=(1, 1),
            scale=(0.8, 1.0),
        ),
    ),
}


@dataclass(frozen=True)
class Digit:
    """A digit pasted into an image.

    Args:
        label (int): The digit, 0 to 9.
        source (int): Its row in ``load_digits()``.
        mask (np.ndarray[H, W], bool): Its visible pixels in the image.
        full_area (int): Its pixels before others were pasted over it.
    """

    label: int
    source: int
    mask: np.ndarray
    full_area: int


def make_ground(size, textured, rng):
    """Draw smooth coloured noise, or plain dark ground.

    Args:
        size (int): Side of the square image, in pixels.
        textured (bool): Whether it is noise.
        rng (np.random.Generator): Source of randomness.

    Returns:
        np.ndarray[size, size, 3], float32: The ground, 0 to 255.
    """
    ground = np.empty((size, size, 3), np.float32)
    base = rng.uniform(70, 185) if textured else rng.uniform(30, 60)
    for channel in range(3):
        ground[..., channel] = base + rng.uniform(-30, 30)
        # Octaves of value noise: the finer, the weaker.
        octaves = ((2, 24), (5, 14), (11, 8)) if textured else ()
        for cells, amplitude in octaves:
            grid = rng.uniform(-amplitude, amplitude, (cells, cells))
            octave = Image.fromarray(grid.astype(np.float32))
            ground[..., channel] += np.asarray(
                octave.resize((size, size), Image.BICUBIC)
            )
    if textured:
        ground += rng.normal(0, 3, (size, size, 1))
    return np.clip(ground, 0, 255)


def draw_colour(ground, rng):
    """Draw the colour of a digit so that it stands out from the ground.

    Args:
        ground (np.ndarray[H, W, 3], float32): The ground, 0 to 255.
        rng (np.random.Generator): Source of randomness.

    Returns:
        np.ndarray[3], float32: The colour, 0 to 255.
    """
    mean = float(ground.mean())
    darker, lighter = mean - MIN_CONTRAST, 255 - mean - MIN_CONTRAST
    # Draw from the two permitted ranges together, each by its length.
    offset = rng.uniform(-max(darker, 0), max(lighter, 0))
    lightness = mean + offset + np.copysign(MIN_CONTRAST, offset)
    tint = rng.uniform(-25, 25, 3)
    return np.clip(lightness + tint - tint.mean(), 0, 255).astype(np.float32)


def paste_digit(image, placed, scan, label, source, sizes, colour, rng):
    """Paste a digit where it hides little of those already there.

    Args:
        image (np.ndarray[H, W, 3], float32): Image to paste into, in place.
        placed (list[Digit]): Digits in the image; the new one is appended
            and the masks of those it covers shrink, in place.
        scan (np.ndarray[8, 8], float): The digit, ink 0 to 16.
        label (int): The digit, 0 to 9.
        source (int): Its row in ``load_digits()``.
        sizes (tuple[int, int]): Least and greatest side, in pixels.
        colour (np.ndarray[3], float32): Colour of the ink.
        rng (np.random.Generator): Source of randomness.

    Returns:
        bool: Whether there was room for it.
    """
    side = image.shape[0]
    for _ in range(PLACEMENT_TRIES):
        size = int(rng.integers(sizes[0], sizes[1] + 1))
        top, left = rng.integers(0, side - size + 1, 2)
        ink = Image.fromarray((scan / 16).astype(np.float32))
        ink = np.asarray(ink.resize((size, size), Image.BICUBIC))
        # Steepen the edge: a plain enlargement of 8 pixels is a blur.
        alpha = np.clip((ink - 0.25) * 3, 0, 1)

        window = (slice(top, top + size), slice(left, left + size))
        mask = np.zeros((side, side), bool)
        mask[window] = alpha >= 0.5
        visible = [other.mask & ~mask for other in placed]
        if any(
            rest.sum() < MIN_VISIBLE * other.full_area
            for other, rest in zip(placed, visible, strict=True)
        ):
            continue

        image[window] += alpha[..., None] * (colour - image[window])
        placed[:] = [
            Digit(other.label, other.source, rest, other.full_area)
            for other, rest in zip(placed, visible, strict=True)
        ]
        placed.append(Digit(label, source, mask, int(mask.sum())))
        return True
    return False


def make_image(scans, labels, sources, size, counts, sizes, textured, rng):
    """Make an image with digits on it.

    Args:
        scans (np.ndarray[N, 8, 8], float): All digits, ink 0 to 16.
        labels (np.ndarray[N], int): Which digit each scan shows.
        sources (np.ndarray[M], int): Rows of ``scans`` to draw from.
        size (int): Side of the square image, in pixels.
        counts (tuple[int, int]): Least and greatest number of digits. Fewer
            are pasted only where no room is found for more.
        sizes (tuple[int, int]): Least and greatest side of a digit, in
            pixels.
        textured (bool): Whether the ground has a texture.
        rng (np.random.Generator): Source of randomness.

    Returns:
        tuple: The image (np.ndarray[size, size, 3], uint8, RGB) and its
        digits (list[Digit]).
    """
    image = make_ground(size, textured, rng)
    ground = image.copy()
    placed = []
    for _ in range(rng.integers(counts[0], counts[1] + 1)):
        source = int(rng.choice(sources))
        colour = draw_colour(ground, rng)
        paste_digit(
            image,
            placed,
            scans[source],
            int(labels[source]),
            source,
            sizes,
            colour,
            rng,
        )
    return np.rint(image).astype(np.uint8), placed


def annotate(digit, category_ids):
    """Describe a digit as COCO does.

    Args:
        digit (Digit): The digit.
        category_ids (tuple[int]): Category id of each digit.

    Returns:
        dict: A COCO annotation without ``id`` and ``image_id``. ``bbox`` is
        ``[x, y, width, height]`` in pixels, tight around the visible mask.
        ``source`` is the row in ``load_digits()``.
    """
    rle = coco_mask.encode(np.asfortranarray(digit.mask, np.uint8))
    return {
        'category_id': category_ids[digit.label],
        'bbox': coco_mask.toBbox(rle).tolist(),
        'area': int(coco_mask.area(rle)),
        'iscrowd': 0,
        'segmentation': {
            'size': list(rle['size']),
            'counts': rle['counts'].decode('ascii'),
        },
        'source': digit.source,
    }


def save_seg_map(digits, size, path):
    """Save the classes of all pixels as an indexed png.

    Args:
        digits (list[Digit]): Digits of the image.
        size (int): Side of the square image, in pixels.
        path (Path): File to write.
    """
    classes = np.zeros((size, size), np.uint8)
    for digit in digits:
        classes[digit.mask] = digit.label + 1
    seg_map = Image.fromarray(classes)
    seg_map.putpalette([value for colour in SEG_PALETTE for value in colour])
    seg_map.save(path)


def write_split(out, split, num_images, sources, layout, options):
    """Write the images and annotations of a split.

    Args:
        out (Path): Folder of the whole set.
        split (str): ``'train'`` or ``'val'``.
        num_images (int): Number of images.
        sources (np.ndarray[M], int): Rows of ``load_digits()`` to draw from.
        layout (Layout): Paths and categories.
        options (argparse.Namespace): ``image_size``, ``digits``, ``scale``
            and ``seed`` of :func:`parse_args`.
    """
    data = load_digits()
    size = options.image_size
    sizes = tuple(round(scale * size) for scale in options.scale)
    seg_dir = None
    if layout.seg_dir is not None:
        seg_dir = out / layout.seg_dir.format(split=split)
        seg_dir.mkdir(parents=True, exist_ok=True)

    images, annotations = [], []
    for image_id in tqdm(range(1, num_images + 1), desc=split, disable=None):
        # A stream per image: its content does not depend on how many there
        # are, so a larger set begins with the images of a smaller one.
        rng = np.random.default_rng(
            [options.seed, ('train', 'val').index(split), image_id]
        )
        image, digits = make_image(
            data.images,
            data.target,
            sources,
            size,
            options.digits,
            sizes,
            layout.textured,
            rng,
        )
        name = f'{image_id:012d}.png'
        image_dir = out / layout.image_dir.format(
            split=split, label=digits[0].label
        )
        image_dir.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(image_dir / name)
        if seg_dir is not None:
            save_seg_map(digits, size, seg_dir / name)
        images.append(
            {'id': image_id, 'file_name': name, 'width': size, 'height': size}
        )
        for digit in digits:
            annotation = annotate(digit, layout.category_ids)
            annotation['id'] = len(annotations) + 1
            annotation['image_id'] = image_id
            annotations.append(annotation)

    if layout.ann_file is not None:
        ann_file = out / layout.ann_file.format(split=split)
        write_annotations(images, annotations, layout, ann_file)


def write_annotations(images, annotations, layout, path):
    """Write the COCO json of a split.

    Args:
        images (list[dict]): COCO's descriptions of the images.
        annotations (list[dict]): COCO's descriptions of the digits.
        layout (Layout): Has the categories.
        path (Path): File to write.
    """
    categories = [
        {'id': category_id, 'name': name}
        for category_id, name in zip(
            layout.category_ids, layout.category_names, strict=True
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                'info': {
                    'description': 'Handwritten digits on textured ground'
                },
                'images': images,
                'annotations': annotations,
                'categories': categories,
            }
        )
    )


def check_options(options):
    """Refuse options that no set can be made from.

    Args:
        options (argparse.Namespace): What :func:`parse_args` returns.

    Raises:
        ValueError: If a number is out of range, or the output folder already
            holds something.
    """
    for name in ('num_train', 'num_val'):
        if getattr(options, name) < 1:
            raise ValueError(
                f'{name} must be at least 1, got {getattr(options, name)}'
            )
    if options.image_size < MIN_IMAGE_SIZE:
        raise ValueError(
            f'image_size must be at least {MIN_IMAGE_SIZE} pixels, got '
            f'{options.image_size}'
        )
    if options.seed < 0:
        raise ValueError(f'seed must not be negative, got {options.seed}')
    least, most = options.digits
    if not 1 <= least <= most:
        raise ValueError(
            f'digits must be MIN MAX with 1 <= MIN <= MAX, got {least} {most}'
        )
    if LAYOUTS[options.layout].one_digit and most != 1:
        raise ValueError(
            f'digits must be 1 1 with layout {options.layout}, got {least} '
            f'{most}'
        )
    low, high = options.scale
    # Written so that a NaN fails the comparison.
    if not (MIN_DIGIT_SIZE <= low * options.image_size and low <= high <= 1):
        raise ValueError(
            'scale must be MIN MAX with MIN <= MAX <= 1 and MIN at least '
            f'{MIN_DIGIT_SIZE} pixels of the image, got {low} {high} at '
            f'image_size {options.image_size}'
        )
    # Files of an earlier, larger set would be taken for a part of this one.
    out = options.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f'out must be a new or empty folder, got {out}')


def make_dataset(options):
    """Make the whole set.

    Args:
        options (argparse.Namespace): What :func:`parse_args` returns.

    Raises:
        ValueError: If an option is out of range.
    """
    check_options(options)
    labels = load_digits().target
    # The cut stays put when the seed changes, so that a model of one seed is
    # never validated on scans it was trained on under another.
    train_sources, val_sources = train_test_split(
        np.arange(len(labels)),
        test_size=VAL_FRACTION,
        stratify=labels,
        random_state=0,
    )
    layout = LAYOUTS[options.layout]
    write_split(
        options.out, 'train', options.num_train, train_sources, layout, options
    )
    write_split(
        options.out, 'val', options.num_val, val_sources, layout, options
    )


def parse_args(argv=None):
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to None, for those of
            the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('out', type=Path, help='new or empty output folder')
    parser.add_argument(
        '--layout',
        choices=tuple(LAYOUTS),
        default='digits',
        help='folder layout and categories (default: %(default)s)',
    )
    numbers = {
        'num_train': 'training images',
        'num_val': 'validation images',
        'image_size': 'side of the square images, in pixels',
    }
    for name, text in numbers.items():
        parser.add_argument(
            '--' + name.replace('_', '-'),
            type=int,
            help=f'{text} ({describe_default(name)})',
        )
    parser.add_argument(
        '--digits',
        type=int,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help=f'digits in an image ({describe_default("digits")})',
    )
    parser.add_argument(
        '--scale',
        type=float,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='side of a digit as a share of the image '
        f'({describe_default("scale")})',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='random seed (default: 0)'
    )
    options = parser.parse_args(argv)
    for name, value in LAYOUTS[options.layout].defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def describe_default(option):
    """Describe the default of an option in each layout.

    Args:
        option (str): Name of the option.

    Returns:
        str: For the help text.
    """
    shown = ', '.join(
        f'{layout.defaults[option]} for {name}'
        for name, layout in LAYOUTS.items()
    )
    return f'default: {shown}'


def main():
    """Make the set of the command line."""
    make_dataset(parse_args())


if __name__ == '__main__':
    main()
