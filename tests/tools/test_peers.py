# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a peer is given; no peer is installed and nothing is trained."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools/benchmarks'
MINI = TOOLS.parents[1] / 'configs/mini/densecl_r18w16_1xb64-coslr-11e.py'
sys.path.insert(0, str(TOOLS))
import ablation  # noqa: E402
import peers  # noqa: E402


def test_settings(tmp_path):
    settings = peers.read_settings(MINI, tmp_path, 3)
    assert (settings['seed'], settings['epochs']) == (3, 11)
    assert settings['model']['backbone']['strides'] == (1, 2, 2, 1)
    assert settings['sgd'] == dict(lr=0.06, momentum=0.9, weight_decay=1e-4)
    assert json.dumps(settings)
    mocov2 = str(MINI).replace('densecl_', 'mocov2_')
    with pytest.raises(ValueError, match='Expected DenseCL .* got .*MoCoV2'):
        peers.read_settings(Path(mocov2), tmp_path, 3)


def test_a_stopped_peer_starts_anew(tmp_path, monkeypatch):
    """And what is finished is not repeated."""
    run = ablation.Run('lightly-train', MINI, 0, tmp_path / 'peer/seed0')
    calls = []

    def call(command, **variables):
        calls.append(command)
        python, script, peer, settings, work_dir = command
        assert (python, peer) == ('python', 'lightly-train')
        assert Path(script).is_file() and variables['PYTHONPATH'] == ''
        assert json.loads(Path(settings).read_text())['epochs'] == 11
        assert not Path(work_dir).exists()
        Path(work_dir, 'exported_models').mkdir(parents=True)
        if len(calls) == 2:
            run.checkpoint.touch()
        return len(calls) == 2

    monkeypatch.setattr(ablation, 'call', call)
    pythons = {'lightly-train': 'python'}
    assert not ablation.train(run, 'images', pythons)
    assert ablation.train(run, 'images', pythons)
    assert ablation.train(run, 'images', pythons)
    assert len(calls) == 2
