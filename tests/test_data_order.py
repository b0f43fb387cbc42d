"""The order in which images are read."""

import pytest
import torch

from fastcm.data.order import Order


def test_every_epoch_is_a_permutation_and_epochs_differ():
    order = Order(97, seed=3)
    epochs = [order.span(97 * epoch, 97) for epoch in range(4)]
    assert all(torch.equal(epoch.sort().values, torch.arange(97)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_batch_size_does_not_change_the_order():
    whole = Order(50, seed=0).span(0, 360)
    for size in (1, 9, 60, 180):
        order = Order(50, seed=0)
        assert torch.equal(torch.cat([order.span(start, size) for start in range(0, 360, size)]), whole)


def test_order_of_scattered_samples_equals_the_order_in_sequence():
    order = Order(50, seed=1)
    index = torch.tensor([149, 0, 50, 49, 51, 3, 1000, 50])
    assert torch.equal(order.ids(index), torch.cat([order.span(i, 1) for i in index.tolist()]))
    assert torch.equal(order.ids(torch.arange(40, 130)), order.span(40, 90))


def test_order_after_many_epochs_needs_no_history():
    far = 50 * 10**9
    assert torch.equal(Order(50, seed=1).span(far, 50).sort().values, torch.arange(50))


def test_seeds_give_different_orders_and_the_same_seed_the_same():
    assert torch.equal(Order(50, seed=1).span(0, 50), Order(50, seed=1).span(0, 50))
    assert not torch.equal(Order(50, seed=1).span(0, 50), Order(50, seed=2).span(0, 50))


def test_empty_order_is_refused():
    with pytest.raises(ValueError, match="0 images"):
        Order(0, seed=0)
