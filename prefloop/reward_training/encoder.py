"""Heads on a frozen sentence encoder, fitted to the whole data at once in float64.

A linear head is a convex problem with one answer; a hidden layer starts from a seed. Both are
solved by L-BFGS. Identical judgements are one row with a larger weight. Each feature loses
its mean and is divided by its standard deviation and by the square root of its width, so that one
number (length) and hundreds (a product of embeddings) weigh alike before the data say more.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from scipy import optimize
from torch import Tensor

from prefloop.data import split
from prefloop.errors import UserError
from prefloop.reward_training.losses import Loss
from prefloop.rewards.encoders import SentenceEncoder
from prefloop.rewards.heads import (
    Head,
    prompt_text,
    read_features,
    refuse_unknown_features,
    widths,
)
from prefloop.rewards.trained import HEAD
from prefloop.types import Comparison, Judgement, Tokenized, judgement

PRIORS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Strengths of the pull to 0 that are tried where none is given."""
INNER = 0.2
"""Share of the prompts on which they are compared."""
ITERATIONS = 300


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderBackbone:
    """Trains heads on what a frozen encoder says of prompt and response.

    Attributes:
        encoder: the frozen encoder.
        loss: what is minimised.
        features: what a head reads, names of `prefloop.rewards.heads.FEATURES`.
        hidden: width of a hidden layer, 0 for a linear head.
        l2: pull of the weights to 0, l2/2 times their squared length beside the mean loss; 0 tries
            `PRIORS` on a fifth of the prompts and takes the best.
        on_texts: told how many texts are embedded.
    """

    encoder: SentenceEncoder
    loss: Loss
    features: tuple[str, ...] = ("response", "product")
    hidden: int = 0
    l2: float = 0.0
    on_texts: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        refuse_unknown_features(self.features)
        for name, value in (("hidden", self.hidden), ("l2", self.l2)):
            if value < 0:
                raise UserError(f"{name} must be 0 or more, got {value}")

    def describe(self) -> Mapping[str, Any]:
        """What reward.json keeps."""
        return {
            "kind": "encoder",
            "encoder": self.encoder.name,
            "identity": self.encoder.identity,
            "features": list(self.features),
        }

    def asking(self) -> AbstractContextManager[None]:
        """Nothing special: heads are trained and asked in float64."""
        return nullcontext()

    def readable(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """All of the rows: an encoder reads any text, and cuts a long one."""
        return list(rows)

    def cut(self, rows: Sequence[Comparison]) -> int:
        """How many different texts of `rows` are longer than what the encoder reads."""
        prompts = {prompt_text(row.prompt) for row in rows}
        return self.encoder.cut([*prompts, *{text for row in rows for text in row.responses}])

    def train(
        self, rows: Sequence[Comparison], held_out: Sequence[Comparison], folder: Path, seed: int
    ) -> Mapping[str, int | float]:
        """Fit one head to `rows` by their weights and save it in `folder`; what it came to."""
        table = Rows(self, rows)
        l2 = self.l2 or self._best_l2(rows, seed)
        head, loss = self.fit(table, l2, seed)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{HEAD}.part"
        save_file(head.tensors(), part)
        part.replace(folder / HEAD)
        held = {"eval_loss": Rows(self, held_out).mean_loss(head)} if held_out else {}
        return {"loss": loss, "l2": l2, **held}

    def fit(self, table: "Rows", l2: float, seed: int) -> tuple[Head, float]:
        """The head that minimises mean loss + l2/2 |weights|^2, and its mean loss."""
        start, build = _parametrised(*table.standard(), self.hidden, seed)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = torch.from_numpy(flat).clone().requires_grad_()
            loss = table.loss(build(weights)) + 0.5 * l2 * weights.square().sum()
            loss.backward()
            assert weights.grad is not None
            return float(loss.detach()), weights.grad.numpy()

        found = optimize.minimize(
            objective, start.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
        )
        head = build(torch.from_numpy(found.x))
        return head, table.mean_loss(head)

    def _best_l2(self, rows: Sequence[Comparison], seed: int) -> float:
        """The strength of the pull that suits prompts which were not fitted best."""
        if len({prompt_text(row.prompt) for row in rows}) < 5:
            return PRIORS[len(PRIORS) // 2]
        inner, outer = split(rows, INNER, seed)
        fitted, asked = Rows(self, inner), Rows(self, outer)
        losses = [asked.mean_loss(self.fit(fitted, l2, seed)[0]) for l2 in PRIORS]
        return PRIORS[int(np.argmin(losses))]


class Rows:
    """Judged rows as tensors: features of each distinct response, and who is compared with whom."""

    def __init__(self, backbone: EncoderBackbone, rows: Sequence[Comparison]) -> None:
        self._loss = backbone.loss
        merged = _merged(rows)
        texts: dict[tuple[str, str], int] = {}
        places = [
            [
                texts.setdefault((prompt_text(row.prompt), text), len(texts))
                for text in row.responses
            ]
            for row in merged
        ]
        width = max(map(len, places))
        self.index: Int[Tensor, "B N"] = torch.tensor(
            [row + [0] * (width - len(row)) for row in places]
        )
        self.judged: Judgement = judgement([_untold(row) for row in merged])
        self.features: Float[Tensor, "U F"] = read_features(
            backbone.encoder, backbone.features, list(texts), backbone.on_texts
        )
        self.widths = widths(backbone.encoder, backbone.features)

    def standard(self) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
        """What is taken from each feature, and what it is divided by then."""
        parts = self.features.split(list(self.widths), dim=-1)
        spread = [part.std(0).clamp(min=1e-6) * part.shape[1] ** 0.5 for part in parts]
        return self.features.mean(0), torch.cat(spread)

    def loss(self, head: Head) -> Float[Tensor, ""]:
        """Weighted mean loss of the rows, in the graph of the head's weights."""
        losses = self._loss.of_rewards(head(self.features)[self.index], self.judged)
        weight = self.judged.weight.double()
        return (losses * weight).sum() / weight.sum()

    @torch.no_grad()
    def mean_loss(self, head: Head) -> float:
        """The same as a number."""
        return float(self.loss(head))


def _parametrised(
    shift: Float[Tensor, " F"], scale: Float[Tensor, " F"], hidden: int, seed: int
) -> tuple[Float[Tensor, " M"], Callable[[Tensor], Head]]:
    """Where the search begins, and how a flat vector becomes a head."""
    width = len(scale)
    if not hidden:
        return torch.zeros(width, dtype=torch.float64), lambda flat: Head(shift, scale, flat)
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(hidden * (width + 2), generator=rng, dtype=torch.float64)
    start[hidden * width :] *= 0.1

    def build(flat: Tensor) -> Head:
        layer, bias, output = flat.split([hidden * width, hidden, hidden])
        return Head(shift, scale, output, layer.reshape(hidden, width), bias)

    return start, build


def _merged(rows: Sequence[Comparison]) -> list[Comparison]:
    """Rows that say the same of the same responses as one, with the sum of their weights."""
    sums: dict[tuple[Any, ...], float] = {}
    first: dict[tuple[Any, ...], Comparison] = {}
    for row in rows:
        key = (prompt_text(row.prompt), row.responses, row.rank, row.scores)
        sums[key] = sums.get(key, 0.0) + row.weight
        first.setdefault(key, row)
    return [replace(first[key], weight=weight) for key, weight in sums.items()]


def _untold(row: Comparison) -> Tokenized:
    """The judgement of a row, in the form that `judgement` reads; its texts are not tokens."""
    return Tokenized(
        prompt=(0,),
        responses=((0,),) * len(row.responses),
        rank=None if row.rank is None else tuple(place or 0 for place in row.rank),
        scores=row.scores,
        weight=row.weight,
    )
