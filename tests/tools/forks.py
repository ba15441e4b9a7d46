# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Run a script as a process of its own that has less to import."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def _main(script, args, cwd, env, output):
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    get_context = multiprocessing.get_context
    # What the script would spawn is still pickled and imports the script, but
    # the libraries are imported once for all of them.
    multiprocessing.set_forkserver_preload(['mmpretrain.models'])
    multiprocessing.get_context = lambda method=None: get_context(
        'forkserver' if method == 'spawn' else method
    )
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [script, *args]
    added = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:0] = [os.path.dirname(script), *added, str(ROOT)]
    runpy.run_path(script, run_name='__main__')


def run_script(script, *args, cwd, env=None, timeout=300):
    """Run ``python script *args`` in a fork of the server of conftest.py.

    Args:
        script (Path): With its whole path.
        *args: Its command line, as anything that has a text.
        cwd (Path): Where it runs.
        env (dict): Added to this process's. Defaults to None.
        timeout (int): Seconds. Defaults to 300.

    Returns:
        subprocess.CompletedProcess: With what was written to stdout and
        stderr in ``stdout``.
    """
    args = [str(x) for x in args]
    env = {**os.environ, **(env or {})}
    with tempfile.NamedTemporaryFile() as output:
        process = multiprocessing.get_context('forkserver').Process(
            target=_main, args=(str(script), args, str(cwd), env, output.name)
        )
        process.start()
        process.join(timeout)
        text = Path(output.name).read_text()
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([script, *args], timeout, text)
        return subprocess.CompletedProcess(
            [script, *args], process.exitcode, text
        )
