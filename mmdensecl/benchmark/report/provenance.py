# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Where the numbers of a report come from."""
import shlex
from typing import Any, Dict, List, Sequence

from .results import Run, Suite, settings_of
from .tables import Table
from .text import clean, duration, last_lines


def provenance(suite: Suite, tables: Sequence[Table]) -> Dict[str, Any]:
    """Everything needed to judge and to repeat the runs, as plain values.

    Args:
        suite (Suite): The suite.
        tables (Sequence[Table]): Its tables.
    """
    finished = [run for run in suite.runs if run.status == 'finished']
    seconds = sum(run.result['seconds'] for run in finished)
    return dict(
        finished=len(finished),
        planned=len(suite.runs),
        seconds=seconds,
        time=duration(seconds),
        # Of a run that was stopped and resumed only the last start counts.
        resumed=sum(bool(run.result.get('resumed')) for run in finished),
        shared=_shared(finished),
        tables=[
            dict(
                task=table.task.name,
                protocol=table.protocol,
                settings=_table_settings(table.finished)) for table in tables
        ],
        checkpoints=_checkpoints(suite, finished),
        environments=_environments(finished),
        commands={run.name: _command(run)
                  for run in finished},
        unfinished=[
            _unfinished(run) for run in suite.runs if run.status != 'finished'
        ])


def _shared(finished: List[Run]) -> Dict[str, str]:
    """Code and software, which all runs have in common."""
    settings = settings_of(finished[0]) if finished else {}
    return {
        name.removeprefix('stack.'): value
        for name, value in sorted(settings.items())
        if name == 'code' or name.startswith('stack.')
    }


def _table_settings(finished: List[Run]) -> Dict[str, str]:
    if not finished:
        return {}
    settings = settings_of(finished[0])
    data = finished[0].result['settings']['data']
    found = {
        'config (SHA-256)': settings['config_sha256'],
        'data (fingerprint)': settings['data'],
        'training': f'{settings["length"]} {settings["unit"]}',
        'batch size': settings['batch_size'],
        'processes': settings['processes'],
        'device': settings['device'],
    }
    if 'files' in data:
        found['data (files)'] = str(data['files'])
    return found


def _checkpoints(suite: Suite, finished: List[Run]) -> List[Dict[str, str]]:
    found = []
    for row in suite.rows:
        run = next((run for run in finished if run.row == row), None)
        if run is None:
            continue
        checkpoint = run.result.get('checkpoint')
        found.append({
            'row': row,
            **{
                key: str((checkpoint or {}).get(key) or '')
                for key in ('path', 'sha256', 'source', 'arch')
            }
        })
        if checkpoint is None:
            found[-1]['source'] = 'no checkpoint: initialised at random'
    return found


def _environments(finished: List[Run]) -> List[Dict[str, Any]]:
    """The distinct ones, with the number of runs in each."""
    found: List[Dict[str, Any]] = []
    for run in finished:
        values = run.result.get('environment')
        values = values if isinstance(values, dict) else {}
        values = {str(k): str(v) for k, v in values.items()}
        same = next((x for x in found if x['values'] == values), None)
        if same:
            same['runs'] += 1
        else:
            found.append(dict(runs=1, values=values))
    return found


def _command(run: Run) -> str:
    command = run.result.get('command', '')
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    return clean(command)


def _unfinished(run: Run) -> Dict[str, Any]:
    failure = run.failure or {}
    reason = failure.get('reason')
    if reason is None and 'returncode' in failure:
        reason = f'exit status {failure["returncode"]}'
    return dict(
        run=run.name,
        status=run.status,
        reason=clean(reason or ''),
        log=clean(failure.get('log', '')),
        tail=last_lines(failure.get('tail')))


def resumed(source: Dict[str, Any]) -> str:
    """What the total time does not hold.

    Args:
        source (Dict[str, Any]): From :func:`provenance`.
    """
    return (f', of {source["resumed"]} resumed runs only the last start'
            if source['resumed'] else '')
