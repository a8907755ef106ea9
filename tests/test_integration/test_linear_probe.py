"""Recipes that go on from what another one has trained."""

import json
import pickle
from pathlib import Path

import torch
from support.small_recipe import CONFIGS, make_data
from support.tools import load_tool
from support.torchvision_stub import make_torchvision_importable


def test_linear_probe_of_a_pretrained_backbone(tmp_path, monkeypatch):
    """Pretrain, probe and test, through the tools."""
    make_torchvision_importable()
    monkeypatch.chdir(tmp_path)
    make_data('mmpretrain', Path('data/digits_classes'))

    def train_recipe(name, *options):
        load_tool('train.py').main(
            [
                str(CONFIGS / f'{name}.py'),
                *('--work-dir', name, '--cfg-options'),
                *('train_cfg.max_epochs=1', 'train_dataloader.batch_size=2'),
                *('train_dataloader.num_workers=0', 'log_level=ERROR'),
                *options,
            ]
        )
        path = f'{name}/epoch_1.pth'
        return path, torch.load(path, weights_only=False)['state_dict']

    pretrained, encoder = train_recipe(
        'mocov2_r18_digits',
        'train_dataloader.persistent_workers=False',
        'model.queue_len=16',
    )
    probed, classifier = train_recipe(
        'linear_probe_r18_digits',
        f'model.backbone.init_cfg.checkpoint={pretrained}',
    )
    frozen = [key for key in classifier if key.startswith('backbone.')]
    assert frozen
    assert all(torch.equal(classifier[key], encoder[key]) for key in frozen)

    load_tool('test.py').main(
        [
            str(CONFIGS / 'linear_probe_r18_digits.py'),
            *(probed, '--work-dir', 'tested', '--out', 'predictions.pkl'),
        ]
    )
    with open('predictions.pkl', 'rb') as file:
        assert len(pickle.load(file)) == 2
    (scalars,) = Path('tested').glob('*/*.json')
    assert 0 <= json.loads(scalars.read_text())['accuracy/top1'] <= 100
