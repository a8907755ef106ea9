"""Time of training steps, and of the host in them, for systems in turns.

    python tools/benchmark/host_time.py --batch-size 2 --image-size 800 1344 \
        --model mmdet::retinanet/retinanet_r50_fpn_1x_coco.py

Several systems train models side by side in one process and take turns, so
that disturbances of the machine affect all of them. It is for short steps, or
steps in which the GPU waits for the host.

step   median milliseconds from calling a step until the device has done it
25 %   of the steps take no longer than this, and 75 % than that
host   median milliseconds until the call returns, including any waiting of
       the model for results of the device
ratio  step over that of the first system

Systems that change the whole process, such as levels that need settings of the
allocator, cannot run together. The exit status is 1 if a system failed.
"""

import pandas

from shared import output
from training.measure import Training
from training.trial import Trial


def parse_args(argv=None):
    """Read and check the command line."""
    parser = output.make_parser(__doc__)
    add = parser.add_argument
    add('--model', default='resnet50', help='as for train.py')
    add('--systems', nargs='+', default=['exact', 'L3'], help='likewise')
    add('--batch-size', type=int, default=2)
    add('--image-size', nargs=2, type=int, default=(224, 224))
    add('--cfg-options', nargs='+', default=[], help='KEY=VALUE of the config')
    add('--device', default='cuda')
    add('--warmup', type=int, default=8, help='steps of each system')
    add('--turns', type=int, default=4)
    add('--steps', type=int, default=6, help='of a turn')
    add('--out', help='json file for the rows')
    args = parser.parse_args(argv)
    for name in ('batch_size', 'image_size', 'turns', 'steps'):
        output.check_positive(parser, args, name)
    return args


def measure(args):
    """Rows of systems that trained to the end, and errors of the others."""
    trainings, failures, samples = {}, {}, []
    names = ('model', 'batch_size', 'image_size', 'cfg_options', 'device')
    settings = {name: getattr(args, name) for name in names}
    for system in args.systems:
        with output.catching(failures, system):
            trainings[system] = Training(Trial(system=system, **settings))
            for _ in range(args.warmup):
                trainings[system].step()
    for _ in range(args.turns):
        for system in [s for s in trainings if s not in failures]:
            with output.catching(failures, system):
                # An untimed step refills caches after another system.
                training = trainings[system]
                training.step()
                for _ in range(args.steps):
                    samples.append((system, *training.timed_step()))
    frame = pandas.DataFrame(samples, columns=['system', 'host', 'step'])
    times = frame[~frame.system.isin(failures)].groupby('system', sort=False)
    low, median, high = (times.step.quantile(q) for q in (0.25, 0.5, 0.75))
    columns = {'step': median, '25 %': low, '75 %': high}
    table = 1e3 * pandas.DataFrame(columns | {'host': times.host.median()})
    if args.systems[0] in table.index:
        table['ratio'] = table.step / table.step[args.systems[0]]
    return table.reset_index().to_dict('records'), failures


def main(argv=None):
    """Measure and print a table."""
    args = parse_args(argv)
    rows, failures = measure(args)
    title = f'{args.model}, batch {args.batch_size}, ms; '
    formats = dict.fromkeys(['step', '25 %', '75 %', 'host'], '.1f')
    formats['ratio'] = '.3f'
    output.publish(rows, args, title, args.device, formats)
    output.exit_on_failures(failures)


if __name__ == '__main__':
    main()
