# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The choice between the forms, with a pretended kernel and clock."""
import sys
from types import SimpleNamespace

import pytest
import torch

from mmdensecl.models import InfoNCE, QueueStatistics, stream_queue
from mmdensecl.models.modules import l2_normalize
from mmdensecl.models.losses import fastest_form as module

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def args():
    torch.manual_seed(0)
    return (l2_normalize(torch.randn(30, 64)) / 0.2,
            l2_normalize(torch.randn(3000, 64)), True)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that gives what PyTorch does, with a time of its own."""
    monkeypatch.setattr(module, 'fused', lambda *args: stream_queue(*args))

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


@pytest.fixture(params=TYPES)
def dtype(request, monkeypatch):
    monkeypatch.setattr(module, 'product_type', lambda _: request.param)
    return request.param


def test_the_faster_one(args, kernel, said):
    assert module.choose_form(*args) is module.fused
    kernel(2., 1.)
    assert module.choose_form(*args) is stream_queue
    assert 'in Triton (Triton 1000.00 ms, PyTorch 2000.00' in said[0][0]
    assert 'in PyTorch (Triton 2000.00 ms, PyTorch 1000.00' in said[1][0]


@pytest.mark.parametrize('change', [
    lambda x: x._replace(total=1.3 * x.total),
    lambda x: x._replace(weighted=0 * x.weighted),
    lambda x: x._replace(weighted=-x.weighted),
    lambda x: x._replace(weighted=1.05 * x.weighted),
    lambda x: x._replace(weighted=x.weighted.roll(1, 0)),
    lambda x: x._replace(weighted=x.weighted.roll(1, 1)),
    lambda x: x._replace(peak=x.peak * torch.nan),
    lambda x: x._replace(weighted=x.weighted * torch.inf),
])
def test_never_one_that_is_wrong(args, kernel, said, dtype, monkeypatch,
                                 change):
    """Not even by what a rough comparison of small numbers would miss."""
    monkeypatch.setattr(module, 'fused', lambda *x: change(stream_queue(*x)))
    assert module.choose_form(*args) is stream_queue
    assert 'gives other numbers' in said[0][0]


def test_rounding_is_not_wrong(args, dtype):
    query, queue, _ = args
    rounded = stream_queue(
        query.to(dtype).float(),
        queue.to(dtype).float(), True)
    assert module.agree(stream_queue(*args), rounded, dtype)


def test_without_the_mean(args):
    a, b = (stream_queue(*args[:2], x) for x in (False, True))
    assert module.agree(a, b, torch.float32)
    wrong = QueueStatistics(a.peak, 2 * a.total, None)
    assert not module.agree(a, wrong, torch.float32)


def test_a_kernel_that_does_not_run(args, kernel, said, monkeypatch):

    def missing(*_):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(module, 'fused', missing)
    assert module.choose_form(*args) is stream_queue
    assert 'does not run here (ModuleNotFoundError: No module' in said[0][0]


class TestFastestForm:

    def test_no_choice_on_a_cpu(self, args):
        assert module.fastest_form(*args) is stream_queue

    @pytest.fixture
    def choices(self, monkeypatch):
        """Tensors that say they are on a GPU, and how often it was chosen."""
        made = []
        monkeypatch.setattr(module, '_CHOSEN', {})
        monkeypatch.setattr(module, 'product_type', lambda x: x.dtype)
        monkeypatch.setattr(module, 'choose_form',
                            lambda *x: made.append(x) or module.fused)
        return made

    @staticmethod
    def on_gpu(rows, dtype=torch.float32):
        return SimpleNamespace(
            device=torch.device('cuda'), dtype=dtype, shape=(rows, 4))

    def test_once_for_each_shape(self, choices):
        for rows in (3, 3, 5, 3, 5):
            form = module.fastest_form(self.on_gpu(rows), self.on_gpu(9), True)
            assert form is module.fused
        assert len(choices) == 2

    def test_float64(self, choices):
        query, queue = (self.on_gpu(x, torch.float64) for x in (3, 9))
        assert module.fastest_form(query, queue, True) is stream_queue
        assert not choices

    def test_deterministic(self, choices, monkeypatch):
        monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled',
                            lambda: True)
        query, queue = self.on_gpu(3), self.on_gpu(9)
        assert module.fastest_form(query, queue, True) is stream_queue
        assert not choices


def test_seconds(args, monkeypatch):
    """The first of four runs does not count, and the shortest does."""
    clock, takes = [0.], [9., 3., 1., 2.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: clock[0])

    def form(*_):
        clock[0] += takes.pop(0)

    assert module.seconds(form, *args) == 1
    assert not takes


def test_product_type(args):
    query = args[0]
    assert module.product_type(query) == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert module.product_type(query) == torch.bfloat16


def test_the_kernel_gets_autocast_s_type(args, monkeypatch):
    seen = []

    def kernel(query, queue, with_weighted):
        seen.append((query.dtype, queue.dtype))
        return stream_queue(query.float(), queue.float(), with_weighted)

    monkeypatch.setitem(sys.modules,
                        'mmdensecl.models.losses.queue_statistics_triton',
                        SimpleNamespace(queue_statistics_triton=kernel))
    rows = l2_normalize(torch.randn(3, 5)).requires_grad_()
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss = InfoNCE(form='triton')(rows, rows, rows).loss
        assert loss.dtype == torch.float32
        loss.sum().backward()
        assert rows.grad.dtype == torch.float32
    assert seen == [(torch.float32, ) * 2, (torch.bfloat16, ) * 2]
