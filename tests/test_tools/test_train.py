"""Tests of tools/train.py and of what it shares with tools/test.py."""

import re

import pytest
from mmengine.config import Config
from support.tools import load_tool

from mmactnn import get_level
from mmactnn.mmlab import launch

train = load_tool('train.py')

CONFIG = """
default_scope = 'mmdet'
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
custom_hooks = [dict(type='ActNNHook', level='L3')]
"""


@pytest.fixture
def config(tmp_path):
    """Write a config file and return its path."""

    def write(text=CONFIG):
        path = tmp_path / 'some_config.py'
        path.write_text(text)
        return str(path)

    return write


def build(*argv):
    return train.build_config(train.parse_args(list(argv)))


class TestArguments:
    def test_defaults(self, config):
        cfg = build(config())
        assert cfg.launcher == 'none'
        assert cfg.work_dir == './work_dirs/some_config'
        assert cfg.optim_wrapper.type == 'OptimWrapper'
        assert 'resume' not in cfg and 'load_from' not in cfg

    def test_work_dir_of_the_command_line_wins(self, config):
        path = config(CONFIG + "work_dir = 'from_config'\n")
        assert build(path).work_dir == 'from_config'
        assert build(path, '--work-dir', 'mine').work_dir == 'mine'

    def test_cfg_options_reach_into_lists(self, config):
        cfg = build(
            config(),
            '--cfg-options',
            'custom_hooks.0.level=L0',
            'optim_wrapper.optimizer.lr=0.5',
        )
        assert cfg.custom_hooks[0].level == 'L0'
        assert cfg.optim_wrapper.optimizer.lr == 0.5

    @pytest.mark.parametrize(
        'level', ["'L2'", "dict(base='L2', norm=2)", "'L9'"]
    )
    def test_a_level_is_set_field_by_field(self, config, level):
        base = [] if level != "'L9'" else ['custom_hooks.0.level.base=L2']
        cfg = build(
            config(CONFIG.replace("'L3'", level)),
            '--cfg-options',
            'custom_hooks.0.level.conv=3',
            'custom_hooks.0.level.offload.swap=True',
            *base,
        )
        found = get_level(cfg.custom_hooks[0].level)
        norm = 2 if 'norm' in level else 4
        assert found == get_level(
            dict(base='L2', conv=3, norm=norm, swap=True)
        )

    @pytest.mark.parametrize(
        ('argv', 'words'),
        [
            (['{}s'], 'no config .*did you mean .*some_config.py'),
            (['{}', 'custom_hooks.0.level=L33'], "0: level must.*'L33'"),
            (['{}', 'custom_hooks.0.level.nrom=2'], "did you mean 'norm'"),
            (['{}', 'custom_hooks.0.levell=L2'], "did you mean 'level'"),
            (['{}', 'custom_hook.0.level=L2'], "mean 'custom_hooks'"),
            (['{}', 'custom_hooks.1.level=L2'], "items 0 to 0, got '1'"),
            (['{}', 'default_scope.x=1'], 'default_scope'),
            (['{}', 'custom_hooks.0.interval=2.5'], '1 or more, got 2.5'),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, argv, words, config):
        path, *options = argv
        argv = [path.format(config())]
        if options:
            argv += ['--cfg-options', *options]
        with pytest.raises(SystemExit) as error:
            train.main(argv)
        message = error.value.code
        assert re.search(words, message) and '\n' not in message

    @pytest.mark.parametrize('flag', ['--local-rank', '--local_rank'])
    def test_local_rank(self, config, flag, monkeypatch):
        # Set and removed, so that it is removed again after the test.
        monkeypatch.setenv('LOCAL_RANK', '')
        monkeypatch.delenv('LOCAL_RANK')
        build(config(), f'{flag}=3')
        assert launch.os.environ['LOCAL_RANK'] == '3'

    @pytest.mark.parametrize(
        ('argv', 'load_from'),
        [(['--resume'], None), (['--resume', 'epoch_1.pth'], 'epoch_1.pth')],
    )
    def test_resume(self, config, argv, load_from):
        cfg = build(config(), *argv)
        assert cfg.resume is True
        assert cfg.load_from == load_from


def test_loaders_of_mmpretrain(config):
    text = """
default_scope = {!r}
train_dataloader = dict(num_workers=4, pin_memory=False)
val_dataloader = dict(num_workers=0, collate_fn=dict(type='pseudo_collate'))
test_dataloader = None
"""
    collate = dict(type='default_collate')
    cfg = build(config(text.format('mmpretrain')))
    assert cfg.train_dataloader == dict(
        num_workers=4,
        pin_memory=False,
        persistent_workers=True,
        collate_fn=collate,
    )
    assert cfg.val_dataloader == dict(
        num_workers=0,
        pin_memory=True,
        persistent_workers=False,
        collate_fn=dict(type='pseudo_collate'),
    )
    cfg = build(config(text.format('mmseg')))
    assert cfg.train_dataloader == dict(num_workers=4, pin_memory=False)


class TestAmp:
    def test_enabled(self, config):
        wrapper = build(config(), '--amp').optim_wrapper
        assert wrapper.type == 'AmpOptimWrapper'
        assert wrapper.loss_scale == 'dynamic'

    def test_config_that_has_it_keeps_its_settings(self, config):
        text = CONFIG.replace(
            "type='OptimWrapper'", "type='AmpOptimWrapper', loss_scale=512.0"
        )
        assert build(config(text), '--amp').optim_wrapper.loss_scale == 512.0

    def test_other_wrapper_is_refused(self, config):
        text = CONFIG.replace("'OptimWrapper'", "'DeepSpeedOptimWrapper'")
        with pytest.raises(ValueError, match="got 'DeepSpeedOptimWrapper'"):
            build(config(text), '--amp')


class TestAutoScaleLr:
    def test_enabled(self, config):
        text = CONFIG + 'auto_scale_lr = dict(base_batch_size=16)\n'
        cfg = build(config(text), '--auto-scale-lr')
        assert cfg.auto_scale_lr == dict(base_batch_size=16, enable=True)

    def test_absent(self, config):
        with pytest.raises(
            ValueError, match=r'base_batch_size=N\) in .*some_'
        ):
            build(config(), '--auto-scale-lr')


def coco(root, **dataset):
    """A config that reads a COCO-shaped training set, and validates on it."""
    loader = dict(
        dataset=dict(
            type='CocoDataset',
            data_root=str(root),
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            **dataset,
        )
    )
    evaluator = dict(type='CocoMetric', ann_file=str(root / 'val.json'))
    return Config(
        dict(
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=[dict(type='Other'), evaluator],
        )
    )


def make_coco(root):
    (root / 'annotations').mkdir(parents=True)
    (root / 'train2017').mkdir()
    (root / 'annotations' / 'instances_train2017.json').touch()
    (root / 'val.json').touch()


class TestCheckData:
    def test_nothing_missing(self, tmp_path):
        make_coco(tmp_path)
        launch.check_data(coco(tmp_path), ['train', 'val'])

    def test_one_error_lists_all(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            launch.check_data(coco(tmp_path), ['train', 'val'])
        message = str(error.value)
        for path in (
            'annotations/instances_train2017.json',
            'train2017/',
            'val.json',
        ):
            assert (
                len(re.findall(f'^  {tmp_path}/{path} ', message, re.M)) == 1
            )
        assert f'digits.py {tmp_path}/ --layout coco' in message
        assert '--cfg-options' in message

    def test_only_the_splits_that_are_used(self, tmp_path):
        make_coco(tmp_path)
        (tmp_path / 'val.json').unlink()
        launch.check_data(coco(tmp_path), ['train'])
        with pytest.raises(FileNotFoundError, match='of val_evaluator'):
            launch.check_data(coco(tmp_path), ['val'])

    def test_advice_names_coco_only_where_it_is_meant(self, tmp_path):
        make_coco(tmp_path)
        (tmp_path / 'val.json').unlink()
        with pytest.raises(FileNotFoundError, match='converters') as error:
            launch.check_data(coco(tmp_path), ['val'])
        assert 'COCO' not in str(error.value)

    def test_wrapped_datasets(self, tmp_path):
        good, bad = (
            dict(type='VOCDataset', data_root=str(tmp_path), ann_file=name)
            for name in ('good.txt', 'bad.txt')
        )
        (tmp_path / 'good.txt').touch()
        concat = dict(type='ConcatDataset', datasets=[good, bad])
        dataset = dict(type='RepeatDataset', times=2, dataset=concat)
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        with pytest.raises(FileNotFoundError) as error:
            launch.check_data(cfg, ['train'])
        assert 'bad.txt' in str(error.value)
        assert 'good.txt' not in str(error.value)

    def test_absolute_paths_are_not_joined(self, tmp_path):
        path = tmp_path / 'labels.txt'
        path.touch()
        dataset = dict(data_root='elsewhere', ann_file=str(path))
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        launch.check_data(cfg, ['train'])

    @pytest.mark.parametrize(
        'remote',
        [
            dict(data_root='s3://bucket/', ann_file='train.json'),
            dict(
                ann_file='train.json',
                backend_args=dict(backend='petrel'),
            ),
        ],
    )
    def test_remote_storage_is_left_alone(self, remote):
        cfg = Config(dict(train_dataloader=dict(dataset=remote)))
        launch.check_data(cfg, ['train'])


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launcher_that_needs_a_gpu(launcher, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, 'is_available', lambda: False)
    cfg = Config(dict(launcher=launcher))
    with pytest.raises(
        RuntimeError, match=f'--launcher {launcher} needs a GPU'
    ):
        launch.build_runner(cfg)
