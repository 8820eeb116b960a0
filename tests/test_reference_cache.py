"""The reference on disk: the numbers of the model, found by content, whatever happened before."""

import pytest
import tiny
import torch

from prefloop.logps import CachedLogps, Scorer, cached_reference, model_identity
from prefloop.logps import cache as module
from prefloop.types import UserError, score


def live(rows):
    with torch.no_grad():
        return score(Scorer(tiny.llama()), rows)


class Counting(torch.nn.Module):
    """A scorer that counts the rows it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = Scorer(tiny.llama())
        self.rows = self.responses = 0

    def forward(self, batch):
        self.rows += len(batch)
        self.responses += sum(len(row.responses) for row in batch)
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


def test_only_the_responses_that_are_new_are_scored(tmp_path):
    first, wider = tiny.row(5, [3, 4], seed=1), tiny.row(5, [3, 4, 6], seed=1)
    assert first.responses == wider.responses[:2]
    cached([first], tmp_path)
    counting = Counting()
    reference = cached([wider], tmp_path, counting)
    assert counting.responses == 1
    torch.testing.assert_close(reference([wider]).token, live([wider]).token, rtol=0, atol=2e-5)


def test_a_kill_loses_only_what_was_not_written_and_torn_files_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_A_SHARD", 0.0)
    rows = tiny.batch(8, responses=(2,))
    scoring = CachedLogps(tmp_path / "tiny").add(Counting(), rows, 64)
    next(scoring)  # the first shard is on disk; then the process is gone
    (tmp_path / "tiny" / "torn.part").write_bytes(b"half")
    again = Counting()
    reference = cached(rows, tmp_path, again)
    assert 0 < again.rows < 8
    torch.testing.assert_close(reference(rows).token, live(rows).token, rtol=0, atol=2e-5)


def test_what_was_scored_before_an_interruption_is_written(tmp_path):
    rows = tiny.batch(8, responses=(2,))
    scoring = CachedLogps(tmp_path / "tiny").add(Counting(), rows, 64)
    next(scoring)
    with pytest.raises(KeyboardInterrupt):
        scoring.throw(KeyboardInterrupt())
    assert len(CachedLogps(tmp_path / "tiny")) > 0


def test_a_shard_that_cannot_be_read_is_named_with_what_to_do(tmp_path):
    cached(tiny.batch(2), tmp_path)
    (shard,) = (tmp_path / "tiny").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{shard.name}: not a readable shard.*delete this file"):
        cached(tiny.batch(2), tmp_path)


def test_progress_counts_up_to_the_rows_that_were_missing(tmp_path):
    seen = []
    cached_reference(
        Counting(), tiny.batch(5), tmp_path, "tiny", 40, lambda done, all: seen.append((done, all))
    )
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["embed_tokens", "lm_head"]])
def test_an_adapter_counts_while_it_is_on(targets):
    plain = model_identity(tiny.llama())
    adapted = tiny.lora(tiny.llama(), targets=targets)
    assert model_identity(adapted) != plain
    assert model_identity(adapted) != model_identity(
        tiny.lora(tiny.llama(), seed=1, targets=targets)
    )
    with adapted.disable_adapter():
        assert model_identity(adapted) == plain
        assert model_identity(adapted.get_base_model()) == plain


def test_autocast_has_another_identity_since_its_numbers_differ():
    plain = model_identity(tiny.llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_identity(tiny.llama()) != plain
    with torch.autocast("cpu", enabled=False):
        assert model_identity(tiny.llama()) == plain


def test_other_weights_and_another_configuration_have_another_identity():
    plain = model_identity(tiny.llama())
    assert plain == model_identity(tiny.llama())
    assert plain != model_identity(tiny.llama(seed=1))
    assert plain != model_identity(tiny.llama(rms_norm_eps=1e-3))  # the same weights
    assert plain != model_identity(tiny.llama().to(torch.bfloat16))


def test_a_row_that_was_never_scored_is_no_silent_zero(tmp_path):
    reference = cached(tiny.batch(2), tmp_path)
    with pytest.raises(KeyError):
        reference(tiny.batch(2, seed=9))
