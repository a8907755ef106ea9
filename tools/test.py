"""Tests a checkpoint: ``python tools/test.py CONFIG CHECKPOINT``."""

import argparse
from copy import deepcopy

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS

from mmactnn.mmlab.launch import (
    UsageError,
    add_common_arguments,
    build_runner,
    check_data,
    leave_process_group,
    load_config,
    told_in_one_line,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Test (and evaluate) a detector, a segmentor or a '
        'classifier'
    )
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        help='keep the predictions: a pickle file, or for a segmentor a '
        'directory of label maps',
    )
    parser.add_argument(
        '--show', action='store_true', help='show the predictions'
    )
    parser.add_argument(
        '--show-dir', help='directory to save painted images in'
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds for which an image is shown',
    )
    parser.add_argument(
        '--tta', action='store_true', help='augment the test images'
    )
    args = parser.parse_args(argv)
    return args


def build_config(args: argparse.Namespace) -> Config:
    """Read the config and merge the command line into it."""
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    if args.tta:
        enable_tta(cfg)
    if args.out is not None:
        if is_segmentor(cfg):
            cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
        elif not args.out.endswith(('.pkl', '.pickle')):
            raise UsageError(
                f'--out must end with .pkl or .pickle, got {args.out}'
            )
    return cfg


def is_segmentor(cfg: Config) -> bool:
    """Tell an MMSegmentation config from a detection one."""
    return cfg.get('default_scope') == 'mmseg'


def is_classifier(cfg: Config) -> bool:
    """Tell an MMPretrain config from others."""
    return cfg.get('default_scope') == 'mmpretrain'


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Have the predictions shown or saved as images."""
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise UsageError(
            '--show and --show-dir need a visualization hook in the '
            "config's default_hooks, but there is none"
        )
    hook.update(show=args.show, wait_time=args.wait_time)
    if is_classifier(cfg):
        hook.update(enable=True, interval=1, out_dir=args.show_dir)
        return
    hook.draw = True
    if args.show_dir and is_segmentor(cfg):
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook.test_out_dir = args.show_dir


def enable_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation.

    Only segmentation configs say how as a rule, so that flipping is the
    default of the others.
    """
    if is_classifier(cfg):
        cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA'))
        cfg.setdefault('tta_pipeline', flip_pipeline(cfg))
    elif not is_segmentor(cfg):
        cfg.setdefault(
            'tta_model',
            dict(
                type='DetTTAModel',
                tta_cfg=dict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
                ),
            ),
        )
        meta_keys = (
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        )
        cfg.setdefault('tta_pipeline', flip_pipeline(cfg, meta_keys=meta_keys))
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise UsageError(f'--tta needs {key} in the config')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    innermost_dataset(cfg).pipeline = cfg.tta_pipeline


def flip_pipeline(cfg: Config, **packing: tuple) -> list[dict]:
    """The test pipeline, once plain and once flipped.

    Args:
        cfg (Config): The config.
        **packing (tuple): Arguments of the last transform, which packs.
    """
    *transforms, pack = deepcopy(innermost_dataset(cfg).pipeline)
    pack.update(packing)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    return [
        *transforms,
        dict(type='TestTimeAug', transforms=[flips, [pack]]),
    ]


def innermost_dataset(cfg: Config) -> ConfigDict:
    """The test dataset inside its wrappers."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def main(argv: list[str] | None = None) -> None:
    """Test as the command line says."""
    args = parse_args(argv)
    with told_in_one_line():
        cfg = build_config(args)
        check_data(cfg, ['test'])
    runner = build_runner(cfg)
    if args.out is not None and not is_segmentor(cfg):
        name = 'DumpResults' if is_classifier(cfg) else 'mmdet.DumpDetResults'
        dump = dict(type=name, out_file_path=args.out)
        runner.test_evaluator.metrics.append(METRICS.build(dump))
    runner.test()
    del runner
    leave_process_group()


if __name__ == '__main__':
    main()
