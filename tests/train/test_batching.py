"""Every example once an epoch, in an order that the seed alone decides, in the right rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixd_train.batching import IGNORED, Collator, epoch_batches, epoch_steps, share
from prefixd_train.data import Example

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=300)
seeds = st.integers(0, 2**32 - 1)


@given(lengths, st.integers(1, 9), seeds, st.integers(0, 5), st.integers(1, 4))
def test_an_epoch_is_a_permutation_that_the_seed_decides(
    lengths: list[int], batch_size: int, seed: int, epoch: int, processes: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    assert batches == epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    shared = [
        i for batch in batches for rank in range(processes) for i in share(batch, rank, processes)
    ]
    assert sorted(shared) == list(range(len(lengths)))


@given(lengths, st.integers(1, 5), st.integers(1, 5), seeds)
def test_a_step_takes_the_same_examples_however_it_is_cut(
    lengths: list[int], batch_size: int, grad_accum: int, seed: int
) -> None:
    steps = epoch_steps(lengths, batch_size, grad_accum, seed=seed, epoch=2)
    whole = epoch_steps(lengths, batch_size * grad_accum, 1, seed=seed, epoch=2)
    assert [[[i for batch in step for i in batch]] for step in steps] == whole
    assert all(len(batch) <= batch_size for step in steps for batch in step)
    assert len(steps) == -(-len(lengths) // (batch_size * grad_accum))


@given(seeds)
def test_epochs_and_seeds_differ(seed: int) -> None:
    first = epoch_batches([7] * 100, 4, seed=seed, epoch=0)
    assert first != epoch_batches([7] * 100, 4, seed=seed, epoch=1)
    assert first != epoch_batches([7] * 100, 4, seed=seed ^ 1, epoch=0)


def test_batches_are_of_like_lengths() -> None:
    lengths = torch.randint(1, 400, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = epoch_batches(lengths, 8, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)


def test_rows_of_a_decoder() -> None:
    batch = Collator(pad_id=0)([Example([5, 6], [7, 2]), Example([8], [2])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 2], [IGNORED, 2, IGNORED, IGNORED]]
    assert batch.decoder_input_ids is None
    assert batch.num_targets == 3


def test_rows_of_an_encoder_decoder() -> None:
    batch = Collator(pad_id=0, decoder_start_id=1)([Example([5, 6], [7, 2]), Example([8], [2])])
    assert batch.input_ids.tolist() == [[5, 6], [8, 0]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.labels.tolist() == [[7, 2], [2, IGNORED]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[1, 7], [1, 0]]
