# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch

from mmdensecl.models import FeatureQueue


def numbered(start, count, dim=2):
    """Keys that are told apart by their number."""
    return torch.arange(start, start + count)[:, None].expand(-1, dim).float()


class TestFeatureQueue:
    def test_starts_with_random_directions(self):
        queue = FeatureQueue(50, 3)
        assert queue.negatives.shape == (50, 3)
        torch.testing.assert_close(queue.negatives.norm(dim=1), torch.ones(50))
        # All directions, not one corner: the mean of 50 is near 0.
        assert (queue.negatives.mean(dim=0).abs() < 0.4).all()
        assert len(queue) == 50
        assert queue.pointer == 0 and queue.fill == 0

    @pytest.mark.parametrize('length', [1, 3, 7])
    @pytest.mark.parametrize(
        'sizes', [(1, 1, 1, 1), (2, 5, 3), (7, 7), (9, 1, 0, 4), (20, 2)]
    )
    def test_against_one_by_one(self, length, sizes):
        queue = FeatureQueue(length, 2)
        rows, pointer, number = queue.negatives.tolist(), 0, 1
        for size in sizes:
            queue.enqueue(numbered(number, size))
            for i in range(number, number + size):
                rows[pointer] = [i, i]
                pointer = (pointer + 1) % length
            number += size
            assert queue.negatives.tolist() == rows
            assert queue.pointer == pointer
            assert queue.fill == pytest.approx(min(1, (number - 1) / length))

    def test_backward_finds_the_negatives_of_its_forward(self):
        """Enqueue comes before the backward pass of a step."""
        queue = FeatureQueue(3, 2)
        before = queue.negatives.clone()
        query = torch.ones(1, 2, requires_grad=True)
        score = (query @ queue.negatives.t()).exp().sum()
        queue.enqueue(numbered(1, 3))
        score.backward()
        expected = before.sum(dim=1).exp() @ before
        torch.testing.assert_close(query.grad[0], expected)
        assert queue.negatives.tolist() == numbered(1, 3).tolist()

    def test_state_dict_is_up_to_date(self):
        queue, keys = FeatureQueue(3, 2), numbered(1, 2).bfloat16()
        queue.enqueue(keys.requires_grad_())
        keys.detach().zero_()  # it keeps a copy
        assert queue.negatives.dtype == torch.float32
        assert not queue.negatives.requires_grad
        queue.enqueue(numbered(3, 2))
        state = queue.state_dict()
        assert state['keys'].tolist() == [[4, 4], [2, 2], [3, 3]]
        assert state['enqueued'] == 4

    def test_loading_forgets_what_was_enqueued(self):
        queue = FeatureQueue(3, 2)
        saved = FeatureQueue(3, 2).state_dict()
        queue.enqueue(numbered(1, 2))
        queue.load_state_dict(saved)
        assert torch.equal(queue.negatives, saved['keys'])
        assert queue.pointer == 0

    def test_resize(self):
        queue = FeatureQueue(4, 3)
        queue.enqueue(numbered(1, 3, 3))
        queue.resize(7)
        assert queue.negatives.shape == (7, 3)
        torch.testing.assert_close(queue.negatives.norm(dim=1), torch.ones(7))
        assert queue.pointer == 0 and queue.fill == 0
        assert set(queue.state_dict()) == {'keys', 'enqueued'}
