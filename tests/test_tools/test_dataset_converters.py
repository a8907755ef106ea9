import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tools import ROOT, load_tool
from support.torchvision_stub import need_mmpretrain

pytest.importorskip('pycocotools')
pytest.importorskip('sklearn')

from pycocotools.coco import COCO  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

digits = load_tool('dataset_converters/digits.py')
bccd = load_tool('dataset_converters/bccd.py')
cifar10 = load_tool('dataset_converters/cifar10.py')


# -- digits -----------------------------------------------------------------


def make_digits(out, *extra, num_train=12, num_val=6, image_size=96):
    options = digits.parse_args(
        [
            str(out),
            *('--num-train', str(num_train)),
            *('--num-val', str(num_val)),
            *('--image-size', str(image_size)),
            *extra,
        ]
    )
    digits.make_dataset(options)
    return out


def file_bytes(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope='module')
def digits_root(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp('digits'))


@pytest.fixture(scope='module')
def coco_root(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    return make_digits(root, '--layout', 'coco')


def test_digits_same_options_give_same_bytes(digits_root, tmp_path):
    again = make_digits(tmp_path / 'again')
    other = make_digits(tmp_path / 'other', '--seed', '1')

    assert file_bytes(again) == file_bytes(digits_root)
    image = 'train/000000000001.png'
    assert file_bytes(other)[image] != file_bytes(again)[image]


def test_digits_larger_set_begins_with_the_smaller_one(digits_root, tmp_path):
    small = file_bytes(make_digits(tmp_path / 'small', num_train=3))
    large = file_bytes(digits_root)
    images = [name for name in small if name.endswith('.png')]
    assert images
    assert all(small[name] == large[name] for name in images)


def test_digits_images_and_labels_are_real_scans(digits_root):
    targets = load_digits().target
    for split, count in (('train', 12), ('val', 6)):
        data = read_json(digits_root / 'annotations' / f'{split}.json')
        assert len(data['images']) == count
        names = {item['id']: item['name'] for item in data['categories']}
        assert sorted(names.values()) == [str(digit) for digit in range(10)]
        for item in data['annotations']:
            assert names[item['category_id']] == str(targets[item['source']])


def test_digits_train_and_val_use_different_scans(tmp_path):
    root = make_digits(
        tmp_path / 'crowded',
        *('--digits', '30', '30', '--scale', '0.08', '0.1'),
        num_train=30,
        num_val=15,
        image_size=100,
    )
    sources = {
        split: {
            item['source']
            for item in read_json(root / 'annotations' / f'{split}.json')[
                'annotations'
            ]
        }
        for split in ('train', 'val')
    }
    # Enough of the 1797 that an overlap could not be missed by chance.
    assert len(sources['train']) > 500
    assert len(sources['val']) > 200
    assert not sources['train'] & sources['val']


@pytest.mark.parametrize('split', ['train', 'val'])
def test_digits_boxes_and_seg_maps_fit_the_masks(digits_root, split):
    coco = COCO(digits_root / 'annotations' / f'{split}.json')
    assert coco.getAnnIds()
    for image_id in coco.getImgIds():
        info = coco.loadImgs([image_id])[0]
        image = Image.open(digits_root / split / info['file_name'])
        assert image.mode == 'RGB'
        assert image.size == (info['width'], info['height']) == (96, 96)

        expected = np.zeros((96, 96), np.uint8)
        for item in coco.loadAnns(coco.getAnnIds([image_id])):
            mask = coco.annToMask(item).astype(bool)
            rows, columns = np.nonzero(mask)
            box = [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
            assert item['bbox'] == box
            assert item['area'] == mask.sum()
            assert not expected[mask].any(), 'masks must not overlap'
            name = coco.loadCats([item['category_id']])[0]['name']
            expected[mask] = int(name) + 1

        seg_map = Image.open(digits_root / 'seg' / split / info['file_name'])
        np.testing.assert_array_equal(np.asarray(seg_map), expected)


def test_digits_stay_visible_where_they_are_crowded():
    data = load_digits()
    image, placed = digits.make_image(
        data.images,
        data.target,
        np.arange(len(data.target)),
        size=96,
        counts=(40, 40),
        sizes=(16, 40),
        textured=True,
        rng=np.random.default_rng(0),
    )
    assert image.shape == (96, 96, 3)
    assert len(placed) > 5
    shares = [digit.mask.sum() / digit.full_area for digit in placed]
    assert min(shares) >= digits.MIN_VISIBLE
    assert min(shares) < 1, 'too roomy to test anything'


def test_digits_stand_out_from_the_ground():
    rng = np.random.default_rng(0)
    for lightness in (40, 128, 220):
        ground = np.full((8, 8, 3), lightness, np.float32)
        for _ in range(50):
            colour = digits.draw_colour(ground, rng)
            # Clipping of a saturated tint takes some of the contrast.
            assert abs(colour.mean() - lightness) > digits.MIN_CONTRAST - 15


def test_coco_layout_shape(coco_root):
    assert not (coco_root / 'seg').exists()
    assert len(list((coco_root / 'train2017').iterdir())) == 12
    assert len(list((coco_root / 'val2017').iterdir())) == 6
    data = read_json(coco_root / 'annotations/instances_val2017.json')
    ids = {item['name']: item['id'] for item in data['categories']}
    assert len(ids) == 80
    # Spot checks around the gaps of COCO's numbering.
    assert ids['person'] == 1
    assert ids['fire hydrant'] == 11
    assert ids['stop sign'] == 13
    assert ids['bed'] == 65
    assert ids['toilet'] == 70
    assert ids['toothbrush'] == 90


def test_coco_layout_loads_as_stock_coco_dataset(coco_root):
    datasets = pytest.importorskip('mmdet.datasets')
    targets = load_digits().target
    for split, count in (('train', 12), ('val', 6)):
        ann_file = f'annotations/instances_{split}2017.json'
        dataset = datasets.CocoDataset(
            data_root=str(coco_root),
            ann_file=ann_file,
            data_prefix=dict(img=f'{split}2017/'),
        )
        assert len(dataset) == count
        items = read_json(coco_root / ann_file)['annotations']
        for index in range(count):
            info = dataset.get_data_info(index)
            assert Path(info['img_path']).is_file()
            labels = [one['bbox_label'] for one in info['instances']]
            assert labels == [
                targets[item['source']]
                for item in items
                if item['image_id'] == info['img_id']
            ]
            assert all(one['mask'] for one in info['instances'])


def test_digits_config_loads_the_digits(digits_root):
    datasets = pytest.importorskip('mmdet.datasets')
    config_module = pytest.importorskip('mmengine.config')
    config = config_module.Config.fromfile(
        ROOT / 'configs/_base_/datasets/digits_detection.py'
    )
    settings = config.val_dataloader.dataset.to_dict()
    settings.update(data_root=str(digits_root), pipeline=[])
    settings.pop('type')
    dataset = datasets.CocoDataset(**settings)
    # cat_ids is empty for class names that the json file does not know.
    assert dataset.cat_ids == list(range(1, 11))
    assert len(dataset) == 6


def test_digits_by_class(tmp_path):
    """One large digit an image, in the folder of its class."""
    options = ['--layout', 'classes']
    root = make_digits(tmp_path / 'a', *options, image_size=32)
    images = {
        split: sorted(path.relative_to(root) for path in root.glob(pattern))
        for split, pattern in (('train', 'train/*/*'), ('val', 'val/*/*'))
    }
    assert [len(images[split]) for split in ('train', 'val')] == [12, 6]
    assert sorted(file_bytes(root)) == sorted(
        str(path) for paths in images.values() for path in paths
    )
    # Folders are named by what the images show.
    data = load_digits()
    scans = np.stack([cut_out(scan > 6) for scan in data.images])
    right = 0
    for path in (*images['train'], *images['val']):
        pixels = np.asarray(Image.open(root / path)).astype(int)
        ground = np.median(pixels, axis=(0, 1))
        ink = cut_out(np.abs(pixels - ground).max(-1) > 40)
        nearest = np.abs(scans - ink).sum((1, 2)).argmin()
        right += int(path.parent.name) == data.target[nearest]
    assert right >= 16


def cut_out(mask):
    """The part of a mask that is set, 8x8 pixels."""
    rows, columns = np.nonzero(mask)
    part = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    image = Image.fromarray(part.astype(np.float32))
    return np.asarray(image.resize((8, 8), Image.BILINEAR))


def test_digits_by_class_need_one_digit(tmp_path):
    with pytest.raises(ValueError, match='must be 1 1 with layout classes'):
        make_digits(tmp_path, '--layout', 'classes', '--digits', '1', '2')


@pytest.mark.parametrize(
    ('extra', 'message'),
    [
        (['--num-train', '0'], 'num_train must be at least 1, got 0'),
        (['--num-val', '-1'], 'num_val must be at least 1, got -1'),
        (['--image-size', '8'], 'image_size must be at least 16 pixels'),
        (['--digits', '3', '2'], 'digits must be MIN MAX .* got 3 2'),
        (['--digits', '0', '2'], 'digits must be MIN MAX .* got 0 2'),
        (['--scale', '0.5', '0.4'], r'scale must be .* got 0\.5 0\.4'),
        (['--scale', '0.5', '1.1'], r'scale must be .* got 0\.5 1\.1'),
        (['--scale', '0.01', '0.4'], r'scale must be .* got 0\.01 0\.4'),
        (['--scale', 'nan', '0.4'], 'scale must be .* got nan'),
        (['--seed', '-1'], 'seed must not be negative, got -1'),
    ],
)
def test_digits_bad_options(tmp_path, extra, message):
    options = digits.parse_args([str(tmp_path / 'out'), *extra])
    with pytest.raises(ValueError, match=message):
        digits.make_dataset(options)
    assert not (tmp_path / 'out').exists()


def test_digits_refuses_a_used_folder(digits_root):
    with pytest.raises(ValueError, match='new or empty folder'):
        make_digits(digits_root)


# -- BCCD -------------------------------------------------------------------

VOC_XML = '<annotation><filename>x</filename>{objects}</annotation>'
VOC_OBJECT = (
    '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>'
    '<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>'
)
VOC_CONTENT = {
    'train': {
        'a': [('RBC', 1, 2, 31, 42), ('WBC', 10, 10, 90, 70)],
        # Reaches over the right and lower edges of the 64x48 image.
        'b': [('Platelets', 50, 40, 70, 50)],
    },
    'val': {'c': [('RBC', 5, 5, 5, 9), ('RBC', 5, 5, 20, 20)]},
    'test': {'d': []},
}


@pytest.fixture
def voc_root(tmp_path):
    root = tmp_path / 'voc'
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    for split, content in VOC_CONTENT.items():
        lines = ''.join(f'{stem}\n' for stem in content)
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text(lines)
        for stem, objects in content.items():
            write_voc_objects(root, stem, objects)
            size = (100, 80) if stem == 'a' else (64, 48)
            Image.new('RGB', size).save(root / 'JPEGImages' / f'{stem}.jpg')
    return root


def write_voc_objects(root, stem, objects):
    text = ''.join(VOC_OBJECT.format(*item) for item in objects)
    xml_file = root / 'Annotations' / f'{stem}.xml'
    xml_file.write_text(VOC_XML.format(objects=text))


def test_bccd_voc_form(voc_root, tmp_path, capsys):
    out = tmp_path / 'out'
    bccd.convert(voc_root, out)

    train = COCO(out / 'annotations/train.json')
    assert [item['name'] for item in train.loadCats([1, 2, 3])] == [
        'RBC',
        'WBC',
        'Platelets',
    ]
    found = {
        info['file_name']: [
            (item['category_id'], item['bbox'], item['area'])
            for item in train.loadAnns(train.getAnnIds([info['id']]))
        ]
        for info in train.loadImgs(train.getImgIds())
    }
    assert found == {
        'a.jpg': [(1, [1, 2, 30, 40], 1200), (2, [10, 10, 80, 60], 4800)],
        'b.jpg': [(3, [50, 40, 14, 8], 112)],
    }
    sizes = [
        (info['width'], info['height'])
        for info in train.loadImgs(train.getImgIds())
    ]
    assert sizes == [(100, 80), (64, 48)]
    for stem in 'abcd':
        source = voc_root / 'JPEGImages' / f'{stem}.jpg'
        copy = out / 'images' / f'{stem}.jpg'
        assert copy.read_bytes() == source.read_bytes()
    assert read_json(out / 'annotations/test.json')['annotations'] == []

    # The box without width is gone, and said to be.
    val = read_json(out / 'annotations/val.json')
    assert [item['bbox'] for item in val['annotations']] == [[5, 5, 15, 15]]
    captured = capsys.readouterr()
    assert 'val: 1 images, 1 boxes, 1 skipped' in captured.out
    assert 'degenerate box in c.jpg: RBC' in captured.err


def test_bccd_coco_form_comes_out_as_it_went_in(voc_root, tmp_path):
    bccd.convert(voc_root, tmp_path / 'once')
    bccd.convert(tmp_path / 'once', tmp_path / 'twice')
    once = file_bytes(tmp_path / 'once')
    assert len(once) == 7
    assert file_bytes(tmp_path / 'twice') == once


def test_bccd_coco_form_renumbers_categories(voc_root, tmp_path):
    bccd.convert(voc_root, tmp_path / 'once')
    ann_file = tmp_path / 'once/annotations/train.json'
    data = read_json(ann_file)
    for item in data['categories']:
        item['id'] += 6
    for item in data['annotations']:
        item['category_id'] += 6
    ann_file.write_text(json.dumps(data))

    bccd.convert(tmp_path / 'once', tmp_path / 'twice')
    data = read_json(tmp_path / 'twice/annotations/train.json')
    assert [item['category_id'] for item in data['annotations']] == [1, 2, 3]
    assert [item['id'] for item in data['categories']] == [1, 2, 3]


@pytest.mark.parametrize(
    'missing',
    ['JPEGImages/b.jpg', 'Annotations/c.xml', 'ImageSets/Main/test.txt'],
)
def test_bccd_missing_voc_file(voc_root, tmp_path, missing):
    (voc_root / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f'{missing} is missing'):
        bccd.convert(voc_root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_bccd_missing_coco_image(voc_root, tmp_path):
    bccd.convert(voc_root, tmp_path / 'once')
    (tmp_path / 'once/images/d.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'd\.jpg is missing'):
        bccd.convert(tmp_path / 'once', tmp_path / 'twice')


def test_bccd_unknown_input_form(tmp_path):
    with pytest.raises(FileNotFoundError, match='neither ImageSets/Main/'):
        bccd.convert(tmp_path, tmp_path / 'out')


def test_bccd_unknown_class(voc_root, tmp_path):
    write_voc_objects(voc_root, 'd', [('Lymphocyte', 1, 1, 9, 9)])
    message = "d.jpg: class must be one of RBC, WBC, .* got 'Lymphocyte'"
    with pytest.raises(ValueError, match=message):
        bccd.convert(voc_root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('<annotation><object>', r'd\.xml is not valid XML'),
        (VOC_XML.format(objects='<object/>'), r'd\.xml: object .* numbers'),
    ],
    ids=['broken', 'no_box'],
)
def test_bccd_bad_xml(voc_root, tmp_path, text, message):
    (voc_root / 'Annotations/d.xml').write_text(text)
    with pytest.raises(ValueError, match=message):
        bccd.convert(voc_root, tmp_path / 'out')


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('category_id', 9, 'not a COCO annotation file: KeyError'),
        ('image_id', 9, 'not a COCO annotation file: KeyError'),
        ('bbox', [1, 2, 3], 'must have four numbers'),
    ],
)
def test_bccd_bad_coco_annotation(voc_root, tmp_path, key, value, message):
    bccd.convert(voc_root, tmp_path / 'once')
    ann_file = tmp_path / 'once/annotations/train.json'
    data = read_json(ann_file)
    data['annotations'][0][key] = value
    ann_file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        bccd.convert(tmp_path / 'once', tmp_path / 'twice')


def test_bccd_image_in_two_splits(voc_root, tmp_path):
    with open(voc_root / 'ImageSets/Main/val.txt', 'a') as file:
        file.write('a\n')
    message = r'a\.jpg is listed in train and again in val'
    with pytest.raises(ValueError, match=message):
        bccd.convert(voc_root, tmp_path / 'out')


def test_bccd_does_not_write_into_its_input(voc_root):
    with pytest.raises(ValueError, match='out must not be the input'):
        bccd.convert(voc_root, voc_root)


# -- CIFAR-10 ---------------------------------------------------------------


def cifar_samples(split):
    """Images of noise, and their labels."""
    rng = np.random.default_rng(len(split))
    count = {'train': 20, 'test': 6}[split]
    shape = (count, 32, 32, 3)
    return rng.integers(256, size=shape, dtype=np.uint8), np.arange(count) % 10


@pytest.fixture
def sheets(tmp_path):
    """Two sheets of two rows of five, and one of two rows of three."""
    root = tmp_path / 'sheets'
    root.mkdir()
    for split, count in (('train', 2), ('test', 1)):
        images, labels = cifar_samples(split)
        for number, part in enumerate(np.split(images, count)):
            rows = [np.hstack(row) for row in np.split(part, 2)]
            sheet = Image.fromarray(np.vstack(rows))
            sheet.save(root / f'{split}_{number:02}.png')
        np.savetxt(root / f'{split}_labels.txt', labels, '%d')
    return root


@pytest.fixture
def batches(tmp_path):
    root = tmp_path / 'cifar-10-batches-py'
    root.mkdir()
    for split, names in cifar10.BATCHES.items():
        images, labels = cifar_samples(split)
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        for name, rows, part in zip(
            names,
            np.array_split(planes, len(names)),
            np.array_split(labels, len(names)),
        ):
            content = {'data': rows, 'labels': part.tolist()}
            (root / name).write_bytes(pickle.dumps(content))
    return root


@pytest.mark.parametrize('form', ['sheets', 'batches'])
def test_cifar10_loads_as_its_recipe_says(form, request, tmp_path):
    root, out = request.getfixturevalue(form), tmp_path / 'out'
    cifar10.convert(root, out)
    assert sorted(path.name for path in out.iterdir()) == [
        'test.pkl',
        'train.pkl',
    ]
    need_mmpretrain()
    from mmengine.config import Config
    from mmpretrain.datasets import CIFAR10, BaseDataset

    config = Config.fromfile(ROOT / 'configs/actnn/resnet18_cifar10.py')
    for split, loader in (
        ('train', config.train_dataloader),
        ('test', config.val_dataloader),
    ):
        settings = loader.dataset.to_dict()
        assert settings.pop('type') == 'BaseDataset'
        settings.update(data_root=str(out), pipeline=[])
        dataset = BaseDataset(**settings)
        images, labels = cifar_samples(split)
        found = [dataset[index] for index in range(len(dataset))]
        np.testing.assert_array_equal([one['img'] for one in found], images)
        assert [one['gt_label'] for one in found] == list(labels)
        assert dataset.CLASSES == CIFAR10.METAINFO['classes']


def test_cifar10_images_of_jpg_sheets_do_not_mix(sheets, tmp_path):
    colours = np.linspace(0, 255, 10).astype(np.uint8)
    sheet = np.kron(colours.reshape(2, 5), np.ones((32, 32), np.uint8))
    Image.fromarray(sheet).save(sheets / 'train_01.jpg')
    (sheets / 'train_01.png').unlink()
    images, _ = cifar10.read_sheets(sheets, 'train')
    means = images[10:].astype(int).mean((1, 2, 3))
    np.testing.assert_allclose(means, colours, atol=2)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('1 2', 'got 2 labels for 6 images'),
        ('1 2 3 4 5 10', 'labels must be 0 to 9, got 10'),
        ('1 2 3 4 5 x', "test_labels.txt: .* 'x'"),
    ],
)
def test_cifar10_bad_labels(sheets, tmp_path, text, message):
    (sheets / 'test_labels.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
        cifar10.convert(sheets, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_cifar10_bad_sheet(sheets, tmp_path):
    Image.new('RGB', (64, 40)).save(sheets / 'test_00.png')
    with pytest.raises(ValueError, match='multiples of 32, got 64x40'):
        cifar10.convert(sheets, tmp_path / 'out')


@pytest.mark.parametrize('content', [b'', pickle.dumps([1]), pickle.dumps({})])
def test_cifar10_bad_batch(batches, tmp_path, content):
    (batches / 'test_batch').write_bytes(content)
    with pytest.raises(ValueError, match='test_batch is not a batch of CIFAR'):
        cifar10.convert(batches, tmp_path / 'out')


def test_cifar10_missing_files(sheets, batches, tmp_path):
    with pytest.raises(FileNotFoundError, match='has neither data_batch_1'):
        cifar10.convert(tmp_path, tmp_path / 'out')
    (batches / 'test_batch').unlink()
    with pytest.raises(FileNotFoundError, match='test_batch is missing'):
        cifar10.convert(batches, tmp_path / 'out')
    (sheets / 'test_00.png').unlink()
    with pytest.raises(FileNotFoundError, match='needs test_.*jpg'):
        cifar10.convert(sheets, tmp_path / 'out')
