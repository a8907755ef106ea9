"""Places of trainings that run side by side."""

import asyncio
import os


def make_slots(gpus, per_gpu):
    """Environments of trainings that may run at the same time.

    Neighbours are on different GPUs, the first of those visible; of none, the
    slots are on the CPU. Threads are shared out, unless the environment says
    how many. A ValueError says that fewer GPUs are visible by name.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = visible.split(',') if visible else [str(n) for n in range(gpus)]
    if gpus > len(names):
        raise ValueError(
            f'CUDA_VISIBLE_DEVICES must name {gpus} GPUs, got {visible!r}'
        )
    places = (names[:gpus] or ['-1']) * per_gpu
    threads = max(1, (os.cpu_count() or 1) // len(places))
    environment = {'OMP_NUM_THREADS': str(threads), **os.environ}
    return [{**environment, 'CUDA_VISIBLE_DEVICES': name} for name in places]


async def train_all(runs, slots, train):
    """Await ``train(run, slot)`` of runs, as many at a time as slots.

    If this is interrupted, so are all of them.
    """
    free = asyncio.Queue()
    for slot in slots:
        free.put_nowait(slot)

    async def train_next(run):
        slot = await free.get()
        try:
            await train(run, slot)
        finally:
            free.put_nowait(slot)

    await asyncio.gather(*map(train_next, runs))
