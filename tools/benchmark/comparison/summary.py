"""Comparison of the runs of one config at equal steps."""

import dataclasses
from pathlib import Path

import pandas

from shared.results import OK


@dataclasses.dataclass(frozen=True)
class Summary:
    """Runs of one config, level beside level.

    Seeds count that all levels have evaluated at least once, or else begun;
    where any have finished at all levels, only these. Curves have a column for
    each level and seed, and a row for each step that all of them have. Memory
    is that of each level.
    """

    config: str
    metric: str
    unit: str
    seeds: list
    losses: pandas.DataFrame
    evaluations: pandas.DataFrame
    saved_mib: dict

    def table(self, bound=None):
        """Rows of levels: metrics at the last evaluation that all runs have.

        By seed, their mean and spread (largest minus smallest), and the
        difference of the mean from that of the first level, which may be as
        large as a bound.
        """
        rows = []
        for level, mib in self.saved_mib.items():
            row = dict(config=self.config, metric=self.metric, level=level)
            if len(self.evaluations):
                row['at'] = f'{self.unit} {self.evaluations.index[-1]}'
                values = self.evaluations[level].iloc[-1]
                row |= {f'seed {seed}': v for seed, v in values.items()}
                row['mean'] = values.mean()
                row['spread'] = values.max() - values.min()
                if rows:
                    row['difference'] = row['mean'] - rows[0]['mean']
                if rows and bound is not None:
                    # Means of decimals are not exact.
                    within = round(abs(row['difference']), 9) <= bound
                    row |= dict(bound=bound, within='yes' if within else 'no')
            rows.append(row | {'activations, MiB': mib})
        return rows


def summarize(rows):
    """Summaries of configs that have logged anything at all levels."""
    configs = {Path(row['config']).stem: [] for row in rows}
    for row in rows:
        configs[Path(row['config']).stem].append(row)
    return list(filter(None, map(_summarize, configs, configs.values())))


def _summarize(config, rows):
    runs = {(row['level'], row['seed']): row for row in rows}
    levels = list(dict.fromkeys(level for level, _ in runs))
    seeds = sorted({seed for _, seed in runs})

    def having(key):
        return [
            seed
            for seed in seeds
            if all(runs.get((level, seed), {}).get(key) for level in levels)
        ]

    seeds = having('evaluations') or having('losses')
    if not seeds:
        return None
    finished = [
        seed
        for seed in seeds
        if all(runs[level, seed]['result'] == OK for level in levels)
    ]
    seeds = finished or seeds
    first = runs[levels[0], seeds[0]]
    return Summary(
        config=config,
        metric=first['metric'],
        unit=first['unit'],
        seeds=seeds,
        losses=_curves(runs, levels, seeds, 'losses'),
        evaluations=_curves(runs, levels, seeds, 'evaluations'),
        saved_mib={k: runs[k, seeds[0]]['saved_mib'] for k in levels},
    )


def _curves(runs, levels, seeds, key):
    curves = {
        (level, seed): pandas.Series(dict(runs[level, seed][key]), dtype=float)
        for level in levels
        for seed in seeds
    }
    return pandas.concat(curves, axis=1, join='inner').sort_index()
