"""Compares runs of one config at equal steps."""

import dataclasses
from pathlib import Path
from statistics import fmean


@dataclasses.dataclass(frozen=True)
class Summary:
    """Runs of one config, level beside level.

    A seed counts if all levels have evaluated it at least once, and what is
    compared is the last evaluation that all runs of such seeds have.

    Attributes:
        config (str): Name of the config.
        levels (list[str]): Levels; the first is what the others are compared
            with.
        seeds (list[int]): Seeds that count; all of them if none does.
        left_out (list[int]): The others.
        step (int, optional): Which evaluation; None if there is none.
        rows (dict[tuple[str, int], dict]): Rows of
            :class:`comparison.results.Results` by level and seed.
    """

    config: str
    levels: list
    seeds: list
    left_out: list
    step: int | None
    rows: dict

    def value(self, level, seed):
        """The metric of a run in the evaluation that is compared.

        Args:
            level (str): Level of the run.
            seed (int): Seed of the run.

        Returns:
            float, optional: The metric; None if the run does not count.
        """
        if seed not in self.seeds or self.step is None:
            return None
        return dict(self.rows[level, seed]['evaluations'])[self.step]

    def mean(self, level):
        """The mean metric of a level.

        Args:
            level (str): The level.

        Returns:
            float, optional: Its mean over seeds; None without evaluations.
        """
        if self.step is None:
            return None
        return fmean(self.value(level, seed) for seed in self.seeds)

    def curves(self, level, key):
        """A curve of every seed that counts, up to where all runs have one.

        Args:
            level (str): The level.
            key (str): ``'losses'`` or ``'evaluations'``.

        Returns:
            tuple[list[int], list[list[float]]]: Steps that all runs of the
            config have, and the values there of each seed.
        """
        steps = sorted(
            _common_steps(
                self.rows[other, seed][key]
                for other in self.levels
                for seed in self.seeds
            )
        )
        values = [dict(self.rows[level, seed][key]) for seed in self.seeds]
        return steps, [[curve[step] for step in steps] for curve in values]


def summarize(rows):
    """Summaries of all configs.

    Args:
        rows (list[dict]): Rows of :class:`comparison.results.Results`. Those
            that have logged nothing are of runs that do not count.

    Returns:
        list[Summary]: A summary of each config that has logged anything at
        all levels.
    """
    configs = {}
    for row in rows:
        configs.setdefault(Path(row['config']).stem, []).append(row)
    summaries = (_summarize(name, group) for name, group in configs.items())
    return [summary for summary in summaries if summary.seeds]


def _summarize(config, rows):
    levels = list(dict.fromkeys(row['level'] for row in rows))
    seeds = sorted({row['seed'] for row in rows})
    rows = {(row['level'], row['seed']): row for row in rows}

    def having(key):
        return [
            seed
            for seed in seeds
            if all(rows.get((level, seed), {}).get(key) for level in levels)
        ]

    counting = having('evaluations')
    steps = _common_steps(
        rows[level, seed]['evaluations']
        for level in levels
        for seed in counting
    )
    counting = counting or having('losses')
    return Summary(
        config=config,
        levels=levels,
        seeds=counting,
        left_out=[seed for seed in seeds if seed not in counting],
        step=max(steps, default=None),
        rows=rows,
    )


def _common_steps(curves):
    steps = [{step for step, _ in curve} for curve in curves]
    return set.intersection(*steps) if steps else set()
