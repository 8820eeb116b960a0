"""The reference on disk: the numbers of the model, found by content, whatever happened before."""

import pytest
import tiny
import torch

from prefloop.logps import CachedLogps, Scorer, cached_reference, model_identity
from prefloop.logps import cache as module
from prefloop.types import score


def live(rows):
    with torch.no_grad():
        return score(Scorer(tiny.llama()), rows)


class Counting(torch.nn.Module):
    """A scorer that counts the rows it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = Scorer(tiny.llama())
        self.rows = 0

    def forward(self, batch):
        self.rows += len(batch)
        return self.scorer(batch)


def cached(rows, path, scorer=None):
    return cached_reference(scorer or Counting(), rows, path, "tiny")


def test_a_cached_reference_says_what_the_live_model_says_for_any_batch(tmp_path):
    rows = tiny.batch(9)
    reference = cached(rows, tmp_path)
    for batch in (rows, rows[::-2], rows[3:4]):
        found, expected = reference(batch), live(batch)
        torch.testing.assert_close(found.token, expected.token, rtol=0, atol=2e-5)
        assert torch.equal(found.mask, expected.mask)


def test_nothing_is_scored_twice(tmp_path):
    rows = tiny.batch(6)
    first, second, third = Counting(), Counting(), Counting()
    cached(rows, tmp_path, first)
    cached([*rows, *rows], tmp_path, second)
    more = tiny.batch(2, seed=5)
    cached([*rows, *more], tmp_path, third)
    assert (first.rows, second.rows, third.rows) == (6, 0, 2)


def test_a_kill_between_shards_loses_only_what_was_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)
    rows = tiny.batch(8, responses=(2,))
    cache = CachedLogps(tmp_path / "tiny")
    next(iter(cache.add(Counting(), rows, 64)))  # the first shard, then the process is gone
    (tmp_path / "tiny" / ".shard-torn.part").write_bytes(b"half")
    (tmp_path / "tiny" / "shard-torn.npy").write_bytes(b"without an index")
    again = Counting()
    reference = cached(rows, tmp_path, again)
    assert 0 < again.rows < 8
    torch.testing.assert_close(reference(rows).token, live(rows).token, rtol=0, atol=2e-5)


def test_other_weights_have_another_identity_and_an_adapter_changes_nothing():
    model, other = tiny.llama(), tiny.llama(seed=1)
    before = model_identity(model)
    assert before == model_identity(tiny.llama())
    assert before != model_identity(other)
    adapted = tiny.lora(model)
    assert model_identity(adapted.get_base_model()) == before


def test_a_row_that_was_never_scored_is_no_silent_zero(tmp_path):
    reference = cached(tiny.batch(2), tmp_path)
    with pytest.raises(KeyError):
        reference(tiny.batch(2, seed=9))
