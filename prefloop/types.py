"""The nouns of the project. Everything else is a function between them.

Shape letters, used in every annotation of the package:

    B  comparisons in a batch     N  responses of a comparison, padded      P  pairs
    T  response tokens, padded    K  annotator types                        V  vocabulary
    D  hidden or feature size     M  any flat list of tokens                S  input positions
    R  rows of a forward pass

Log-probabilities are natural logs (nats). Masks are True where something exists.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefloop.errors import UserError as UserError

PerPair: TypeAlias = Float[Tensor, " P"]
PerComparison: TypeAlias = Float[Tensor, " B"]
PerResponse: TypeAlias = Float[Tensor, "B N"]
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Comparison:
    """One prompt, its responses, and what somebody thought of them.

    Attributes:
        prompt: plain text, or a tuple of chat messages ({"role", "content"}).
        responses: the texts, N >= 2 of them (N >= 1 where `label` judges single responses).
        rank: one integer a response, 1 = best; equal = not ordered against each other; None in a
            place = that response was not judged. None as a whole = nobody ranked them.
        scores: a number a response (a reward, higher is better), or None.
        label: good (True) or bad (False) for each response, for unpaired objectives, or None.
        annotator: who judged, or None.
        weight: how much it counts in a loss, >= 0.
        id: unique in its file; made from the place when the file has none.
        place: "file:line", for messages.
        extra: other columns of the row, carried from stage to stage untouched.
        ensemble: what each of K reward models gives each response (N tuples of K), or None.
        finished: whether each response ended by itself; one that was cut at a length is followed by
            nothing, and gets no end-of-turn token. None: all of them did.
    """

    prompt: str | tuple[Mapping[str, str], ...]
    responses: tuple[str, ...]
    rank: tuple[int | None, ...] | None = None
    scores: tuple[float, ...] | None = None
    label: tuple[bool, ...] | None = None
    annotator: str | None = None
    weight: float = 1.0
    id: str = ""
    place: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    ensemble: tuple[tuple[float, ...], ...] | None = None
    finished: tuple[bool, ...] | None = None

    @property
    def ends(self) -> tuple[bool, ...]:
        """Whether each response ended by itself, also where nobody said so."""
        return (True,) * len(self.responses) if self.finished is None else self.finished

    def picked(self, places: Sequence[int]) -> "Comparison":
        """The row with the responses at `places`, in that order, and what is known of each.

        `extra` stays as it is: nobody knows which of its columns have an entry a response.
        """

        def at(entries: tuple[Entry, ...] | None) -> tuple[Entry, ...] | None:
            return None if entries is None else tuple(entries[place] for place in places)

        return replace(
            self,
            responses=tuple(self.responses[place] for place in places),
            rank=at(self.rank),
            scores=at(self.scores),
            label=at(self.label),
            ensemble=at(self.ensemble),
            finished=at(self.finished),
        )


@dataclass(frozen=True)
class Tokenized:
    """A `Comparison` in tokens; the boundary between prompt and response is fixed here.

    Attributes:
        prompt: token ids of the rendered prompt, BOS included where the model wants one.
        responses: token ids of each response, with the end-of-turn token where it finished.
        rank: as in `Comparison`, 0 where not judged.
        scores, label, annotator, weight, id, place, ensemble: as in `Comparison`; a label of None
            is a response that nobody labelled.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rank: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None
    label: tuple[bool | None, ...] | None = None
    annotator: str | None = None
    weight: float = 1.0
    id: str = ""
    place: str = ""
    ensemble: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of response tokens, with their mask.

    The leading shape is (B, N) where a model scored comparisons, (P,) on one side of a `Pair`.

    Attributes:
        token: log p(y_t | x, y_<t), in nats; exactly 0 outside `mask`.
        mask: which positions belong to the response; a response that does not exist is all False.
        collision: log sum_v p(v | x, y_<t)^2 a token, for objectives that need it (WPO), or None.
        embeddings: input embeddings that the log-probabilities were computed from, in their graph,
            for objectives that differentiate by them (WassersteinDPO), or None. S is whatever input
            positions the scorer counts to a response. `at` leaves them out: a picked copy would not
            be in the graph.
    """

    token: Float[Tensor, "*shape T"]
    mask: Bool[Tensor, "*shape T"]
    collision: Float[Tensor, "*shape T"] | None = None
    embeddings: Float[Tensor, "*shape S D"] | None = None

    @property
    def sum(self) -> Float[Tensor, "*shape"]:
        """log p(y | x), in nats."""
        return self.token.sum(-1)

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """log p(y | x) / |y|, in nats per token; 0 for a response that does not exist."""
        return self.token.sum(-1) / self.length.clamp(min=1)

    @property
    def length(self) -> Int[Tensor, "*shape"]:
        """Number of response tokens."""
        return self.mask.sum(-1)

    @property
    def exists(self) -> Bool[Tensor, "*shape"]:
        """Which responses exist: a ragged N is padded with responses of no token."""
        return self.mask.any(-1)

    def at(self, *index: Tensor) -> "Logps":
        """The `Logps` of the responses at `index` (one index tensor a leading axis)."""
        picked = None if self.collision is None else self.collision[index]
        return Logps(self.token[index], self.mask[index], picked)

    def to(self, device: torch.device | str) -> "Logps":
        """The same numbers on `device`."""
        collision = None if self.collision is None else self.collision.to(device)
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return Logps(self.token.to(device), self.mask.to(device), collision, embeddings)

    def detach(self) -> "Logps":
        """The same numbers without a gradient."""
        collision = None if self.collision is None else self.collision.detach()
        return Logps(self.token.detach(), self.mask, collision)


class Pair(NamedTuple):
    """Chosen (y_w) and rejected (y_l) responses to the same prompts, each over (P, T)."""

    chosen: Logps
    rejected: Logps


class Rewards(NamedTuple):
    """Reward of the chosen and of the rejected response of each pair."""

    chosen: PerPair
    rejected: PerPair

    @property
    def margin(self) -> PerPair:
        """chosen - rejected."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Judgement:
    """What somebody thought of a batch of comparisons, as tensors.

    Attributes:
        rank: 1 = best, equal = not ordered against each other, 0 = not judged or does not exist.
        scores: a number a response, NaN where there is none.
        label: 1 good, 0 bad, -1 not labelled.
        weight: how much each comparison counts.
        ensemble: scores of each of K reward models, NaN for a response that does not exist, or None
            unless every comparison has them.
    """

    rank: Int[Tensor, "B N"]
    scores: Float[Tensor, "B N"]
    label: Int[Tensor, "B N"]
    weight: Float[Tensor, " B"]
    ensemble: Float[Tensor, "B N K"] | None = None

    def to(self, device: torch.device | str) -> "Judgement":
        """The same judgements on `device`."""
        return Judgement(
            rank=self.rank.to(device),
            scores=self.scores.to(device),
            label=self.label.to(device),
            weight=self.weight.to(device),
            ensemble=None if self.ensemble is None else self.ensemble.to(device),
        )


