"""A reward on a causal language model: a number read off the last token of a response.

The engine of `prefloop.logps` does the work: the prompt goes through the model once for all its
responses, and a model that cannot share a prompt is served one response a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prefloop.data import encoder
from prefloop.errors import UserError
from prefloop.logps import TOKENS, Scorer
from prefloop.logps.layout import Sheet, buckets, table_shape
from prefloop.logps.ways import FullLogits, OneARow, Way
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.rewards.scoring import Prompt
from prefloop.types import Comparison, Tokenized, score


class RewardScorer(nn.Module):
    """The reward of each response: head . (last hidden state at its last token), float32.

    Its last token is the end of its turn. It is a scorer in the sense of `prefloop.types.score`,
    with one "token" a response that holds the reward, so that `Logps.sum` is the reward and the one
    trainer trains it.

    Args:
        engine: the scorer of the model's log-probabilities; lends its way through the model.
        head: (1, D) linear layer, no bias: a constant of the reward means nothing.
    """

    def __init__(self, engine: Scorer, head: nn.Linear):
        super().__init__()
        self.engine = engine
        self.head = head

    def forward(
        self, batch: Sequence[Tokenized]
    ) -> tuple[Float[Tensor, "B N 1"], Bool[Tensor, "B N 1"]]:
        """rewards (B, N, 1) and which responses exist (B, N, 1)."""
        way = self._way(batch)
        count, width, longest = table_shape(batch)
        parts, places = [], []
        for sheet in self.engine.sheets(way, batch):
            ends = _ends(sheet, longest)
            parts.append(way.states(self.engine.model, ends))
            places.append(ends.place)
        states = torch.cat(parts)
        rewards = self.head(states.to(self.head.weight.dtype)).squeeze(-1).float()
        place = torch.cat(places).to(rewards.device)
        table = rewards.new_zeros(count * width).index_copy(0, place, rewards)
        exists = torch.zeros(count * width, dtype=torch.bool, device=rewards.device)
        exists[place] = True
        return table.reshape(count, width, 1), exists.reshape(count, width, 1)

    def _way(self, batch: Sequence[Tokenized]) -> Way:
        way = self.engine.way_for(batch)
        return OneARow() if isinstance(way, FullLogits) else way


def _ends(sheet: Sheet, longest: int) -> Sheet:
    """The sheet with just the last token of every response as what is asked for.

    `source` is that token itself, and `place` a flat index into (B, N).
    """
    segment = sheet.segment
    following = torch.full_like(segment, -1)
    following[:, :-1] = segment[:, 1:]
    ends = ((segment > 0) & (segment != following)).flatten().nonzero().flatten()
    place = (sheet.place // longest).unique_consecutive()
    return replace(sheet, source=ends, target=sheet.tokens.flatten()[ends], place=place)


def new_head(width: int, seed: int) -> nn.Linear:
    """A head of random weights from `seed`, of the size that gives rewards of about 1."""
    head = nn.Linear(width, 1, bias=False)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=rng) / width**0.5)
    return head


def hidden_width(policy: Policy) -> int:
    """Size of the states that a head reads."""
    return int(policy.base.config.get_text_config().hidden_size)


@dataclass(frozen=True, eq=False)
class CausalMembers:
    """K heads on causal models: on K adapters of one base, or on K models.

    Attributes:
        policies: the model of each member; with adapters K times the same.
        adapters: the adapter of each member, None where the model is whole.
        heads: one a member.
        token_budget: tokens of one forward pass.
    """

    policies: tuple[Policy, ...]
    adapters: tuple[str | None, ...]
    heads: tuple[nn.Linear, ...]
    token_budget: int = TOKENS

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[tuple[float, ...], ...]]:
        """K rewards for each response of each prompt; one without text is its end of turn."""
        comparisons = [
            Comparison(prompt=prompt, responses=tuple(texts), id=f"prompt {number}")
            for number, (prompt, texts) in enumerate(zip(prompts, responses, strict=True), 1)
        ]
        rows = encoder(self.policies[0].tokenizer).as_answers(comparisons)
        _refuse_too_long(rows, self.policies[0].context)
        tables = [self._rewards(member, rows) for member in range(len(self.heads))]
        return [
            tuple(tuple(table[index][place] for table in tables) for place in range(len(texts)))
            for index, texts in enumerate(responses)
        ]

    @torch.no_grad()
    def _rewards(self, member: int, rows: Sequence[Tokenized]) -> list[list[float]]:
        policy, adapter = self.policies[member], self.adapters[member]
        if adapter is not None:
            policy.use_adapter(adapter)
        head = self.heads[member].to(policy.device)
        scorer = RewardScorer(policy.scorer(None), head)
        found: list[list[float]] = [[] for _ in rows]
        with evaluating(policy.model):
            for part in buckets(rows, self.token_budget):
                table = score(scorer, [rows[index] for index in part]).sum.tolist()
                for index, values in zip(part, table, strict=True):
                    found[index] = values
        return found


def _refuse_too_long(rows: Sequence[Tokenized], context: int | None) -> None:
    for row in rows:
        if not row.prompt:
            raise UserError(f"{row.id}: the prompt has no token for this reward; drop the row")
        longest = len(row.prompt) + max(map(len, row.responses))
        if context is not None and longest > context:
            raise UserError(
                f"the reward model reads at most {context} tokens; {row.id} has {longest} with its "
                "longest response. Shorten it, or take another reward model"
            )
