"""Convert CIFAR-10 for our configs.

Two forms of the input are known by their files:

* the published one for Python: ``data_batch_1`` to ``data_batch_5`` and
  ``test_batch``, in the folder ``cifar-10-batches-py``;
* sheets: ``{train,test}_*.jpg`` (or ``*.png``), each with many images side by
  side, row by row, and ``{train,test}_labels.txt`` with a label a line. The
  sheets are read in the order of their names.

Either way the result is::

    OUT/train.pkl    annotations in the format of OpenMMLab 2.0, each with its
    OUT/test.pkl     image: RGB, 32x32

MMPretrain's ``BaseDataset`` loads it; a sample is what ``CIFAR10`` would make
of it, which only reads files with the checksums of the published ones.

Example:
    python tools/dataset_converters/cifar10.py cifar-10-batches-py data/cifar10
"""

import argparse
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
    'ship', 'truck',
)  # fmt: skip
BATCHES = {
    'train': [f'data_batch_{number}' for number in range(1, 6)],
    'test': ['test_batch'],
}
SIZE = 32
SUFFIXES = ('.jpg', '.png')
# What a file raises that is no pickle, or a pickle of something else.
_MALFORMED = (
    AttributeError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def read_batches(root, split):
    """Read a split of the published form.

    Args:
        root (Path): Folder with the batches, which are pickles: it has to
            come from a source that is trusted.
        split (str): ``'train'`` or ``'test'``.

    Returns:
        tuple[ndarray, list[int]]: Images ``(N, 32, 32, 3)``, and their
        labels.

    Raises:
        FileNotFoundError: If a batch is missing.
        ValueError: If a file is not a batch of the set.
    """
    images, labels = [], []
    for name in BATCHES[split]:
        path = root / name
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing')
        try:
            batch = pickle.loads(path.read_bytes(), encoding='latin1')
            images.append(batch['data'].reshape(-1, 3, SIZE, SIZE))
            labels += batch['labels']
        except _MALFORMED as error:
            raise ValueError(
                f'{path} is not a batch of CIFAR-10: {error!r}'
            ) from error
    return np.concatenate(images).transpose(0, 2, 3, 1), labels


def read_sheets(root, split):
    """Read a split of the form of sheets.

    Args:
        root (Path): Folder with sheets and labels.
        split (str): ``'train'`` or ``'test'``.

    Returns:
        tuple[ndarray, list[int]]: Images ``(N, 32, 32, 3)``, and their
        labels.

    Raises:
        FileNotFoundError: If there are no sheets or labels.
        ValueError: If a sheet does not consist of images of 32x32, or a label
            is not an integer.
    """
    label_file = root / f'{split}_labels.txt'
    sheets = [p for p in root.glob(f'{split}_*') if p.suffix in SUFFIXES]
    if not sheets or not label_file.is_file():
        raise FileNotFoundError(
            f'{root} needs {split}_*.jpg or {split}_*.png, and '
            f'{split}_labels.txt'
        )
    try:
        labels = [int(line) for line in label_file.read_text().split()]
    except ValueError as error:
        raise ValueError(f'{label_file}: {error}') from error
    return np.concatenate([cut_sheet(path) for path in sorted(sheets)]), labels


def cut_sheet(path):
    """Cut a sheet into its images, row by row.

    Args:
        path (Path): The sheet.

    Returns:
        ndarray: ``(N, 32, 32, 3)``, RGB.

    Raises:
        ValueError: If a side of the sheet is not a multiple of 32.
    """
    with Image.open(path) as image:
        sheet = np.asarray(image.convert('RGB'))
    height, width, _ = sheet.shape
    if height % SIZE or width % SIZE:
        raise ValueError(
            f'{path}: sides must be multiples of {SIZE}, got {width}x{height}'
        )
    rows = sheet.reshape(-1, SIZE, width // SIZE, SIZE, 3)
    return rows.swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)


def find_reader(root):
    """Choose the reader by the content of the input folder.

    Args:
        root (Path): The input folder.

    Returns:
        Callable: :func:`read_batches` or :func:`read_sheets`.

    Raises:
        FileNotFoundError: If the folder has neither form.
    """
    if (root / BATCHES['train'][0]).is_file():
        return read_batches
    if (root / 'train_labels.txt').is_file():
        return read_sheets
    raise FileNotFoundError(
        f'{root} has neither {BATCHES["train"][0]} (published form) nor '
        'train_labels.txt (sheets)'
    )


def to_annotations(images, labels):
    """Describe images as OpenMMLab 2.0 does.

    Args:
        images (ndarray): ``(N, 32, 32, 3)``, RGB.
        labels (list[int]): Their labels.

    Returns:
        dict: The annotations, with the images in them.

    Raises:
        ValueError: If there are more or fewer labels than images, or a label
            is not that of a class.
    """
    if len(images) != len(labels):
        raise ValueError(
            f'there must be a label for each image, got {len(labels)} labels '
            f'for {len(images)} images'
        )
    unknown = set(labels) - set(range(len(CLASSES)))
    if unknown:
        raise ValueError(
            f'labels must be 0 to {len(CLASSES) - 1}, got {min(unknown)}'
        )
    data_list = [
        # Copies, so that each image is contiguous.
        {'img': image.copy(), 'gt_label': label}
        for image, label in zip(images, labels)
    ]
    return {'metainfo': {'classes': CLASSES}, 'data_list': data_list}


def convert(root, out):
    """Convert the whole set.

    Everything is read and checked before anything is written.

    Args:
        root (Path): Input folder, published form or sheets.
        out (Path): Output folder; files of the same name are replaced.

    Raises:
        FileNotFoundError: If a file of the set is missing.
        ValueError: If the set is not CIFAR-10 or contradicts itself.
    """
    reader = find_reader(root)
    converted = {
        split: to_annotations(*reader(root, split)) for split in BATCHES
    }
    out.mkdir(parents=True, exist_ok=True)
    for split, annotations in converted.items():
        with open(out / f'{split}.pkl', 'wb') as file:
            pickle.dump(annotations, file, pickle.HIGHEST_PROTOCOL)
        print(f'{split}: {len(annotations["data_list"])} images')


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
    parser.add_argument('root', type=Path, help='input folder')
    parser.add_argument('out', type=Path, help='output folder')
    return parser.parse_args(argv)


def main():
    """Convert the set of the command line."""
    args = parse_args()
    convert(args.root, args.out)


if __name__ == '__main__':
    main()
