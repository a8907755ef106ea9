"""Tiny sets of images of handwritten digits."""

from .tools import load_tool


def make_digits(folder, num_train=16, num_val=4, image_size=64, layout=None):
    """Make a set.

    Args:
        folder (Path): Where to; new or empty.
        num_train (int, optional): Images to train on. Defaults to 16.
        num_val (int, optional): Images to evaluate on. Defaults to 4.
        image_size (int, optional): Side of an image, in pixels. Defaults to
            64.
        layout (str, optional): Of the folder. Defaults to the tool's default.
    """
    converter = load_tool('dataset_converters/digits.py')
    options = [str(folder), '--image-size', str(image_size)]
    options += ['--num-train', str(num_train), '--num-val', str(num_val)]
    if layout is not None:
        options += ['--layout', layout]
    converter.make_dataset(converter.parse_args(options))
