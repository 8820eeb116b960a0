"""Model and rows to log-probabilities: the module that trainers, scores and reports call."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefloop.logps.check import difference, suitable
from prefloop.logps.head import LogpsOf, chunked
from prefloop.logps.layout import TOKENS, Sheet, buckets, lay, response_mask, table_shape
from prefloop.logps.ways import FullLogits, OneARow, Way, causal_model, ladder
from prefloop.types import Logps, Tokenized, score

# Which way a model was found to take, so that it is asked once however many scorers it has.
_known: WeakKeyDictionary[nn.Module, Way] = WeakKeyDictionary()


class Scorer(nn.Module):
    """log p(y_t | x, y_<t) of every response token under a causal model, in nats, float32.

    The prompt goes through the model once for all responses; only states that predict a response
    token reach the output layer. On its first batch the scorer compares itself with the model's
    own logits, and serves a model that cannot share prompts in a slower way, with one warning.

    Args:
        model: a causal model of transformers, or one with an adapter of peft's.
        token_budget: tokens of one forward pass; None sends every batch through in one pass
            (sharded training needs equally many passes on every process).
        head: how log-probabilities are computed from states: `chunked`, or `exact` where second
            derivatives are needed.
        with_collision: also return log sum_v p(v)^2, without a gradient.
        way: a way to force, unchecked; the fastest that suits the model when None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        token_budget: int | None = TOKENS,
        head: LogpsOf = chunked,
        with_collision: bool = False,
        way: Way | None = None,
    ):
        super().__init__()
        self.model = model
        self.token_budget = token_budget
        self.head = head
        self.with_collision = with_collision
        self.way = way

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, ...]:
        """token (B, N, T), mask (B, N, T), and collision (B, N, T) if it was asked for."""
        way = self.way_for(batch)
        shape = table_shape(batch)
        sheets = self.sheets(way, batch)
        states = torch.cat([way.states(self.model, sheet) for sheet in sheets])
        device = states.device
        target = torch.cat([sheet.target for sheet in sheets]).to(device)
        place = torch.cat([sheet.place for sheet in sheets]).to(device)
        token, collision = self.head(way.head(self.model), states, target, self.with_collision)
        tables = (_table(token, place, shape), response_mask(batch).to(device))
        return tables if collision is None else (*tables, _table(collision, place, shape))

    def way_for(self, batch: Sequence[Tokenized]) -> Way:
        """The way this model is served; found out with `batch` if it was not yet."""
        if self.way is None:
            base = causal_model(self.model)
            if base not in _known:
                _known[base] = suitable(self.model, ladder(self.model), self.head, batch)
            self.way = _known[base]
        return self.way

    def sheets(self, way: Way, batch: Sequence[Tokenized]) -> list[Sheet]:
        """`batch` as the forward passes it takes."""
        shape = table_shape(batch)
        groups = [list(range(len(batch)))]
        if self.token_budget is not None:
            groups = buckets(batch, self.token_budget, way.rows, padded=way.padded)
        return [
            lay(
                batch,
                [row for index in group for row in way.rows(index, batch[index])],
                shape,
                padded=way.padded,
            )
            for group in groups
        ]


def hidden_sums(scorer: Scorer, batch: Sequence[Tokenized]) -> Float[Tensor, "B N D"]:
    """Sum over a response's tokens of the last hidden state that predicts each, float32.

    States are the ones the output layer reads, after the final norm; 0 for a response that does
    not exist.
    """
    way = scorer.way_for(batch)
    way = OneARow() if isinstance(way, FullLogits) else way
    count, responses, longest = table_shape(batch)
    sums = torch.zeros(count * responses, 0)
    for sheet in scorer.sheets(way, batch):
        states = way.states(scorer.model, sheet).float()
        if not sums.numel():
            sums = states.new_zeros(count * responses, states.shape[-1])
        sums = sums.index_add(0, (sheet.place // longest).to(states.device), states)
    return sums.reshape(count, responses, -1)


def logps_and_hidden_sums(
    scorer: Scorer, batch: Sequence[Tokenized]
) -> tuple[Logps, Float[Tensor, "B N D"]]:
    """What `score` and `hidden_sums` give, from one pass where the model can be served so."""
    way = scorer.way_for(batch)
    if isinstance(way, FullLogits):  # its states are logits
        return score(scorer, batch), hidden_sums(scorer, batch)
    count, responses, longest = shape = table_shape(batch)
    parts, sums = [], torch.zeros(0)
    for sheet in scorer.sheets(way, batch):
        states = way.states(scorer.model, sheet)
        target, place = (one.to(states.device) for one in (sheet.target, sheet.place))
        token, _ = scorer.head(way.head(scorer.model), states, target, False)
        parts.append(_table(token, place, shape))
        if not sums.numel():
            sums = states.new_zeros(count * responses, states.shape[-1], dtype=torch.float32)
        sums = sums.index_add(0, place // longest, states.float())
    mask = response_mask(batch).to(parts[0].device)
    return Logps(torch.stack(parts).sum(0), mask), sums.reshape(count, responses, -1)


def verify(scorer: Scorer, batch: Sequence[Tokenized]) -> float:
    """The largest difference, in nats, between a token's log-probability as `scorer` computes it
    and by the model's own logits one response a row; over the beginnings of two comparisons."""
    gap = difference(scorer.model, scorer.way_for(batch), scorer.head, batch)
    return float(gap.abs().max())


def _table(
    flat: Float[Tensor, " M"], place: Int[Tensor, " M"], shape: tuple[int, int, int]
) -> Float[Tensor, "B N T"]:
    """The flat numbers at their places of a table of zeros."""
    size = shape[0] * shape[1] * shape[2]
    return flat.new_zeros(size).index_copy(0, place, flat).reshape(shape)