def judgement(batch: Sequence[Tokenized], device: torch.device | str = "cpu") -> Judgement:
    """The judgements of a batch, padded to its largest number of responses."""
    width = max(len(row.responses) for row in batch)

    def padded(values: Iterable[int | float] | None, fill: int | float) -> list[int | float]:
        values = [] if values is None else list(values)
        return values + [fill] * (width - len(values))

    return Judgement(
        rank=torch.tensor([padded(row.rank, 0) for row in batch], device=device),
        scores=torch.tensor(
            [padded(row.scores, float("nan")) for row in batch],
            dtype=torch.float32,
            device=device,
        ),
        label=torch.tensor(
            [padded(None if row.label is None else map(_code, row.label), -1) for row in batch],
            device=device,
        ),
        weight=torch.tensor([row.weight for row in batch], dtype=torch.float32, device=device),
        ensemble=_ensemble([row.ensemble for row in batch], width, device),
    )


def _ensemble(
    sets: Sequence[tuple[tuple[float, ...], ...] | None],
    width: int,
    device: torch.device | str,
) -> Tensor | None:
    present = [scores for scores in sets if scores is not None]
    if len(present) < len(sets):
        return None
    models = len(present[0][0])
    if unequal := [len(scores[0]) for scores in present if len(scores[0]) != models]:
        raise UserError(
            f"rows of one batch have scores of {models} and of {unequal[0]} reward models; give "
            "every response a score of each, in one order"
        )
    absent = (float("nan"),) * models
    padded = [[*scores, *([absent] * (width - len(scores)))] for scores in present]
    return torch.tensor(padded, dtype=torch.float32, device=device)


def _code(label: bool | None) -> int:
    return -1 if label is None else int(label)


def ordered_pairs(
    rank: Int[Tensor, "B N"],
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Every strictly ordered pair: (comparison, better response, worse response), in row order."""
    judged = rank > 0
    better = (rank.unsqueeze(-1) < rank.unsqueeze(-2)) & judged.unsqueeze(-1) & judged.unsqueeze(-2)
    row, chosen, rejected = better.nonzero(as_tuple=True)
    return row, chosen, rejected


def score(scorer: nn.Module, batch: Sequence[Tokenized]) -> Logps:
    """What `scorer` says of `batch`.

    A scorer is a module whose forward takes a batch of `Tokenized` and returns plain tensors
    (token, mask) or (token, mask, collision): plain, since wrappers for data-parallel and sharded
    training look for tensors in what a module returns.
    """
    return Logps(*scorer(batch))
