"""Convert BCCD, microscope images of blood cells, for our configs.

Two forms of the input are known by their files:

* VOC, as the data set is published: ``JPEGImages/*.jpg``,
  ``Annotations/*.xml`` and ``ImageSets/Main/{train,val,test}.txt``;
* COCO: ``images/*.jpg`` and ``annotations/{train,val,test}.json``.

Either way the result is::

    OUT/images/*.jpg
    OUT/annotations/{train,val,test}.json    RBC = 1, WBC = 2, Platelets = 3

Boxes are clipped to their image; boxes with less than a pixel of width or
height are skipped and reported.

Example:
    python tools/dataset_converters/bccd.py BCCD_Dataset/BCCD data/bccd
"""

import argparse
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SPLITS = ('train', 'val', 'test')
CATEGORY_IDS = {'RBC': 1, 'WBC': 2, 'Platelets': 3}


@dataclass(frozen=True)
class Record:
    """An image and its objects.

    Args:
        path (Path): The image file.
        objects (list[tuple[str, list[float]]]): Class name and box
            ``[x, y, width, height]`` in pixels of each object.
    """

    path: Path
    objects: list


def require_file(path, needed_by):
    """Return a path if it is a file.

    Args:
        path (Path): The path.
        needed_by (Path): File that refers to it, for the message.

    Returns:
        Path: ``path``.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; {needed_by} needs it')
    return path


def read_voc_objects(xml_file):
    """Read the objects of a VOC annotation file.

    Args:
        xml_file (Path): The file.

    Returns:
        list[tuple[str, list[float]]]: Class name and box
        ``[x, y, width, height]`` in pixels of each object.

    Raises:
        ValueError: If an object lacks its name or a coordinate, or the file
            is not XML.
    """
    try:
        root = ET.parse(xml_file).getroot()
    except ET.ParseError as error:
        raise ValueError(f'{xml_file} is not valid XML: {error}') from error
    objects = []
    for node in root.iter('object'):
        name = (node.findtext('name') or '').strip()
        try:
            left, top, right, bottom = (
                float(node.findtext(f'bndbox/{key}', ''))
                for key in ('xmin', 'ymin', 'xmax', 'ymax')
            )
        except ValueError as error:
            raise ValueError(
                f'{xml_file}: object {name!r} needs numbers as bndbox/xmin, '
                'ymin, xmax and ymax'
            ) from error
        # The tool that made these files writes the edges of the box, not
        # VOC's first and last pixel counted from one, so nothing is shifted.
        objects.append((name, [left, top, right - left, bottom - top]))
    return objects


def read_voc(root, split):
    """Read a split of the published VOC form.

    Args:
        root (Path): Folder with ``JPEGImages``, ``Annotations`` and
            ``ImageSets``.
        split (str): ``'train'``, ``'val'`` or ``'test'``.

    Returns:
        list[Record]: The images in the order of the split's list.

    Raises:
        FileNotFoundError: If a listed file is missing.
        ValueError: If an annotation file cannot be understood.
    """
    list_file = require_file(
        root / 'ImageSets' / 'Main' / f'{split}.txt', root
    )
    records = []
    for stem in list_file.read_text().split():
        image = require_file(root / 'JPEGImages' / f'{stem}.jpg', list_file)
        xml_file = require_file(
            root / 'Annotations' / f'{stem}.xml', list_file
        )
        records.append(Record(image, read_voc_objects(xml_file)))
    return records


def read_coco(root, split):
    """Read a split of the COCO form.

    Args:
        root (Path): Folder with ``images`` and ``annotations``.
        split (str): ``'train'``, ``'val'`` or ``'test'``.

    Returns:
        list[Record]: The images in the order of the json file.

    Raises:
        FileNotFoundError: If the json file or an image of it is missing.
        ValueError: If the json file is not COCO's, or refers to an image or
            category that it does not define.
    """
    ann_file = require_file(root / 'annotations' / f'{split}.json', root)
    try:
        data = json.loads(ann_file.read_text())
        names = {item['id']: item['name'] for item in data['categories']}
        records = {
            item['id']: Record(
                require_file(root / 'images' / item['file_name'], ann_file),
                [],
            )
            for item in data['images']
        }
        for item in data['annotations']:
            name = names[item['category_id']]
            records[item['image_id']].objects.append((name, item['bbox']))
    except json.JSONDecodeError as error:
        raise ValueError(f'{ann_file} is not valid JSON: {error}') from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{ann_file} is not a COCO annotation file: {error!r} is missing '
            'or of a wrong type'
        ) from error
    return list(records.values())


def find_reader(root):
    """Choose the reader by the content of the input folder.

    Args:
        root (Path): The input folder.

    Returns:
        Callable: :func:`read_voc` or :func:`read_coco`.

    Raises:
        FileNotFoundError: If the folder has neither form.
    """
    if (root / 'ImageSets' / 'Main').is_dir():
        return read_voc
    if (root / 'annotations' / f'{SPLITS[0]}.json').is_file():
        return read_coco
    raise FileNotFoundError(
        f'{root} has neither ImageSets/Main/ (VOC form) nor '
        f'annotations/{SPLITS[0]}.json (COCO form)'
    )


def clip_box(box, width, height):
    """Clip a box to its image.

    Args:
        box (list[float]): ``[x, y, width, height]`` in pixels.
        width (int): Width of the image, in pixels.
        height (int): Height of the image, in pixels.

    Returns:
        list[float] or None: The clipped box; None if less than a pixel of
        its width or height is left, or a coordinate is not a finite number.
    """
    left, top = max(box[0], 0), max(box[1], 0)
    right = min(box[0] + box[2], width)
    bottom = min(box[1] + box[3], height)
    # Written so that a NaN fails the comparison.
    if not (right - left >= 1 and bottom - top >= 1):
        return None
    return [left, top, right - left, bottom - top]


def to_coco(records):
    """Describe images as COCO does.

    Args:
        records (list[Record]): The images.

    Returns:
        tuple[dict, list[str]]: The content of the json file, and a line for
        each object that was skipped.

    Raises:
        ValueError: If a class name is none of BCCD's, or a box has not four
            numbers.
    """
    images, annotations, skipped = [], [], []
    for image_id, record in enumerate(records):
        with Image.open(record.path) as image:
            width, height = image.size
        images.append(
            {
                'id': image_id,
                'file_name': record.path.name,
                'width': width,
                'height': height,
            }
        )
        for name, box in record.objects:
            if name not in CATEGORY_IDS:
                raise ValueError(
                    f'{record.path.name}: class must be one of '
                    f'{", ".join(CATEGORY_IDS)}, got {name!r}'
                )
            if len(box) != 4:
                raise ValueError(
                    f'{record.path.name}: a box must have four numbers, got '
                    f'{box}'
                )
            clipped = clip_box(box, width, height)
            if clipped is None:
                skipped.append(f'{record.path.name}: {name} {box}')
                continue
            annotations.append(
                {
                    'id': len(annotations),
                    'image_id': image_id,
                    'category_id': CATEGORY_IDS[name],
                    'bbox': clipped,
                    'area': clipped[2] * clipped[3],
                    'iscrowd': 0,
                }
            )
    categories = [
        {'id': category_id, 'name': name}
        for name, category_id in CATEGORY_IDS.items()
    ]
    data = {
        'images': images,
        'annotations': annotations,
        'categories': categories,
    }
    return data, skipped


def check_splits_disjoint(splits):
    """Refuse splits that share an image.

    Args:
        splits (dict[str, list[Record]]): The images of each split.

    Raises:
        ValueError: If an image is listed twice, in one split or in two.
    """
    split_of = {}
    for split, records in splits.items():
        for record in records:
            name = record.path.name
            if name in split_of:
                raise ValueError(
                    f'{name} is listed in {split_of[name]} and again in '
                    f'{split}; an image must be in one split, once'
                )
            split_of[name] = split


def convert(root, out):
    """Convert the whole set.

    Everything is read and checked before anything is written.

    Args:
        root (Path): Input folder, VOC or COCO form.
        out (Path): Output folder; files of the same name are replaced.

    Raises:
        FileNotFoundError: If a file of the set is missing.
        ValueError: If the set is not BCCD or contradicts itself, or ``out``
            is ``root``.
    """
    if out.resolve() == root.resolve():
        raise ValueError(f'out must not be the input folder, got {out}')
    reader = find_reader(root)
    splits = {split: reader(root, split) for split in SPLITS}
    check_splits_disjoint(splits)
    converted = {split: to_coco(splits[split]) for split in SPLITS}

    (out / 'images').mkdir(parents=True, exist_ok=True)
    (out / 'annotations').mkdir(exist_ok=True)
    for split, (data, skipped) in converted.items():
        for record in splits[split]:
            shutil.copyfile(record.path, out / 'images' / record.path.name)
        ann_file = out / 'annotations' / f'{split}.json'
        ann_file.write_text(json.dumps(data))
        print(
            f'{split}: {len(data["images"])} images, '
            f'{len(data["annotations"])} boxes, {len(skipped)} skipped'
        )
        for line in skipped:
            print(f'skipped degenerate box in {line}', file=sys.stderr)


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
