"""Comparison of the runs of one config at equal steps."""

import dataclasses
from pathlib import Path

import pandas


@dataclasses.dataclass(frozen=True)
class Summary:
    """Runs of one config, level beside level.

    Attributes:
        config (str): Name of the config.
        metric (str): Metric of the evaluations, and
        unit (str): unit of their steps.
        seeds (list[int]): Seeds that count: those that all levels have
            evaluated at least once, or else have begun.
        losses (DataFrame): A column for each level and seed, and a row for
            each step that all of them have.
        evaluations (DataFrame): Likewise.
        saved_mib (dict[str, float]): MiB that each level has kept.
    """

    config: str
    metric: str
    unit: str
    seeds: list
    losses: pandas.DataFrame
    evaluations: pandas.DataFrame
    saved_mib: dict

    def table(self):
        """Rows of levels: metrics at the last evaluation that all runs have.

        By seed, their mean and its difference from that of the first level.
        """
        rows, first = [], None
        for level, mib in self.saved_mib.items():
            row = dict(config=self.config, metric=self.metric, level=level)
            if len(self.evaluations):
                row['at'] = f'{self.unit} {self.evaluations.index[-1]}'
                values = self.evaluations[level].iloc[-1]
                row |= {f'seed {seed}': v for seed, v in values.items()}
                row['mean'] = values.mean()
                if first is not None:
                    row['difference'] = row['mean'] - first
                first = row['mean'] if first is None else first
            rows.append(row | {'activations, MiB': mib})
        return rows


def summarize(rows):
    """Summaries of configs that have logged anything at all levels."""
    configs = {}
    for row in rows:
        configs.setdefault(Path(row['config']).stem, []).append(row)
    summaries = (_summarize(name, group) for name, group in configs.items())
    return [summary for summary in summaries if summary.seeds]


def _summarize(config, rows):
    runs = {(row['level'], row['seed']): row for row in rows}
    levels = list(dict.fromkeys(level for level, _ in runs))
    for key in ('evaluations', 'losses'):
        seeds = [
            seed
            for seed in sorted({seed for _, seed in runs})
            if all(runs.get((level, seed), {}).get(key) for level in levels)
        ]
        if seeds:
            break
    first = runs.get((levels[0], seeds[0] if seeds else None), {})
    counted = {k: runs[k, s] for k in levels for s in seeds[:1]}
    return Summary(
        config=config,
        metric=first.get('metric'),
        unit=first.get('unit'),
        seeds=seeds,
        losses=_curves(runs, levels, seeds, 'losses'),
        evaluations=_curves(runs, levels, seeds, 'evaluations'),
        saved_mib={k: row['saved_mib'] for k, row in counted.items()},
    )


def _curves(runs, levels, seeds, key):
    curves = {
        (level, seed): pandas.Series(dict(runs[level, seed][key]), dtype=float)
        for level in levels
        for seed in seeds
    }
    if not curves:
        return pandas.DataFrame()
    return pandas.concat(curves, axis=1, join='inner').sort_index()
