"""One result, bit for bit, however batches are dealt and whatever arrives first; and few nodes are kept."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bntool.data.policies import LeftOut
from bntool.data.shares import Share
from bntool.recalibration.activation_moments import measure
from bntool.recalibration.batch_tree import BatchTree, Measured, find_runs
from bntool.recalibration.moments import Tally, put_side_by_side, take_apart

CHANNELS = (3, 5)


@functools.cache
def measured(position):
    """Of two layers, of which the second runs in some batches only; every seventh batch is left out."""
    if position % 7 == 3:
        return Measured(left_out=(LeftOut(f"batch {position}", 4),))
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(position)) * (1 + position) + position
    first = Tally.of(measure(values[:, :3]))
    second = Tally.of(measure(values[:, 3:])) if position % 3 == 0 else None
    return Measured(put_side_by_side([first, second], CHANNELS), order=(0, 1) if second else (0,), samples=4, batches=1)


def bits(result):
    tally = result.tally
    arrays = (tally.pooled.mean, tally.pooled.squares, tally.means.mean, tally.means.squares, tally.variances)
    counts = (tally.pooled.count.tolist(), tally.means.count.tolist(), result.samples, result.batches)
    return [array.tobytes() for array in arrays], counts, result.order, result.left_out


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 64), st.randoms(use_true_random=False), st.booleans())
def test_the_same_bits_for_all_shards_and_orders(total, shards, order, knows_length):
    one = BatchTree()
    for position in range(total):
        one.add(position, measured(position))
    trees = []
    for shard in range(shards):
        share = Share(shard, shards)
        if knows_length:
            positions = list(share.find_run(total))
        else:
            positions = [p for p, _ in zip(share.list_positions(), range(total), strict=False) if p < total]
        tree = BatchTree()
        for position in positions:
            tree.add(position, measured(position))
        trees.append(tree)
    order.shuffle(trees)
    together = BatchTree()
    for tree in trees:
        together.update(tree.nodes)
    assert together.nodes.keys() == one.nodes.keys()
    assert bits(together.finish()) == bits(one.finish())


def test_a_merged_tree_holds_the_moments_of_all_values():
    tree, values = BatchTree(), torch.randn(50, 16, 3, dtype=torch.float64) * 3 + 100
    for position in random.Random(1).sample(range(50), 50):
        tally = Tally.of(measure(values[position]))
        tree.add(position, Measured(put_side_by_side([tally], [3]), (0,), 16, 1))
    (found,) = take_apart(tree.finish().tally, [3])
    everything = values.reshape(-1, 3).numpy()
    assert (found.positions, found.calls) == (800, 50)
    np.testing.assert_allclose(found.pooled.mean, everything.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.pooled.unbiased_variance, everything.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(found.means.unbiased_variance, values.mean(1).numpy().var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.variances / 50, values.numpy().var(1, ddof=1).mean(0), rtol=1e-13)


@pytest.mark.parametrize(("start", "count"), [(0, 1000), (1, 1000), (777, 4096)])
def test_a_run_is_kept_as_few_nodes(start, count):
    tree = BatchTree()
    for position in range(start, start + count):
        tree.add(position, Measured())
        assert len(tree.nodes) <= 2 * math.log2(count) + 2
    assert find_runs(tree.nodes) == [range(start, start + count)]


@pytest.mark.parametrize("shares", [1, 2, 7, 64])
@pytest.mark.parametrize("total", [10, 1000, 20_000])
def test_shares_of_a_list_of_unknown_length_are_even_and_few_blocks(shares, total):
    seen, nodes = [], []
    for shard in range(shares):
        tree, positions = BatchTree(), []
        for position in Share(shard, shares).list_positions():
            if position >= total:
                break
            positions.append(position)
            tree.add(position, Measured())
        seen.append(positions)
        nodes.append(len(tree.nodes))
    assert sorted(p for positions in seen for p in positions) == list(range(total))
    sizes = [len(positions) for positions in seen]
    assert max(sizes) - min(sizes) <= 1 + total / shares / 8
    assert max(nodes) <= 16 + 16 * math.log2(max(total / shares, 2))


def test_shards_and_their_ranks_are_shares_of_the_same_list():
    for total in (5, 64, 1000):
        for ranks in (1, 2, 3):
            runs = [Share(shard, 4, rank, ranks).find_run(total) for shard in range(4) for rank in range(ranks)]
            assert [p for run in runs for p in run] == list(range(total))
            assert [Share(2, 4).find_run(total)[0:1]] == [runs[2 * ranks][0:1]] or not runs[2 * ranks]
    assert list(Share(1, 4, start=300).find_run(1000)) == list(range(300, 500))
