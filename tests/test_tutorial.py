# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The tutorial runs, at a small size."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / 'docs/tutorial.ipynb'


@pytest.mark.slow
def test_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip('nbformat', reason='pip install .[docs]')
    nbclient = pytest.importorskip('nbclient', reason='pip install .[docs]')
    pytest.importorskip('mmseg')
    monkeypatch.setenv('TUTORIAL_EPOCHS', '1')
    monkeypatch.setenv('TUTORIAL_DIR', str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get('outputs', ())
        if 'image/png' in output.get('data', ())
    ]
    assert len(figures) == 5
    text = str(notebook.cells[-1].outputs)
    assert 'random weights' in text
    assert 'DenseCL' in text
