# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Code in the documents runs."""
import re
from pathlib import Path

import torch

from mmdensecl.registry import TASK_UTILS

ROOT = Path(__file__).parents[1]


def test_matching_rule_of_contributing(build_tiny):
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    code = re.search(r'```python\n(.*?)```', text, re.DOTALL).group(1)
    try:
        exec(code, {})
        model = build_tiny(correspondence=dict(type='mmdensecl.SameCell'))
    finally:
        TASK_UTILS.module_dict.pop('SameCell', None)
    seen, rule = [], model.correspondence

    def spy(*args):
        seen.append(rule(*args))
        return seen[-1]

    spy.reads_backbone = rule.reads_backbone
    model.correspondence = spy
    outputs = model.loss([torch.rand(2, 3, 32, 32) for _ in range(2)])
    assert outputs['loss_dense'] > 0
    cells = seen[0].index.size(1)
    assert torch.equal(seen[0].index, torch.arange(cells).expand(2, -1))
    assert outputs['match_distinct'] == 100
