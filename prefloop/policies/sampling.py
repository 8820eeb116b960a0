"""Answers drawn from a policy, its reference, or a mixture of their logits.

    z = a * log pi_theta + b * log pi_ref,   y_t ~ warp(softmax(z))

Mixing comes first and warping (temperature, top-k, top-p) after. A prompt is encoded once for all
its answers. An answer depends on (seed, prompt, its number) and on nothing else: not on the other
prompts, on how many answers are asked for, or on how many are decoded side by side (up to rounding
of the matrix products, whose last bits may depend on the number of rows).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefloop.errors import UserError
from prefloop.policies.policy import Policy
from prefloop.policies.readers import Needs, Reader, readers
from prefloop.policies.settings import Sampling

NUCLEUS = 1024  # likeliest tokens that are looked at first for top-p


class Blend(NamedTuple):
    """Coefficients of the two models' logits: policy * log pi_theta + reference * log pi_ref."""

    policy: float
    reference: float

    def __str__(self) -> str:
        if self == POLICY:
            return "policy"
        if self == REFERENCE:
            return "reference"
        return f"{self.policy:g} policy {self.reference:+g} reference"


POLICY = Blend(1.0, 0.0)
REFERENCE = Blend(0.0, 1.0)


@runtime_checkable
class Sampler(Protocol):
    """Which distribution each answer of a prompt comes from."""

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """One `Blend` for each of `count` answers to a prompt; `rng` belongs to that prompt."""
        ...


@dataclass(frozen=True)
class FromPolicy:
    """Every answer from the policy: on-policy data."""

    def blends(self, count: int, rng: np.random.Generator) -> tuple[Blend, ...]:
        """`count` times the policy."""
        return (POLICY,) * count


PLAIN = Sampling()
ON_POLICY = FromPolicy()


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        tokens: the answer, the token that ended it included.
        text: the answer without special tokens.
        finished: it ended by itself; otherwise it was cut at the longest length.
        logp: log-probability of each token under the mixture, before warping, in nats.
        drawn_logp: the same after warping: what the token was really drawn with. Importance
            weights need this one.
        policy_logp: under the policy, before warping; None where the policy was not run.
        sampler: where it came from: "policy", "reference" or the mixture.
    """

    tokens: tuple[int, ...]
    text: str
    finished: bool
    logp: tuple[float, ...]
    drawn_logp: tuple[float, ...]
    policy_logp: tuple[float, ...] | None
    sampler: str


class Place(NamedTuple):
    """Answer number `answer` to prompt number `prompt`."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class _Row:
    """An answer to decode: `weight` of each source's logits, and what `Sample.sampler` says."""

    place: Place
    weight: tuple[float, ...]
    sampler: str


Sources = Callable[[bool], AbstractContextManager[Sequence[Reader]]]
"""Readers of a batch, given whether a prompt is padded; their logits are stacked."""


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    settings: Sampling = PLAIN,
    seed: int = 0,
    sampler: Sampler = ON_POLICY,
) -> list[list[Sample]]:
    """`n` answers to each prompt.

    Args:
        policy: the model, and its reference where the sampler needs one.
        prompts: token ids of each rendered prompt, special tokens included. Equal prompts get
            equal answers; for more answers ask for more.
        n: answers a prompt.
        settings: temperature and its kin.
        seed: answers are a function of it and of the prompt.
        sampler: which distribution each answer comes from.

    Raises:
        UserError: an empty prompt, one that leaves no room for an answer, a sampler that needs a
            reference the policy does not have.
    """
    answers: dict[Place, Sample] = dict(iter_samples(policy, prompts, n, settings, seed, sampler))
    return [
        [answers[Place(prompt, answer)] for answer in range(n)] for prompt in range(len(prompts))
    ]


def iter_samples(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    settings: Sampling = PLAIN,
    seed: int = 0,
    sampler: Sampler = ON_POLICY,
) -> Iterator[tuple[Place, Sample]]:
    """The answers of `sample` as they are finished, batch by batch; short prompts come first."""
    if n < 1:
        raise UserError(f"n must be at least 1 answer a prompt, got {n}")
    _refuse_bad_prompts(policy, prompts)
    groups: dict[Needs, list[_Row]] = {}
    for index, prompt in enumerate(prompts):
        blends = sampler.blends(n, np.random.default_rng(_key(seed, prompt, "sampler")))
        for answer, blend in enumerate(blends):
            needs = Needs(reference=blend.reference != 0, policy=blend.policy != 0)
            weight = tuple(value for value in (blend.reference, blend.policy) if value)
            row = _Row(Place(index, answer), weight or (0.0,), str(blend))
            groups.setdefault(needs, []).append(row)
    for needs, group in groups.items():
        sources = partial(readers, policy, needs)
        for place, one in _batches(policy, prompts, group, sources, settings, seed):
            yield place, one if needs.policy else replace(one, policy_logp=None)


