# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdensecl.models import (
    InfoNCE,
    info_nce,
    info_nce_reference,
    losses,
    stream_queue,
)
from mmdensecl.models.modules import l2_normalize

BOTH = pytest.mark.parametrize('loss_fn', [info_nce, info_nce_reference])
# Rows, channels, keys in the queue, block: exact, short and single blocks.
SIZES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (5, 3, 11, 4),
    (2, 7, 13, 13),
    (4, 2, 9, 100),
]


def random_rows(*shape, dtype=torch.float64):
    return l2_normalize(torch.randn(*shape, dtype=dtype))


class TestClosedForms:
    @BOTH
    @pytest.mark.parametrize('temperature', [0.07, 0.2, 1.0])
    def test_orthogonal_negatives(self, loss_fn, temperature):
        """Positive at 1, K negatives at 0: log(1 + K exp(-1 / t))."""
        eye = torch.eye(6, dtype=torch.float64)
        result = loss_fn(eye[:2], eye[:2], eye[2:], temperature)
        expected = math.log1p(4 * math.exp(-1 / temperature))
        torch.testing.assert_close(
            result.loss, torch.full((2,), expected).double()
        )
        assert result.positive.tolist() == pytest.approx([1, 1])
        assert result.hardest_negative.tolist() == [0, 0]

    @BOTH
    def test_gradient(self, loss_fn):
        """(sum of p_j k_j - k+) / t, p being the softmax over all keys."""
        query = random_rows(3, 5).requires_grad_()
        key, queue = random_rows(3, 5), random_rows(7, 5)
        weights = torch.tensor([1.0, -2.0, 0.5]).double()
        loss = loss_fn(query, key, queue, temperature=0.3).loss
        (loss * weights).sum().backward()
        for i in range(3):
            keys = [key[i], *queue]
            exps = [
                math.exp(float((query[i].detach() * k).sum()) / 0.3)
                for k in keys
            ]
            mean = sum(e * k for e, k in zip(exps, keys, strict=True)) / sum(
                exps
            )
            torch.testing.assert_close(
                query.grad[i], weights[i] * (mean - key[i]) / 0.3
            )


class TestSeveralPositives:
    """Keys of shape (M, k, D)."""

    @BOTH
    def test_against_loops(self, loss_fn):
        """None of a row's positives is a negative of another."""
        query, key = random_rows(3, 5), random_rows(3 * 4, 5).view(3, 4, 5)
        queue = random_rows(7, 5)
        result = loss_fn(query, key, queue, temperature=0.3)
        assert result.loss.shape == result.positive.shape == (3, 4)
        for i in range(3):
            others = [float(query[i] @ k) for k in queue]
            for j in range(4):
                cosine = float(query[i] @ key[i, j])
                e = [math.exp(x / 0.3) for x in (cosine, *others)]
                assert result.loss[i, j].item() == pytest.approx(
                    -math.log(e[0] / sum(e))
                )
                assert result.positive[i, j].item() == pytest.approx(cosine)
            assert result.hardest_negative[i].item() == pytest.approx(
                max(others)
            )


