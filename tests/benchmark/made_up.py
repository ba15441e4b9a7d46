# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Made-up values and results."""

import pandas as pd

from mmdensecl.benchmark.results import write_json


def calls(folder):
    """How often each run below a folder has been started."""
    return {
        str(path.parent.relative_to(folder)): len(
            path.read_text().splitlines()
        )
        for path in sorted(folder.rglob('calls'))
    }


def values_of(**methods):
    """A table of values: of a method a list, or a list for each pre-training.

    Random weights have no pre-training.
    """
    rows = []
    for method, found in methods.items():
        found = found if isinstance(found[0], (list, tuple)) else [found]
        for number, values in enumerate(found):
            for seed, value in enumerate(values):
                pretrain = None if method == 'random' else number
                rows.append((method, pretrain, seed, value))
    names = ['method', 'pretrain_seed', 'seed', 'value']
    frame = pd.DataFrame(rows, columns=names)
    frame = frame.astype(dict(pretrain_seed='Int64'))
    return frame.dropna(subset=['value']).reset_index(drop=True)


def write_results(
    folder, metrics, published=(), sweep=None, notes=(), **values
):
    """The files of a finished suite of one task, as the benchmark writes."""
    task = dict(name='seg', title='VOC segmentation', model='FCN')
    task.update(metrics=metrics, published=[*published], notes=[*notes])
    suite = dict(schema=3, name='mini', title='Mini', description='Small.')
    suite.update(tasks=dict(seg=task), runs={}, sweep=sweep)
    settings = dict(code='c', stack=dict(torch='2.11'), data=None, config='d')
    for _, row in values_of(**values).iterrows():
        key = dict(row.drop('value'), task='seg', mode='frozen')
        number = row['pretrain_seed']
        key['pretrain_seed'] = None if pd.isna(number) else int(number)
        name = f'seg/frozen/{row["method"]}/{number}_{row["seed"]}'
        suite['runs'][name] = key
        result = dict(key=key, settings=settings, sha256=None)
        result.update(metrics={m['key']: row['value'] for m in metrics})
        result.update(remarks=[], length='10 iters', weights=None, seconds=1)
        write_json(folder / name / 'result.json', result)
    write_json(folder / 'suite.json', suite)
    return folder
