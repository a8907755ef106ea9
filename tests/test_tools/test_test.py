"""Tests of the arguments of tools/test.py."""

import pytest
from support.tools import load_tool

tool = load_tool('test.py')

CONFIG = """
default_scope = {scope!r}
default_hooks = dict(visualization=dict(type='SomeVisualizationHook'))
visualizer = dict(type='Visualizer')
model = dict(type='RetinaNet')
test_evaluator = dict(type='SomeMetric')
test_dataloader = dict(dataset=dict(type='RepeatDataset', dataset=dict(
    type='CocoDataset',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])))
"""


@pytest.fixture
def build(tmp_path):
    def build(*argv, scope='mmdet', more=''):
        path = tmp_path / 'config.py'
        path.write_text(CONFIG.format(scope=scope) + more)
        return tool.build_config(
            tool.parse_args([str(path), 'weights.pth', *argv])
        )

    return build


def test_checkpoint_is_loaded(build):
    cfg = build()
    assert cfg.load_from == 'weights.pth'
    assert 'draw' not in cfg.default_hooks.visualization


def test_show(build):
    hook = build('--show', '--wait-time', '5').default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time) == (True, True, 5.0)


def test_show_dir(build):
    cfg = build('--show-dir', 'painted')
    assert cfg.default_hooks.visualization.test_out_dir == 'painted'
    assert cfg.default_hooks.visualization.show is False
    cfg = build('--show-dir', 'painted', scope='mmseg')
    assert cfg.visualizer.save_dir == 'painted'


def test_show_dir_of_a_classifier(build):
    cfg = build('--show-dir', 'painted', scope='mmpretrain')
    hook = cfg.default_hooks.visualization
    assert (hook.enable, hook.out_dir, hook.show) == (True, 'painted', False)
    # Every image, not one of thousands.
    assert hook.interval == 1
    assert 'draw' not in hook


def test_show_without_the_hook(build):
    with pytest.raises(ValueError, match='need a visualization hook'):
        build('--show', more='default_hooks = dict()\n')


def test_out_of_a_segmentor_is_a_directory(build):
    evaluator = build('--out', 'maps', scope='mmseg').test_evaluator
    assert (evaluator.output_dir, evaluator.keep_results) == ('maps', True)


def test_out_of_a_detector_is_a_pickle_file(build):
    assert 'output_dir' not in build('--out', 'out.pkl').test_evaluator
    with pytest.raises(ValueError, match=r'\.pkl or \.pickle, got out.json'):
        build('--out', 'out.json')


def test_tta_of_a_detector_flips(build):
    cfg = build('--tta')
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'RetinaNet'
    pipeline = cfg.test_dataloader.dataset.dataset.pipeline
    assert [step.type for step in pipeline] == [
        'LoadImageFromFile',
        'TestTimeAug',
    ]
    flips, (pack,) = pipeline[-1].transforms
    assert {step.prob for step in flips} == {0.0, 1.0}
    assert 'flip_direction' in pack.meta_keys


def test_tta_of_a_classifier_flips(build):
    cfg = build('--tta', scope='mmpretrain')
    assert cfg.model.type == 'AverageClsScoreTTA'
    pipeline = cfg.test_dataloader.dataset.dataset.pipeline
    flips, (pack,) = pipeline[-1].transforms
    assert {step.prob for step in flips} == {0.0, 1.0}
    assert 'meta_keys' not in pack


def test_tta_of_a_segmentor_needs_its_config(build):
    with pytest.raises(ValueError, match='--tta needs tta_model'):
        build('--tta', scope='mmseg')