class TestStreaming:
    @pytest.mark.parametrize('k', [None, 1, 3])
    @pytest.mark.parametrize('m, d, n, block', SIZES)
    def test_equals_reference(self, m, d, n, block, k):
        """Value and gradient, of one positive and of k in a row."""
        key = random_rows(*((m, d) if k is None else (m, k, d)))
        query, queue = random_rows(m, d).requires_grad_(), random_rows(n, d)
        results = [
            info_nce_reference(query, key, queue, 0.1),
            info_nce(query, key, queue, 0.1, block),
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        gradients = [
            torch.autograd.grad((x.loss**2).sum(), query)[0] for x in results
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize('k', [None, 4])
    @pytest.mark.parametrize('m, d, n, block', SIZES[1:3])
    def test_gradcheck(self, m, d, n, block, k):
        key = random_rows(*((m, d) if k is None else (m, k, d)))
        queue = random_rows(n, d)
        query = torch.randn(m, d, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: info_nce(x, key, queue, 0.2, block).loss, query
        )

    @BOTH
    def test_no_gradient_into_keys_or_queue(self, loss_fn):
        query, key, queue = (
            random_rows(n, 3).requires_grad_() for n in (2, 2, 5)
        )
        loss_fn(query, key, queue).loss.sum().backward()
        assert query.grad.abs().sum() > 0
        assert key.grad is None and queue.grad is None


class TestExtremes:
    @BOTH
    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    def test_logits_of_1e4(self, loss_fn, dtype):
        """Positive far above, far below and between; all logits +-1e4."""
        query = torch.tensor([[1.0], [1.0], [-1.0], [1.0]], dtype=dtype)
        query.requires_grad_()
        key = torch.tensor([[1e4], [-1e4], [1e4], [0.0]], dtype=dtype)
        queue = torch.tensor([[-1e4], [-1e4], [-1e4]], dtype=dtype)
        result = loss_fn(query, key, queue, temperature=1.0)
        result.loss.sum().backward()
        expected = [0.0, math.log(4), 2e4 + math.log(3), 0.0]
        assert result.loss.tolist() == pytest.approx(expected, rel=1e-6)
        # Mean key less positive key: only the third row is pulled.
        assert query.grad.flatten().tolist() == pytest.approx([0, 0, -2e4, 0])


class TestPrecision:
    def test_autocast(self):
        """Products with the queue are rounded to bfloat16, sums are not."""
        query, key, queue = (random_rows(n, 16) for n in (6, 6, 4000))
        query.requires_grad_()
        exact = info_nce_reference(query, key, queue)
        (right,) = torch.autograd.grad(exact.loss.sum(), query)
        single = query.detach().float().requires_grad_()
        rows = single, key.float(), queue.float()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            result = info_nce(*rows, block_size=100)
        (grad,) = torch.autograd.grad(result.loss.sum(), single)
        assert all(x.dtype == torch.float32 for x in (*result, grad))
        # The positives are exact, and the errors of 4,000 products cancel.
        torch.testing.assert_close(result.positive.double(), exact.positive)
        torch.testing.assert_close(
            result.loss.double(), exact.loss, rtol=1e-3, atol=0
        )
        assert (grad - right).norm() < 1e-2 * right.norm()
        plain = info_nce(*rows, block_size=100)
        assert not torch.equal(result.loss, plain.loss)


class MemoryLedger(TorchDispatchMode):
    """Books every tensor that operators make, but for those given.

    Attributes:
        largest: Number of elements of the largest tensor.
        peak: Largest sum of the bytes alive at one time.
    """

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.booked = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata in self.known:
                    continue
                self.largest = max(self.largest, x.numel())
                if storage._cdata not in self.booked:
                    # A weak reference keeps the address from being reused.
                    self.booked[storage._cdata] = (
                        StorageWeakRef(storage),
                        storage.nbytes(),
                    )
        self.booked = {
            address: (ref, size)
            for address, (ref, size) in self.booked.items()
            if not ref.expired()
        }
        alive = sum(size for _, size in self.booked.values())
        self.peak = max(self.peak, alive)
        return out


class TestMemory:
    ROWS, DIM, BLOCK = 24, 4, 32

    def measure(self, loss_fn, queue_len, **kwargs):
        query, key = (
            random_rows(self.ROWS, self.DIM, dtype=torch.float32)
            for _ in range(2)
        )
        queue = random_rows(queue_len, self.DIM, dtype=torch.float32)
        query.requires_grad_()
        ledger = MemoryLedger(query, key, queue)
        with ledger:
            loss_fn(query, key, queue, **kwargs).loss.mean().backward()
        assert query.grad.abs().sum() > 0
        return ledger

    def test_streaming_does_not_grow_with_the_queue(self):
        short = self.measure(info_nce, 128, block_size=self.BLOCK)
        long = self.measure(info_nce, 4096, block_size=self.BLOCK)
        assert long.largest <= self.ROWS * self.BLOCK
        assert long.peak == short.peak
        # Logits of one block, its temporaries, and a few vectors a row.
        assert long.peak <= 4 * self.ROWS * (3 * self.BLOCK + 8 * self.DIM)

    def test_reference_grows_with_the_queue(self):
        """So the test above can fail."""
        short = self.measure(info_nce_reference, 128)
        long = self.measure(info_nce_reference, 4096)
        assert long.largest >= self.ROWS * 4096
        assert long.peak > 16 * short.peak

    def test_blocks_of_queries(self, monkeypatch):
        """More queries than are of one block, and a last few."""
        query, queue = random_rows(11, 3), random_rows(9, 3)
        whole = stream_queue(query, queue)
        monkeypatch.setattr(losses, 'MAX_ROWS', 4)
        for a, b in zip(stream_queue(query, queue), whole, strict=True):
            torch.testing.assert_close(a, b)

    def test_blocks_are_bounded(self, monkeypatch):
        """By a number of logits, whatever the batch; also in the module."""
        monkeypatch.setitem(losses.MAX_LOGITS, 'cpu', self.ROWS * self.BLOCK)
        for loss_fn in (info_nce, InfoNCE()):
            largest = self.measure(loss_fn, 4096).largest
            assert largest == self.ROWS * self.BLOCK