@dataclass(frozen=True)
class Pool:
    """softmax(sum_s weight_s z_s), z_s the logits of a source: models that read the same tokens."""

    sources: Sources
    weight: tuple[float, ...]


def sample_pool(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    n: int,
    settings: Sampling,
    seed: int,
    pool: Pool,
) -> list[list[Sample]]:
    """`n` answers of `pool` to each prompt, as `sample` draws them.

    Args:
        policy: whose tokenizer, context and device are used.
    """
    _refuse_bad_prompts(policy, prompts)
    places = [Place(index, answer) for index in range(len(prompts)) for answer in range(n)]
    rows = [_Row(place, pool.weight, "pool") for place in places]
    drawn = dict(_batches(policy, prompts, rows, pool.sources, settings, seed))
    return [
        [replace(drawn[Place(index, answer)], policy_logp=None) for answer in range(n)]
        for index in range(len(prompts))
    ]


def _batches(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    rows: list[_Row],
    sources: Sources,
    settings: Sampling,
    seed: int,
) -> Iterator[tuple[Place, Sample]]:
    """The answers of `rows`, short prompts first, `settings.rows` side by side."""
    rows.sort(key=lambda row: (len(prompts[row.place.prompt]), row.place))
    for start in range(0, len(rows), settings.rows):
        batch = rows[start : start + settings.rows]
        yield from _decode(policy, prompts, batch, sources, settings, seed)


def _refuse_bad_prompts(policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index + 1}: has no token; an answer needs one before it")
        if policy.context is not None and len(prompt) >= policy.context:
            raise UserError(
                f"prompt {index + 1}: {len(prompt)} tokens leave no room for an answer in the "
                f"model's context of {policy.context}. Shorten it"
            )


def derived_seed(*of: int | str) -> int:
    """A seed, in [0, 2^63), that is a function of `of` and of nothing else."""
    said = "/".join(map(str, of))
    return int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "little") >> 1


def _key(seed: int, prompt: Sequence[int], answer: int | str) -> int:
    return derived_seed(seed, answer, ",".join(map(str, prompt)))


@torch.no_grad()
def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[_Row],
    sources: Sources,
    settings: Sampling,
    seed: int,
) -> Iterator[tuple[Place, Sample]]:
    table = _Table(policy, prompts, rows, settings, seed)
    with sources(not bool(table.mask.all())) as read:
        logits = torch.cat([reader.read(table.prompts, table.mask) for reader in read])
        logits = logits[:, table.prompt_of]
        for reader in read:
            reader.select(table.prompt_of, of=len(table.prompts))
        table.mask = table.mask[table.prompt_of]
        while True:
            tokens = table.draw(logits)
            if table.ended.all():
                break
            tokens = table.drop_ended(tokens, read)
            logits = torch.cat([reader.read(tokens.unsqueeze(-1), table.mask) for reader in read])
    yield from table.samples()


