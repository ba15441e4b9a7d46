# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The choice between the forms, with a pretended kernel and clock."""
from importlib import import_module

import pytest
import torch

from mmdensecl.models import QueueStatistics, info_nce, stream_queue
from mmdensecl.models.features import l2_normalize
from mmdensecl.models.losses import fastest_form as module


@pytest.fixture
def args():
    torch.manual_seed(0)
    return (l2_normalize(torch.randn(3, 5)) / 0.2,
            l2_normalize(torch.randn(7, 5)), True)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that gives what PyTorch does, with a time of its own."""

    def fused(*args, dtype):
        return stream_queue(*args)

    monkeypatch.setattr(module, 'fused', fused)

    def takes(ours, plain):
        monkeypatch.setattr(
            module, 'seconds', lambda form, *_: plain
            if form is stream_queue else ours)

    takes(1., 2.)
    return takes


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(module, 'print_log',
                        lambda line, **kwargs: lines.append((line, kwargs)))
    return lines


def choose(args, dtype=torch.float32):
    return module.choose_form(*args, dtype)


@pytest.mark.parametrize('dtype', module.TOLERANCE)
def test_the_faster_one(args, kernel, said, dtype):
    assert choose(args, dtype) is not stream_queue
    kernel(2., 1.)
    assert choose(args, dtype) is stream_queue
    assert 'in Triton (Triton 1000.00 ms, PyTorch 2000.00' in said[0][0]
    assert 'in PyTorch (Triton 2000.00 ms, PyTorch 1000.00' in said[1][0]


@pytest.mark.parametrize('change', [
    lambda x: x._replace(total=1.01 * x.total),
    lambda x: x._replace(weighted=x.weighted + 0.01),
    lambda x: x._replace(peak=x.peak * torch.nan),
])
def test_never_one_that_is_wrong(args, kernel, said, monkeypatch, change):
    monkeypatch.setattr(module, 'fused',
                        lambda *x, dtype: change(stream_queue(*x)))
    assert choose(args) is stream_queue
    assert 'gives other numbers' in said[0][0]


def test_sums_too_large_do_not_agree(args):
    right = stream_queue(*args)
    scaled = QueueStatistics(right.peak, 2 * right.total, 2 * right.weighted)
    assert module.agree(right, right, 1e-6)
    assert not module.agree(right, scaled, 1e-3)


def test_a_kernel_that_does_not_run(args, kernel, said, monkeypatch):

    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(module, 'fused', missing)
    assert choose(args) is stream_queue
    assert "does not run here (ModuleNotFoundError: No module" in said[0][0]


def test_no_choice_on_a_cpu(args):
    assert module.fastest_form(*args, torch.float32) is stream_queue


def test_seconds(args):
    assert 0 < module.seconds(stream_queue, *args) < 1


def test_autocast_names_the_type(monkeypatch):
    """What autocast multiplies in reaches the choice; the loss is float32."""
    seen = []

    def choice(query, queue, with_weighted, dtype):
        seen.append((query.dtype, dtype))
        return stream_queue

    # The package's attribute of that name is the function, not the module.
    info_nce_module = import_module('mmdensecl.models.losses.info_nce')
    monkeypatch.setattr(info_nce_module, 'fastest_form', choice)
    rows = l2_normalize(torch.randn(3, 5))
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            assert info_nce(rows, rows, rows).loss.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32),
                    (torch.float32, torch.bfloat16)]
