"""ActNNHook on MMEngine's runner."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model.utils import _BatchNormXd
from support.layers import assert_same_bits, count_packs, exact_numerics
from support.toy import ITERATIONS, make_runner
from torch import nn

from mmactnn import (
    QBatchNorm,
    QBatchNorm2d,
    QConv2d,
    QLinear,
    QReLU,
    QSyncBatchNorm,
    QuantizedLayer,
    measure_activations,
    revert_model,
)
from mmactnn.hooks import ActNNHook
from mmactnn.mmlab import hook as hook_module
from mmactnn.mmlab.peak import PeakMemory

ACTNN = dict(type='ActNNHook', level='L3')
RECORD = dict(type='RecordingHook')
Q_TYPES = dict(
    conv_cfg=dict(type='QConv2d'),
    norm_cfg=dict(type='QBN2d', requires_grad=True),
    act_cfg=dict(type='QReLU'),
)


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def hook_of(runner, cls):
    (hook,) = (h for h in runner.hooks if isinstance(h, cls))
    return hook


def losses(runner):
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'RecordingHook')
    return hook.losses


def compressed(runner):
    return {
        name: type(module)
        for name, module in runner.model.named_modules()
        if isinstance(module, QuantizedLayer)
    }


def scalars(runner):
    """The records of the training log."""
    text = ''.join(
        path.read_text()
        for path in sorted(runner_dir(runner).glob('*/vis_data/scalars.json'))
    )
    return [json.loads(line) for line in text.splitlines()]


def log(runner):
    return ''.join(
        path.read_text() for path in sorted(runner_dir(runner).glob('*/*.log'))
    )


def runner_dir(runner):
    return Path(runner.work_dir)


ALL_LAYERS = {
    'body.0.conv': QConv2d,
    'body.0.bn': QBatchNorm2d,
    'body.0.activate': QReLU,
    'body.1': QConv2d,
    'body.2': QReLU,
    'head': QLinear,
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    # MMEngine sleeps for two seconds between epochs of an iteration loop.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda _: None)


class TestConversion:
    @pytest.mark.parametrize('model', [None, Q_TYPES], ids=['plain', 'Q'])
    def test_converts(self, model, tmp_path, monkeypatch):
        packed = count_packs(monkeypatch)
        runner = make_runner(tmp_path, ACTNN, RECORD, model=model)
        runner.train()
        assert compressed(runner) == ALL_LAYERS
        bits = [
            m.quantizer.bits
            for m in runner.model.modules()
            if isinstance(m, QuantizedLayer)
        ]
        # 8 of the image; 3 of a ReLU that a convolution is before and behind.
        assert bits == [8, 2, 1, 2, 3, 2]
        # A convolution and a linear layer, and no measuring beside: the other
        # convolution reads what the fused normalisation has packed.
        assert len(packed) == 2 * ITERATIONS
        assert len(losses(runner)) == ITERATIONS

    def test_report_is_printed_once(self, tmp_path):
        runner = make_runner(
            tmp_path, ACTNN, epochs=2, evaluates=True, model=Q_TYPES
        )
        runner.train()
        runner.val()
        text = log(runner)
        assert text.count('ActNN level L3: 6 layers compressed') == 1

    @pytest.mark.parametrize('level', ['L3', 'L0'])
    def test_what_is_left_is_told_once(self, level, tmp_path):
        hook = dict(ACTNN, level=level, interval=1)
        runner = make_runner(tmp_path, hook, epochs=2)
        runner.train()
        told = [
            line
            for line in log(runner).splitlines()
            if 'left uncompressed' in line
        ]
        # Exact training leaves everything.
        assert len(told) == (level == 'L3')
        assert all('losses' in line for line in told)

    def test_options(self, tmp_path):
        hook = dict(
            type='mmactnn.ActNNHook',
            level='L2',
            include=['body.*'],
            exclude=['body.1', 'ReLU'],
            group_size=64,
        )
        runner = make_runner(tmp_path, hook)
        runner.train()
        assert compressed(runner).keys() == {'body.0.conv', 'body.0.bn'}
        quantizers = [
            runner.model.get_submodule(name).quantizer
            for name in compressed(runner)
        ]
        assert [q.bits for q in quantizers] == [4, 4]
        assert {q.group_size for q in quantizers} == {64}

    @pytest.mark.parametrize('norm', ['SyncBN', 'QSyncBN'])
    def test_repairs_what_the_runner_reverts(self, norm, tmp_path):
        # Without processes the runner makes BatchNormXd of SyncBatchNorm.
        runner = make_runner(
            tmp_path, ACTNN, model=dict(norm_cfg=dict(type=norm))
        )
        assert type(runner.model.body[0].bn) is _BatchNormXd
        runner.train()
        assert type(runner.model.body[0].bn) is QBatchNorm
        assert runner.model.body[0].bn.quantizer.bits == 2

    def test_before_weights_are_initialised(self, tmp_path):
        def initial(hooks, model=None):
            stop = dict(type='RecordingHook', stop_at=0)
            runner = make_runner(tmp_path, *hooks, stop, model=model)
            with pytest.raises(KeyboardInterrupt):
                runner.train()
            return runner.model.state_dict()

        plain = initial([])
        for model in (None, Q_TYPES):
            found = initial([dict(ACTNN, level='L0')], model)
            assert found.keys() == plain.keys()
            for key, value in found.items():
                assert_same_bits(value, plain[key])

    def test_exact_level_is_bit_identical(self, tmp_path):
        plain = make_runner(tmp_path, RECORD, epochs=2)
        plain.train()
        hook = dict(ACTNN, level='L0')
        ours = make_runner(tmp_path, hook, RECORD, epochs=2, model=Q_TYPES)
        ours.train()
        assert compressed(ours) == ALL_LAYERS
        assert losses(ours) == losses(plain)
        for key, value in ours.model.state_dict().items():
            assert_same_bits(value, plain.model.state_dict()[key])

    def test_evaluation_converts_nothing(self, tmp_path):
        runner = make_runner(tmp_path, ACTNN, evaluates=True, trains=False)
        runner.test()
        assert compressed(runner) == {}
        assert 'ActNN level' not in log(runner)

    def test_evaluation_of_a_compressed_model(self, tmp_path):
        runner = make_runner(tmp_path, ACTNN, evaluates=True, model=Q_TYPES)
        runner.train()
        metrics = runner.val()
        plain = make_runner(
            tmp_path,
            evaluates=True,
            trains=False,
            load_from=str(tmp_path / 'epoch_1.pth'),
        )
        assert plain.test() == metrics

    def test_optimizer_trains_the_converted_layers(self, tmp_path):
        runner = make_runner(
            tmp_path,
            ACTNN,
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=0.1),
                accumulative_counts=2,
                clip_grad=dict(max_norm=10.0),
            ),
        )
        torch.manual_seed(0)
        before = {k: v.clone() for k, v in runner.model.named_parameters()}
        runner.train()
        for name, parameter in runner.model.named_parameters():
            assert not torch.equal(parameter, before[name])
            assert parameter.isfinite().all()

    def test_moving_average(self, tmp_path):
        # The hook of the average copies the model, then swaps weights.
        runner = make_runner(
            tmp_path, ACTNN, dict(type='EMAHook'), epochs=2, evaluates=True
        )
        runner.train()
        average = hook_of(runner, EMAHook).ema_model.module
        assert average.state_dict().keys() == runner.model.state_dict().keys()
        assert compressed(runner) == ALL_LAYERS

    def test_mixed_precision(self, tmp_path):
        if not torch.cuda.is_available():
            pytest.skip("the runner's autocast needs a GPU")
        wrapper = dict(
            type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.1)
        )
        runner = make_runner(tmp_path, ACTNN, RECORD, optim_wrapper=wrapper)
        runner.train()
        assert all(loss < 10 for loss in losses(runner).values())
        for parameter in runner.model.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()


class TestRefusals:
    def test_efficient_conv_bn_eval_of_the_runner(self, tmp_path):
        runner = make_runner(
            tmp_path, ACTNN, efficient_conv_bn_eval=['body.0']
        )
        with pytest.raises(
            RuntimeError, match=r"efficient_conv_bn_eval.*\['body.0'\]"
        ):
            runner.train()

    def test_efficient_conv_bn_eval_of_a_module(self, tmp_path):
        runner = make_runner(
            tmp_path, ACTNN, model=dict(efficient_conv_bn_eval=True)
        )
        with pytest.raises(RuntimeError, match='efficient_conv_bn_eval'):
            runner.train()

    def test_named_types_that_are_gone(self, tmp_path):
        hook = dict(ACTNN, exclude=['*'])
        # The runner has turned the one compressed layer into a plain one.
        runner = make_runner(
            tmp_path, hook, model=dict(norm_cfg=dict(type='QSyncBN'))
        )
        with pytest.raises(RuntimeError, match='names QSyncBN.*exclude'):
            runner.train()

    def test_nothing_named_and_nothing_converted(self, tmp_path):
        runner = make_runner(tmp_path, dict(ACTNN, exclude=['*']), RECORD)
        runner.train()
        assert compressed(runner) == {}
        assert len(losses(runner)) == ITERATIONS

    @pytest.mark.parametrize(
        ('options', 'error', 'words'),
        [
            (dict(group_size=100), ValueError, '100'),
            (dict(include=['neck.*']), ValueError, r"include.*'neck\.\*'"),
        ],
    )
    def test_bad_options(self, options, error, words, tmp_path):
        runner = make_runner(tmp_path, dict(ACTNN, **options))
        with pytest.raises(error, match=words):
            runner.train()

    def test_bad_level(self):
        with pytest.raises(ValueError, match="'L8'"):
            ActNNHook(level='L8')

    @pytest.mark.parametrize(
        ('interval', 'error'),
        [(0, ValueError), (2.5, ValueError), (True, TypeError)],
    )
    def test_bad_interval(self, interval, error):
        with pytest.raises(error, match=f'interval.*1 or more.*{interval}'):
            ActNNHook(interval=interval)

    @pytest.mark.parametrize(
        ('value', 'error'),
        [('body', TypeError), (1, TypeError), (dict(graphs=2), ValueError)],
    )
    def test_bad_cuda_graphs(self, value, error):
        with pytest.raises(error, match='cuda_graphs'):
            ActNNHook(cuda_graphs=value)

    def test_cuda_graphs(self, tmp_path):
        options = dict(parts=['body'], max_graphs=2)
        runner = make_runner(tmp_path, dict(ACTNN, cuda_graphs=options))
        runner.train()
        # Graphs need a GPU.
        assert 'body: CUDA graphs of 0 kinds of calls, 0 MiB' in log(runner)
        assert any('actnn/graphs_mib' in record for record in scalars(runner))

    def test_unknown_part_for_graphs(self, tmp_path):
        runner = make_runner(tmp_path, dict(ACTNN, cuda_graphs=True))
        with pytest.raises(ValueError, match="'extract_feat'"):
            runner.train()

    def test_two_hooks(self, tmp_path):
        runner = make_runner(tmp_path, ACTNN, dict(ACTNN, level='L2'))
        with pytest.raises(RuntimeError, match='2 ActNNHooks.*L3, L2'):
            runner.train()


class TestLog:
    KEYS = {
        f'actnn/{key}'
        for key in ('saved_mib', 'exact_mib', 'ratio', 'layers_ratio')
    }

    def test_scalars(self, tmp_path):
        runner = make_runner(tmp_path, ACTNN, epochs=2, model=Q_TYPES)
        runner.train()
        records = [r for r in scalars(runner) if 'loss' in r]
        assert len(records) == 2  # interval 2, three iterations an epoch
        for record in records:
            assert record.keys() >= self.KEYS

        # An independent count of the same pass.
        model = runner.model.train()
        batch = next(iter(runner.train_dataloader))
        batch = model.data_preprocessor(batch, True)
        with measure_activations(model) as meter:
            model(**batch, mode='loss')
        record = records[-1]
        assert record['actnn/saved_mib'] == pytest.approx(
            meter.saved_mib, rel=0.02
        )
        revert_model(model)
        with measure_activations(model) as meter:
            model(**batch, mode='loss')
        assert record['actnn/exact_mib'] == pytest.approx(
            meter.saved_mib, rel=0.02
        )
        assert record['actnn/ratio'] == pytest.approx(
            record['actnn/exact_mib'] / record['actnn/saved_mib']
        )
        assert record['actnn/layers_ratio'] >= record['actnn/ratio'] > 1
        assert record['actnn/peak_mib'] > record['actnn/exact_mib']

    def test_exact_level(self, tmp_path):
        runner = make_runner(tmp_path, dict(ACTNN, level='L0'))
        runner.train()
        (record,) = (r for r in scalars(runner) if 'loss' in r)
        assert record['actnn/saved_mib'] == record['actnn/exact_mib'] > 0
        assert record['actnn/ratio'] == record['actnn/layers_ratio'] == 1

    @pytest.mark.parametrize(
        ('interval', 'measured'), [(None, [0, 1, 3, 5]), (3, [0, 2, 5])]
    )
    def test_interval(self, interval, measured, tmp_path, monkeypatch):
        """The first iteration, then those of the interval (2 in the log)."""
        runner = make_runner(
            tmp_path,
            dict(ACTNN, interval=interval),
            epochs=2,
            by_epoch=False,
        )
        iterations = []

        def measure(*args):
            iterations.append(runner.iter)
            return measure_activations(*args)

        monkeypatch.setattr(hook_module, 'measure_activations', measure)
        runner.train()
        assert iterations == measured
        # No meter is left on a layer.
        for module in runner.model.modules():
            if isinstance(module, QuantizedLayer):
                assert module.quantizer.meter is None

    def test_peak_leaves_out_the_warm_up(self, monkeypatch):
        """Three steps, and with cudnn.benchmark those of new sizes."""

        class Cuda:
            peak = 0

            def is_available(self):
                return True

            def max_memory_allocated(self):
                return self.peak

            def reset_peak_memory_stats(self):
                self.peak = 0

        def run(steps, resets=()):
            cuda = Cuda()
            peak = PeakMemory(cuda)
            for i, (size, nbytes) in enumerate(steps):
                peak.begin_step(dict(inputs=[torch.empty(3, size, 4)]))
                cuda.peak = max(cuda.peak, nbytes)
                peak.end_step()
                if i in resets:  # as LoggerHook does
                    cuda.reset_peak_memory_stats()
            return peak.warmup_bytes, peak.peak_bytes

        monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
        steps = [(8, 9000), (8, 500), (8, 600)]
        assert run(steps) == (9000, None)
        steps += [(8, 550), (8, 540)]
        assert run(steps) == (9000, 550)
        steps += [(16, 7000), (8, 530), (16, 580), (24, 9500)]
        assert run(steps) == run(steps, resets=[0, 3, 7]) == (9500, 580)
        monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
        assert run(steps) == (9000, 9500)

    def test_runs_before_the_logger(self, tmp_path):
        # It resets the peak of the GPU's memory that we read.
        names = [type(h).__name__ for h in make_runner(tmp_path, ACTNN).hooks]
        assert names.index('ActNNHook') < names.index('LoggerHook')


class TestResume:
    @pytest.mark.parametrize('level', ['L0', 'L3'])
    @pytest.mark.parametrize('by_epoch', [True, False])
    def test_killed_run(self, by_epoch, level, tmp_path):
        """Goes on, from its last checkpoint, as if never killed."""
        options = dict(epochs=4, by_epoch=by_epoch, model=Q_TYPES)
        hook = dict(ACTNN, level=level)
        whole = make_runner(tmp_path / 'whole', hook, RECORD, **options)
        whole.train()
        assert len(losses(whole)) == 4 * ITERATIONS

        # In the middle of the third epoch.
        stop = dict(type='RecordingHook', stop_at=2 * ITERATIONS + 1)
        killed = make_runner(tmp_path / 'part', hook, stop, **options)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        resumed = make_runner(
            tmp_path / 'part', hook, RECORD, resume=True, **options
        )
        resumed.train()
        assert min(losses(resumed)) == 2 * ITERATIONS
        expected = losses(whole)
        for iteration, loss in losses(resumed).items():
            assert loss == expected[iteration]
        for key, value in resumed.model.state_dict().items():
            assert_same_bits(value, whole.model.state_dict()[key])

    def test_the_rounding_matters(self, tmp_path):
        """Else the test above could not fail."""

        class OtherSeed(ActNNHook):
            def before_train(self, runner):
                self.generator.manual_seed(99)

        # Passed as an object: the config holds the plain hook.
        runs = []
        for cls in (ActNNHook, OtherSeed):
            runner = make_runner(tmp_path, RECORD, model=Q_TYPES, epochs=2)
            runner.register_hook(cls('L3'))
            runner.train()
            runs.append(losses(runner))
        assert runs[0][0] == runs[1][0]
        assert runs[0][ITERATIONS] != runs[1][ITERATIONS]

    def test_state(self, tmp_path):
        runner = make_runner(tmp_path, dict(ACTNN, level='L2'))
        runner.train()
        checkpoint = torch.load(
            tmp_path / 'epoch_1.pth', map_location='cpu', weights_only=False
        )
        state = checkpoint['actnn']
        assert (state['level'], state['seed']) == ('L2', 5)
        assert set(state['layers']) == set(ALL_LAYERS)
        # Nothing else in it needs this package.
        plain = make_runner(tmp_path)
        result = plain.model.load_state_dict(
            checkpoint['state_dict'], strict=True
        )
        assert not result.missing_keys

    def test_seed_of_the_checkpoint_wins(self, tmp_path):
        make_runner(tmp_path, ACTNN).train()
        runner = make_runner(
            tmp_path, ACTNN, epochs=2, resume=True, randomness=dict(seed=6)
        )
        runner.train()
        assert hook_of(runner, ActNNHook).generator.seed == 5

    def test_weights_alone_do_not_seed(self, tmp_path):
        make_runner(tmp_path, ACTNN).train()
        runner = make_runner(
            tmp_path,
            ACTNN,
            load_from=str(tmp_path / 'epoch_1.pth'),
            randomness=dict(seed=6),
        )
        runner.train()
        assert hook_of(runner, ActNNHook).generator.seed == 6

    def test_other_level(self, tmp_path):
        make_runner(tmp_path, dict(ACTNN, level='L2')).train()
        runner = make_runner(tmp_path, ACTNN, epochs=2, resume=True)
        runner.train()
        assert 'resuming at level L3 what was trained at L2' in log(runner)
        assert runner.model.body[1].quantizer.bits == 2

    def test_other_settings_of_one_name(self, tmp_path):
        for bits in (3, 1):
            level = dict(conv=bits, norm=bits, name='mine')
            hook = dict(ACTNN, level=level)
            runner = make_runner(tmp_path, hook, epochs=4 - bits, resume=True)
            runner.train()
        assert 'linear_ops was 3, is 1; norm was 3, is 1' in log(runner)

    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_other_layers(self, level, tmp_path):
        make_runner(tmp_path, dict(ACTNN, level=level)).train()
        hook = dict(ACTNN, level=level, exclude=['head'])
        runner = make_runner(tmp_path, hook, epochs=2, resume=True)
        with pytest.raises(
            ValueError, match=r'are not now \(head\).*exclude.*load_from'
        ):
            runner.train()

    def test_checkpoint_of_a_plain_run(self, tmp_path):
        make_runner(tmp_path).train()
        runner = make_runner(tmp_path, ACTNN, RECORD, epochs=2, resume=True)
        runner.train()
        assert min(losses(runner)) == ITERATIONS
        assert compressed(runner) == ALL_LAYERS


def test_a_layer_that_is_used_after_the_run(tmp_path):
    runner = make_runner(tmp_path, ACTNN)
    runner.train()
    assert len(revert_model(runner.model)) == len(ALL_LAYERS)
    assert type(runner.model.body[1]) is nn.Conv2d
    assert not any(
        isinstance(m, QSyncBatchNorm) for m in runner.model.modules()
    )