class _Table:
    """The answers of a batch while they grow. R rows are alive, A answers are asked for.

    Attributes:
        prompts, mask: the distinct prompts, padded on the left; later what each row has read.
        prompt_of: which prompt each answer belongs to.
        alive: the answer that each row decodes.
        ended: which rows are done and wait to be dropped.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[_Row],
        settings: Sampling,
        seed: int,
    ) -> None:
        device = policy.device
        self.policy, self.rows, self.settings = policy, rows, settings
        used = list(dict.fromkeys(row.place.prompt for row in rows))
        pad = policy.tokenizer.pad_token_id
        assert isinstance(pad, int)
        self.prompts, self.mask = _left_padded([prompts[index] for index in used], pad, device)
        self.prompt_of = torch.tensor([used.index(row.place.prompt) for row in rows], device=device)
        self.stops = torch.tensor(sorted(policy.stop_tokens), device=device)
        lengths = [len(prompts[row.place.prompt]) for row in rows]
        room = [(policy.context or 2**62) - length for length in lengths]
        self.limit = torch.tensor([min(settings.max_new_tokens, r) for r in room], device=device)
        keys = [_key(seed, prompts[row.place.prompt], row.place.answer) for row in rows]
        self.rngs = [torch.Generator(device).manual_seed(key) for key in keys]
        self.weight = torch.tensor([row.weight for row in rows], device=device)
        count = (len(rows), settings.max_new_tokens)
        self.tokens = torch.zeros(count, dtype=torch.long, device=device)
        self.logps = torch.zeros(3, *count, device=device)
        self.lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.alive = torch.arange(len(rows), device=device)
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.step = 0

    def draw(self, logits: Float[Tensor, "S R V"]) -> Int[Tensor, " R"]:
        """The next token of each row that is alive, written down with its log-probabilities."""
        mixed = mix(logits, self.weight[self.alive])
        drawn = warp(mixed, self.settings)
        tokens = race(drawn, [self.rngs[index] for index in self.alive.tolist()])
        going, at = ~self.ended, (self.alive, self.step)
        self.tokens[at] = torch.where(going, tokens, self.tokens[at])
        for kind, table in enumerate((mixed, drawn, logits[-1])):
            self.logps[kind][at] = token_logps(table, tokens)
        self._refuse_no_numbers(self.logps[0][at])
        self.step += 1
        self.lengths[self.alive] += going
        stopped = torch.isin(tokens, self.stops)
        self.finished[self.alive] |= going & stopped
        self.ended |= stopped | (self.step >= self.limit[self.alive])
        return tokens

    def drop_ended(self, tokens: Int[Tensor, " R"], sources: Sequence[Reader]) -> Int[Tensor, " C"]:
        """Forget rows that are done, once they are a quarter: dropping copies the caches."""
        # A row that is done reads on until it is dropped; masked, its positions stop growing.
        self.mask = torch.cat([self.mask, ~self.ended.unsqueeze(-1)], dim=-1)
        if 4 * int(self.ended.sum()) < len(self.ended):
            return tokens
        keep = (~self.ended).nonzero().flatten()
        for reader in sources:
            reader.select(keep, of=len(self.alive))
        self.alive, self.mask = self.alive[keep], self.mask[keep]
        self.ended = self.ended[keep]
        return tokens[keep]

    def _refuse_no_numbers(self, logps: Float[Tensor, " R"]) -> None:
        bad = (~logps.isfinite()).nonzero().flatten().tolist()
        if bad:
            place = self.rows[int(self.alive[bad[0]])].place
            raise UserError(
                f"prompt {place.prompt + 1}: the model's log-probabilities are not finite at token "
                f"{self.step + 1} of the answer. Did its training diverge?"
            )

    def samples(self) -> Iterator[tuple[Place, Sample]]:
        """The answers, in the order of the rows."""
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        for index, row in enumerate(self.rows):
            end = lengths[index]
            tokens = tuple(self.tokens[index, :end].tolist())
            logp, drawn, policy = (tuple(kind[index, :end].tolist()) for kind in self.logps)
            shown = tokens[:-1] if finished[index] else tokens
            yield (
                row.place,
                Sample(
                    tokens=tokens,
                    text=str(self.policy.tokenizer.decode(list(shown), skip_special_tokens=True)),
                    finished=finished[index],
                    logp=logp,
                    drawn_logp=drawn,
                    policy_logp=policy,
                    sampler=row.sampler,
                ),
            )


def mix(logits: Float[Tensor, "S R V"], weight: Float[Tensor, "R S"]) -> Float[Tensor, "R V"]:
    """sum_s weight_s z_s for each row; raw logits do, since constants cancel in a softmax."""
    if logits.shape[0] == 1:
        return logits[0] * weight
    return (logits * weight.T.unsqueeze(-1)).sum(0)


def warp(logits: Float[Tensor, "R V"], settings: Sampling) -> Float[Tensor, "R V"]:
    """Temperature, then top-k, then top-p; what cannot be drawn is -inf."""
    if settings.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        lowest = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if settings.top_p < 1:
        lowest = _lowest_in_nucleus(logits, settings.top_p)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return logits


def _lowest_in_nucleus(logits: Float[Tensor, "R V"], top_p: float) -> Float[Tensor, "R 1"]:
    """Smallest logit among the likeliest tokens that together reach `top_p`; equals are kept."""
    total = logits.logsumexp(-1, keepdim=True)
    for count in (min(NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        likely = logits.topk(count).values  # the whole vocabulary is sorted only where it matters
        probability = (likely - total).exp()
        before = probability.cumsum(-1) - probability  # of the likelier tokens; 0 for the likeliest
        if count == logits.shape[-1] or bool((before[:, -1] >= top_p).all()):
            break
    return likely.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)


def race(logits: Float[Tensor, "R V"], rngs: Sequence[torch.Generator]) -> Int[Tensor, " R"]:
    """Token v of row r with probability softmax(logits_r)_v, drawn with the row's own generator.

        y = argmax_v p_v / E_v,   E_v independent exponentials

    The Gumbel trick without its second logarithm. A change of the logits in their last bits
    changes a draw only where two tokens all but tie; inverting the cumulative sum would change it
    wherever the unlikely tokens lie densely, so that answers would depend on the batch's size.
    """
    waiting = torch.empty_like(logits)
    for row, rng in zip(waiting, rngs, strict=True):
        row.uniform_(generator=rng)
    return (logits.softmax(-1) / waiting.log_().neg_()).argmax(-1)


def token_logps(logits: Float[Tensor, "R V"], tokens: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """log softmax(logits) of one token a row, in nats."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "R L"], Bool[Tensor, "R L"]]:
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        tokens[index, longest - len(prompt) :] = torch.tensor(prompt)
        mask[index, longest - len(prompt) :] = True
    return tokens.to(device), mask.to(device)
