"""Tests of tools/analysis_tools/memory_report.py."""

import json
import re

import pytest
from support.tools import load_tool

from mmactnn.codes.units import MIB

memory_report = load_tool('analysis_tools/memory_report.py')

FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
NARROW = (
    'model.backbone.depth=18',
    'model.backbone.base_channels=16',
    'model.backbone.stem_channels=16',
    'model.neck.in_channels=[16,32,64,128]',
    'model.neck.out_channels=32',
    'model.rpn_head.in_channels=32',
    'model.rpn_head.feat_channels=32',
    'model.roi_head.bbox_roi_extractor.out_channels=32',
    'model.roi_head.bbox_head.in_channels=32',
    'model.roi_head.bbox_head.fc_out_channels=32',
)
SMALL = ['--shape', '64', '96', '--cfg-options', *NARROW]

# A model, and a hook that leaves it to the test what is compressed.
CONFIG = """
default_scope = 'mmdet'
custom_imports = dict(imports=['mmactnn', 'tiny'])
model = dict(type='Tiny', num_classes=5, norm_cfg=dict(type='{norm}'))
custom_hooks = [dict(type='ActNNHook', level='L2', exclude={exclude})]
"""
TINY = """
import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModel
from mmengine.registry import MODELS


@MODELS.register_module(force=True)
class Tiny(BaseModel):
    def __init__(self, num_classes, norm_cfg):
        super().__init__()
        self.norm = build_norm_layer(norm_cfg, 3)[1]

    def forward(self, inputs, data_samples, mode):
        return dict(loss=self.norm(inputs)[:].cos().mean())
"""


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """Writes a config of a model with one normalisation."""
    (tmp_path / 'tiny.py').write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**settings):
        path = tmp_path / 'config.py'
        path.write_text(CONFIG.format(**settings))
        return str(path)

    return make


def table(text):
    """Rows of a table; a module that keeps two things has two."""
    rows = (
        [cell.strip() for cell in line.strip('│').split('│')]
        for line in text.splitlines()
    )
    return [row for row in rows if len(row) > 5]


def cells(text):
    """Rows of a table by their first cell."""
    return {name: row for name, *row in table(text)}


def test_one_config(tmp_path, capsys):
    out = tmp_path / 'report.json'
    arguments = [FASTER_RCNN, '--top', '4', '--out', str(out)]
    memory_report.main(arguments + SMALL)
    text = capsys.readouterr().out
    (figures,) = json.loads(out.read_text())
    entries = figures['entries']
    assert figures['level'] == 'L3'
    assert sum(e['kept_bytes'] for e in entries) == figures['kept_bytes']
    assert sum(figures['kept_as'].values()) == figures['kept_bytes']
    # The table: four parts, the others and the total, in that order.
    *shown, others, total = table(text)
    assert [row[0] for row in shown] == [
        entry['module'] or '(model)' for entry in entries[:4]
    ]
    assert others[0] == f'{len(entries) - 4} others'
    assert total[0] == 'total'
    assert total[3:5] == [
        f'{figures[key] / MIB:.2f}' for key in ('exact_bytes', 'kept_bytes')
    ]
    # A functional call by its line and text, a loss by its category.
    (copy,) = (
        e for e in entries if e['note'] == 'roi_feats[inds] = roi_feats_t'
    )
    assert copy['module'] == 'roi_head.bbox_roi_extractor'
    assert copy['category'] == 'left'
    name = 'single_level_roi_extractor'
    assert copy['source'].startswith(f'{name}.py:')
    assert copy['python_module'].endswith(f'.roi_extractors.{name}')
    losses = {e['module'] for e in entries if e['category'] == 'loss'}
    assert losses >= {
        'rpn_head.losses_of_outputs',
        'roi_head.bbox_head.loss_cls',
    }
    assert not any(name.startswith(('backbone', 'neck')) for name in losses)
    assert 'left uncompressed: ' in text


def test_summary(make_config, capsys):
    tiny = make_config(norm='QBN2d', exclude=[])
    memory_report.main([tiny, tiny, '--shape', '32', '32', '--level', 'L3'])
    row = cells(capsys.readouterr().out)['config']
    # The normalisation's input (and statistics), then that of the cosine,
    # which its backward pass needs as it is, then a few bytes of codes.
    full = 2 * 3 * 32 * 32 * 4 / MIB
    exact, kept, ratio, left = map(float, row[1:5])
    assert row[0] == 'L3'
    assert exact == pytest.approx(2 * full, abs=0.01)
    assert left == pytest.approx(full, abs=0.01)
    assert left <= kept < exact
    assert row[5] == '50.0%' and row[7] == '0.00'
    assert row[8].startswith('tiny.py:')


def test_code_is_printed_as_it_is(make_config, capsys):
    config = make_config(norm='QBN2d', exclude=[])
    memory_report.main([config, '--shape', '32', '32'])
    note = cells(capsys.readouterr().out)['(model)'][-1]
    assert note.startswith('return dict(loss=self.norm(inputs)[:].cos()')


def test_settings(make_config, tmp_path, capsys):
    """Settings of the config's hook, overridden by the command line."""
    out = tmp_path / 'report.json'
    config = make_config(norm='QBN2d', exclude=[])
    arguments = [config, '--shape', '32', '48', '--out', str(out)]
    memory_report.main(arguments)
    (exact,) = json.loads(out.read_text())
    assert exact['level'] == 'L2'
    memory_report.main([*arguments, '--level', 'L3', '--amp', 'bf16'])
    (figures,) = json.loads(out.read_text())
    assert figures['level'] == 'L3'
    assert figures['batch_size'] == 2 and figures['shape'] == [32, 48]
    assert figures['precision'] == 'bf16'
    assert figures['exact_bytes'] <= exact['exact_bytes']


def test_named_layers_that_are_gone(make_config, capsys):
    # The runner turns it into a plain layer where there is one process.
    config = make_config(norm='QSyncBN', exclude=['*'])
    with pytest.raises(SystemExit) as error:
        memory_report.main([config, '--shape', '32', '32'])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert 'names QSyncBN, but no layer of the model is compressed' in message


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['mmdet::no_such_config.py'], 'is no file'),
        ([FASTER_RCNN, '--level', 'L9'], 'one of L0.*L9'),
        ([FASTER_RCNN, '--top', '0'], 'top must be 1 or more, got 0'),
        ([FASTER_RCNN, '--shape', '9', '0'], r'shape must .*got \[9, 0\]'),
    ],
)
def test_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        memory_report.main(arguments)
    assert error.value.code == 2
    assert re.search(words, capsys.readouterr().err)
