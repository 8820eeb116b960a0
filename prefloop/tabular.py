"""The exact world: policies over a finite response set, in float64, with exact expectations.

A policy here is an `nn.Module` with `logp()`: log pi(y|x) of every response of every prompt, over
`(*problems, Y)`. It is a scorer too, so the trainer and the objectives that train language models
run on it unchanged; `expected_loss` is what they would see with infinitely many pairs.

To add a policy: a module with `logp()` and a `forward` that ends in `pick`.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefloop.objectives.family import PairLoss
from prefloop.types import Logps, Pair, Tokenized


class TabularPolicy(nn.Module):
    """One free logit a response: pi(y|x) = softmax_y(logits[x]).

    Attributes:
        logits: (*problems, Y); the leading axes are problems, prompts, seeds: anything that does
            not share a normalizer.
    """

    def __init__(self, logits: Float[Tensor, "*problems Y"]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def logp(self) -> Float[Tensor, "*problems Y"]:
        """log pi(y|x) of every response, in nats."""
        return self.logits.log_softmax(-1)

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, Tensor]:
        """(token, mask) over (B, N, 1), for rows made by `comparison_rows`."""
        return pick(self.logp(), batch)


class LogLinearPolicy(nn.Module):
    """pi(y|x) proportional to pi_base(y|x) exp(features(x, y) . weight); starts at the base.

    Attributes:
        features: (*problems, Y, D).
        base: (*problems, Y), log-probabilities at weight zero.
        weight: broadcasts against (*problems, D); a size of 1 shares it over that axis, as one
            `weight` for all prompts of a problem does.
    """

    features: Tensor
    base: Tensor

    def __init__(
        self,
        features: Float[Tensor, "*problems Y D"],
        base: Float[Tensor, "*problems Y"],
        weight: Float[Tensor, "*shared D"],
    ) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("base", base)
        self.weight = nn.Parameter(weight.detach().clone())

    def logp(self) -> Float[Tensor, "*problems Y"]:
        """log pi(y|x) of every response, in nats."""
        return (self.base + log_linear(self.features, self.weight)).log_softmax(-1)

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, Tensor]:
        """(token, mask) over (B, N, 1), for rows made by `comparison_rows`."""
        return pick(self.logp(), batch)


class AutoregressivePolicy(nn.Module):
    """A free logit for every next token after every prefix, with all V^T sequences enumerated.

    Prefixes are numbered level by level, and within a level as base-V numbers: the empty one is 0,
    (a,) is 1 + a, (a, b) is 1 + V + a V + b. Sequence (a, b, c) is number a V^2 + b V + c.

    Attributes:
        logits: (*problems, nodes, V), nodes = 1 + V + ... + V^(length - 1).
        length: tokens of every response.
    """

    def __init__(self, logits: Float[Tensor, "*problems nodes V"], length: int) -> None:
        super().__init__()
        vocabulary = logits.shape[-1]
        assert logits.shape[-2] == sum(vocabulary**level for level in range(length))
        self.logits = nn.Parameter(logits.detach().clone())
        self.length = length

    def logp(self) -> Float[Tensor, "*problems Y"]:
        """log pi(y) of all V^T sequences, in nats."""
        return sequence_logp(self.logits.log_softmax(-1), self.length)

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, Tensor]:
        """(token, mask) over (B, N, T); a response is its T tokens, a prompt is its indices."""
        table = self.logits.log_softmax(-1)
        vocabulary = table.shape[-1]
        device = table.device
        responses = torch.tensor([row.responses for row in batch], device=device)  # (B, N, T)
        prompts = torch.tensor([row.prompt for row in batch], device=device).unbind(-1)
        lead = [axis.unsqueeze(-1).expand_as(responses[..., 0]) for axis in prompts]
        start, number, tokens = 0, torch.zeros_like(responses[..., 0]), []
        for position in range(self.length):
            token = responses[..., position]
            tokens.append(table[(*lead, start + number, token)])
            number = number * vocabulary + token
            start += vocabulary**position
        stacked = torch.stack(tokens, -1)
        return stacked, torch.ones_like(stacked, dtype=torch.bool)


def log_linear(
    features: Float[Tensor, "*problems Y D"], weight: Float[Tensor, "*shared D"]
) -> Float[Tensor, "*problems Y"]:
    """features . weight for every response."""
    return torch.einsum("...yd,...d->...y", features, weight)


def sequence_logp(
    node_logp: Float[Tensor, "*problems nodes V"], length: int
) -> Float[Tensor, "*problems Y"]:
    """log pi of all V^length sequences: next-token log-probabilities summed down the prefix tree.

    It sums whatever it is given: token-level log-ratios give the log-ratio of whole sequences.
    """
    vocabulary = node_logp.shape[-1]
    total = torch.zeros_like(node_logp[..., 0, :1])
    start = 0
    for level in range(length):
        size = vocabulary**level
        nodes = node_logp[..., start : start + size, :]
        total = (total.unsqueeze(-1) + nodes).flatten(-2)
        start += size
    return total


def comparison_rows(
    prompt: Int[Tensor, "B A"],
    responses: Int[Tensor, "B N"],
    rank: Int[Tensor, "B N"],
) -> list[Tokenized]:
    """Rows that a tabular policy can score: the prompt is its indices, a response one token.

    Args:
        prompt: an index for each leading axis of the policy's table.
        responses: which responses are compared.
        rank: 1 = best, as in `Comparison`.
    """
    columns = zip(prompt.tolist(), responses.tolist(), rank.tolist(), strict=True)
    return [
        Tokenized(
            prompt=tuple(place),
            responses=tuple((answer,) for answer in answers),
            rank=tuple(ranks),
            id=f"row-{number}",
            place=f"row {number}",
        )
        for number, (place, answers, ranks) in enumerate(columns)
    ]


def pick(table: Float[Tensor, "*problems Y"], batch: Sequence[Tokenized]) -> tuple[Tensor, Tensor]:
    """(token, mask) over (B, N, 1) of the responses in `batch`; short rows are padded."""
    width = max(len(row.responses) for row in batch)
    exists = torch.tensor(
        [[place < len(row.responses) for place in range(width)] for row in batch],
        device=table.device,
    )
    padding = ((0,),) * width
    answers = torch.tensor(
        [[answer[0] for answer in (row.responses + padding)[:width]] for row in batch],
        device=table.device,
    )
    prompts = torch.tensor([row.prompt for row in batch], device=table.device)  # (B, axes)
    lead = [axis.unsqueeze(-1).expand_as(answers) for axis in prompts.unbind(-1)]
    token = torch.where(exists, table[(*lead, answers)], 0.0)
    return token.unsqueeze(-1), exists.unsqueeze(-1)


def as_logps(logp: Float[Tensor, "*shape"], length: Int[Tensor, "*shape"] | None = None) -> Logps:
    """`Logps` of whole responses: one token each, or `length` equal tokens where length matters."""
    if length is None:
        token = logp.unsqueeze(-1)
        return Logps(token, torch.ones_like(token, dtype=torch.bool))
    positions = torch.arange(int(length.max()), device=logp.device)
    mask = positions < length.unsqueeze(-1)
    return Logps(torch.where(mask, (logp / length).unsqueeze(-1), 0.0), mask)


def pair_of(
    logp: Float[Tensor, "*shape Y"],
    chosen: Int[Tensor, "*shape C"],
    rejected: Int[Tensor, "*shape C"],
    length: Int[Tensor, "*shape Y"] | None = None,
) -> Pair:
    """The `Pair` of C (chosen, rejected) response indices of each problem, flat over P."""

    def side(index: Tensor) -> Logps:
        lengths = None if length is None else length.gather(-1, index).flatten()
        return as_logps(logp.gather(-1, index).flatten(), lengths)

    return Pair(side(chosen), side(rejected))


def all_pairs(
    logp: Float[Tensor, "*problems Y"], length: Int[Tensor, "*problems Y"] | None = None
) -> Pair:
    """The `Pair` of all ordered (chosen, rejected) of all problems, flat: P = problems Y Y."""

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        square = (*values.shape, values.shape[-1])
        return (
            values.unsqueeze(-1).expand(square).flatten(),
            values.unsqueeze(-2).expand(square).flatten(),
        )

    chosen, rejected = sides(logp)
    if length is None:
        return Pair(as_logps(chosen), as_logps(rejected))
    first, second = sides(length)
    return Pair(as_logps(chosen, first), as_logps(rejected, second))


def expected_loss(
    objective: PairLoss,
    policy: Float[Tensor, "*problems Y"],
    reference: Float[Tensor, "*problems Y"] | None,
    weight: Float[Tensor, "*problems Y Y"],
    length: Int[Tensor, "*problems Y"] | None = None,
) -> Float[Tensor, "*problems"]:
    """Exact expected loss of a pairwise objective over all ordered pairs of each problem.

        sum over (y, y') of weight[y, y'] objective(chosen = y, rejected = y')

    Args:
        objective: any of `prefloop.objectives` that compares two responses.
        policy, reference: log-probabilities; gradients flow through `policy`.
        weight: probability (or rate) that y is shown with y' and preferred to it; no gradient.
        length: tokens of each response, for objectives that divide by it; one token when None.
    """
    base = None if reference is None else all_pairs(reference, length)
    losses = objective(all_pairs(policy, length), base)
    return (losses.unflatten(0, weight.shape) * weight.detach()).sum((-1, -2))


def independent_pairs(
    chosen: Float[Tensor, "*problems Y"], rejected: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems Y Y"]:
    """Pair weights when y_w and y_l are drawn on their own: exp(chosen[y] + rejected[y'])."""
    return (chosen.unsqueeze(-1) + rejected.unsqueeze(-2)).exp()


def labelled_pairs(
    shown: Float[Tensor, "*problems Y Y"], reward: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems Y Y"]:
    """Pair weights when the pair (y, y') is shown and a Bradley-Terry label then orders it.

    `shown` is a probability over ordered pairs; the label is y > y' with probability
    sigmoid(reward[y] - reward[y']), so the weight of "y preferred to y'" is that times
    shown[y, y'] + shown[y', y].
    """
    preferred = (reward.unsqueeze(-1) - reward.unsqueeze(-2)).sigmoid()
    return (shown + shown.mT) * preferred


def entropy(logp: Float[Tensor, "*problems Y"]) -> Float[Tensor, "*problems"]:
    """- sum p log p, in nats."""
    return -(logp.exp() * logp).sum(-1)


def kl(
    first: Float[Tensor, "*problems Y"], second: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems"]:
    """KL(first || second) of two log-probability tables, in nats."""
    return (first.exp() * (first - second)).sum(-1)


def renyi(
    first: Float[Tensor, "*problems Y"],
    second: Float[Tensor, "*problems Y"],
    order: Float[Tensor, "*problems"],
) -> Float[Tensor, "*problems"]:
    """Renyi divergence of any order > 0, in nats; the KL divergence at order 1.

    D = log(sum first^order second^(1 - order)) / (order - 1)
    """
    one = (order - 1).abs() < 1e-9
    away = torch.where(one, 2.0, order)
    power = away.unsqueeze(-1) * first + (1 - away).unsqueeze(-1) * second
    return torch.where(one, kl(first, second), power.logsumexp(-1) / (away - 1))


def jensen_shannon(
    first: Float[Tensor, "*problems Y"], second: Float[Tensor, "*problems Y"]
) -> Float[Tensor, "*problems"]:
    """Jensen-Shannon divergence: mean KL of both to their mixture, in [0, log 2] nats."""
    middle = torch.logaddexp(first, second) - torch.log(torch.full_like(first, 2.0))
    return 0.5 * (kl(first, middle) + kl(second, middle))


def random_logp(
    shape: tuple[int, ...], rng: torch.Generator, spread: float = 1.0
) -> Float[Tensor, "*problems Y"]:
    """Log-probabilities softmax(N(0, spread^2)) in float64, full support."""
    return (spread * torch.randn(shape, generator=rng, dtype=torch.float64)).log_softmax(-1)


def population_optimum(
    objective: PairLoss,
    reference: Float[Tensor, "*problems Y"],
    weight: Float[Tensor, "*problems Y Y"],
    length: Int[Tensor, "*problems Y"] | None = None,
    steps: int = 500,
) -> Float[Tensor, "*problems Y"]:
    """log pi at the minimum of `expected_loss` over all policies, started at the reference.

    L-BFGS on free logits, all problems at once; for smooth objectives.
    """
    policy = TabularPolicy(reference)
    optimizer = torch.optim.LBFGS(
        policy.parameters(),
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(objective, policy.logp(), reference, weight, length).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - torch's stub wants a float
    return policy.logp().detach()


def anneal(policy: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Adam whose step falls from `lr` to zero along a cosine, in place.

    Args:
        policy: any module of this file.
        loss: the loss at a step number: exact, or of freshly drawn pairs.
        steps: how many.
        lr: first step size.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
