"""The hook finds out which samples a batch holds."""

import pytest
import torch
from mmengine.dataset import (
    ClassBalancedDataset,
    ConcatDataset,
    RepeatDataset,
)
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from support.sampled import SAMPLES
from support.toy import RecordingHook

from mmactnn.hooks.samples import SampleIndex

KEYS = ('img_path',)


def config(first=0, keys=KEYS):
    pipeline = [dict(type='PackSampled', meta_keys=keys)]
    return dict(type='Sampled', first=first, pipeline=pipeline)


def dataset(**kwargs):
    return DATASETS.build(config(**kwargs))


def look_up(data, indices):
    """What the index says of some items of a dataset."""
    samples = [data[i]['data_samples'] for i in indices]
    return SampleIndex(data).lookup(dict(data_samples=samples))


class TestSampleIndex:
    @pytest.mark.parametrize('key', ['img_path', 'img_id', 'sample_idx'])
    def test_one_dataset(self, key):
        data = dataset(first=3, keys=(key,))
        assert len(SampleIndex(data)) == SAMPLES
        assert look_up(data, [5, 0, 7]) == [5, 0, 7]

    def test_repeated(self):
        data = RepeatDataset(dataset(), times=3)
        assert len(SampleIndex(data)) == SAMPLES
        assert look_up(data, [1, SAMPLES + 1, 2 * SAMPLES + 5]) == [1, 1, 5]

    def test_concatenated(self):
        data = ConcatDataset([dataset(), dataset(first=100)])
        assert len(SampleIndex(data)) == 2 * SAMPLES
        assert look_up(data, [0, SAMPLES, 15]) == [0, SAMPLES, 15]

    def test_class_balanced(self):
        data = ClassBalancedDataset(dataset(), oversample_thr=0.9)
        assert len(data) > SAMPLES
        found = look_up(data, range(len(data)))
        assert sorted(set(found)) == list(range(SAMPLES))

    def test_nested(self):
        parts = [dataset(), RepeatDataset(dataset(first=50), times=2)]
        data = torch.utils.data.ConcatDataset(parts)
        assert len(SampleIndex(data)) == 2 * SAMPLES
        assert look_up(data, [9, 9 + SAMPLES]) == [9, 9]

    def test_samples_that_do_not_tell(self):
        with pytest.raises(RuntimeError, match='img_path.*packs number'):
            look_up(dataset(keys=('number',)), [0])

    def test_numbers_that_are_ambiguous(self):
        keys = ('sample_idx',)
        data = ConcatDataset([dataset(keys=keys), dataset(keys=keys)])
        with pytest.raises(RuntimeError, match='concatenated'):
            look_up(data, [0])

    def test_batches_without_data_samples(self):
        with pytest.raises(RuntimeError, match='got the keys inputs'):
            SampleIndex(dataset()).lookup(dict(inputs=None))


def run(folder, epochs, resume=False, name='a'):
    record = dict(type='RecordingHook')
    level = dict(use_gradient=True)
    runner = Runner.from_cfg(
        dict(
            model=dict(type='SampledModel'),
            work_dir=str(folder),
            experiment_name=f'{folder.name}{name}',
            default_scope='mmengine',
            randomness=dict(seed=5),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=config(),
            ),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
            custom_hooks=[dict(type='ActNNHook', level=level), record],
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1)
            ),
            resume=resume,
        )
    )
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, RecordingHook))
    return hook.losses


def test_history_in_the_checkpoint(tmp_path):
    run(tmp_path, epochs=2)
    file = tmp_path / 'epoch_2.pth'
    state = torch.load(file, weights_only=False)['actnn']['precision']
    history = state['history']
    assert history.shape == (SAMPLES, 3)
    assert history.float().isfinite().all()
    # Of every sample, and not the same of all.
    assert history.ne(1).all(0).sum() >= 2
    assert history.float().std(0).gt(0.01).any()


def test_resumes_as_if_never_stopped(tmp_path):
    whole = run(tmp_path / 'whole', epochs=5)
    run(tmp_path / 'parts', epochs=2)
    rest = run(tmp_path / 'parts', epochs=5, resume=True, name='b')
    assert len(whole) == 10 and len(rest) == 6
    assert rest == {i: whole[i] for i in rest}
