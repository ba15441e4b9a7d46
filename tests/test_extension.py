# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The examples of docs/extending.md extend the package from outside of it."""

import json
import re

import pytest
from runs import ROOT, tool

from mmdensecl.testing import write_pictures

PLACEHOLDER = '/path/to/mmdensecl'
# Title of the section, the module that it writes, and what its config
# must bring into the model, by its place in the dumped config.
SECTIONS = {
    'A matching rule': ('my_rule', 'correspondence', 'SameCell'),
    'A loss': ('my_loss', 'loss', 'DecoupledLoss'),
    'A whole method': ('my_method', 'model', 'CellsToImage'),
}
# Small enough for a test; the examples themselves stay as they are.
OPTIONS = (
    'data_root=pictures train_cfg.max_epochs=1 model.queue_len=8 '
    'train_dataloader.dataset.pipeline.1.size=32 '
    'train_dataloader.batch_size=4 train_dataloader.num_workers=0 '
    'train_dataloader.persistent_workers=False '
    'default_hooks.logger.interval=1'
)


def blocks(title):
    """The module and the config of a section."""
    text = (ROOT / 'docs' / 'extending.md').read_text()
    section = re.search(
        rf'^## {title}$(.*?)(?:^## |\Z)', text, re.DOTALL | re.MULTILINE
    )[1]
    code = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    assert len(code) == 2, 'a module and a config'
    return code


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Where each example has trained two steps, by tools/train.py."""
    folder = tmp_path_factory.mktemp('outside')
    write_pictures(folder / 'pictures', 8)
    for title, (module, *_) in SECTIONS.items():
        code, config = blocks(title)
        (folder / f'{module}.py').write_text(code)
        assert PLACEHOLDER in config and f"'{module}'" in config
        (folder / f'{module}_config.py').write_text(
            config.replace(PLACEHOLDER, str(ROOT))
        )
        env = dict(PYTHONPATH=str(folder))
        command = f'train.py {module}_config.py --cfg-options {OPTIONS}'
        tool(command, folder, env)
    return folder / 'work_dirs'


@pytest.mark.parametrize('title', SECTIONS)
def test_an_example_trains(trained, title):
    module, where, name = SECTIONS[title]
    work_dir = trained / f'{module}_config'
    config = (work_dir / f'{module}_config.py').read_text()
    assert f"type='mmdensecl.{name}'" in config
    if where != 'model':
        place = rf'{where}=dict\((temperature=[\d.]+, )?'
        assert re.search(f"{place}type='mmdensecl.{name}'", config)
    assert (work_dir / 'epoch_1.pth').is_file()
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [step['step'] for step in steps] == [1, 2]
    for step in steps:
        parts = [v for k, v in step.items() if k.startswith('loss_')]
        assert len(parts) == 2
        assert step['loss'] == pytest.approx(sum(parts), rel=1e-3)


def test_what_each_example_changes_is_seen_in_its_log(trained):
    """Not only that it ran: what it does differs from what is built in."""

    def last(module):
        (log,) = trained.glob(f'{module}_config/*/vis_data/scalars.json')
        return json.loads(log.read_text().splitlines()[-1])

    # Each cell's positive is at its own position.
    assert last('my_rule')['match_coverage'] == 100
    # Without the positive a loss may fall below zero, and its temperature is
    # another: the two losses do not agree.
    assert last('my_loss')['loss'] != last('my_rule')['loss']
    assert {'loss_cells', 'cells_pos_sim'} <= last('my_method').keys()
    assert 'match_coverage' not in last('my_method')
