"""What the design of the data can tell of types: the rank of the observable map.

Whoever asks the same few questions of many people learns, at best, the probability of every
combination of answers. Those probabilities are a function of the rewards of each type and of the
shares; where its Jacobian has full rank, nothing close by looks the same (arXiv 2510.15716, Sec.
on identifiability, for the claim; the ranks are ours).
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from prefloop.em import Identifiability, local_identifiability
from prefloop.objectives.listwise import factors
from prefloop.types import Comparison

PARAMETERS = 80
"""About how many rewards are looked at: prompts are added, the most judged first, up to here."""

TOGETHER = 3
"""Judgements of one annotator that are looked at together."""

GROUPS = 300
"""Different groups of questions that are looked at."""

LONGEST = 4
"""Most responses of a question: a ranking of n has n! answers."""


class Question(NamedTuple):
    """Which responses were judged together, and how: their ranks, in order."""

    prompt: int
    responses: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Design:
    """Who was asked what, on the prompts that were judged most.

    Attributes:
        groups: different groups of questions that one annotator answered, `TOGETHER` or fewer each.
        responses: prompt -> how many responses it has.
        judgements: how many judgements are on these prompts.
        prompts: how many prompts the data has.
    """

    groups: tuple[tuple[Question, ...], ...]
    responses: dict[int, int]
    judgements: int
    prompts: int

    def parameters(self, types: int) -> int:
        """Rewards up to a constant of each prompt, for every type, and the shares."""
        return types * sum(count - 1 for count in self.responses.values()) + types - 1


def design_of(rows: Iterable[Comparison], types: int = 2) -> Design | None:
    """The design of what annotators judged; None where there is nothing to look at.

    Questions of more than `LONGEST` responses and ranks with ties above the last place are left
    out: what all their answers could be is too much, or not observed.
    """
    asked: dict[str, list[Question]] = defaultdict(list)
    texts: dict[str, dict[str, int]] = defaultdict(dict)
    prompts: dict[str, int] = {}
    for row in rows:
        if (question := _question(row, prompts, texts)) is not None and row.annotator is not None:
            asked[row.annotator].append(question)
    if not asked:
        return None
    responses = {prompts[prompt]: len(found) for prompt, found in texts.items()}
    kept = _most_judged(asked, responses, PARAMETERS // types)
    here = [[one for one in questions if one.prompt in kept] for questions in asked.values()]
    return Design(
        groups=_groups([questions for questions in here if questions]),
        responses={prompt: responses[prompt] for prompt in sorted(kept)},
        judgements=sum(map(len, here)),
        prompts=len(prompts),
    )


def _groups(asked: list[list[Question]]) -> tuple[tuple[Question, ...], ...]:
    """Different groups, the annotators in turn, so that all of them and all they judged get in."""
    streams = [_together(sorted(set(questions)), number) for number, questions in enumerate(asked)]
    found: dict[tuple[Question, ...], None] = {}
    while streams and len(found) < GROUPS:
        drawn = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, group in drawn if group is not None]
        found |= {group: None for _, group in drawn if group is not None}
    return tuple(found)[:GROUPS]


def _together(questions: list[Question], seed: int) -> Iterator[tuple[Question, ...]]:
    """Groups of one annotator: all where they are few, else shuffled and cut, again and again."""
    if len(questions) <= 2 * TOGETHER:
        yield from combinations(questions, min(TOGETHER, len(questions)))
        return
    rng = random.Random(seed)
    for _ in range(GROUPS):
        order = rng.sample(questions, len(questions))
        for start in range(0, len(order), TOGETHER):
            yield tuple(sorted(order[start : start + TOGETHER]))


def observable_rank(
    design: Design, types: int = 2, opposite: bool = False, seed: int = 0
) -> Identifiability:
    """Rank of the map from rewards and shares to the probabilities of all answers of all groups.

    Taken at random rewards and shares, so that a rank below the number of parameters is the
    design's and not a coincidence's. Full rank means locally identified, from enough people.

    Args:
        design: what was asked.
        types: K.
        opposite: take it where the second type wants the opposite of the first and both are equally
            common, the case that pairs are blind to; every further type is random.
        seed: of the rewards.
    """
    rng = torch.Generator().manual_seed(seed)
    point = 1.3 * torch.randn(design.parameters(types), generator=rng, dtype=torch.float64)
    if opposite:
        point[: types - 1] = 0
        rewards = point[types - 1 :].unflatten(0, (types, -1))
        rewards[1] = -rewards[0]
    return local_identifiability(lambda at: _observed(design, types, at), point)


def _observed(design: Design, types: int, point: Tensor) -> Tensor:
    shares = torch.cat([point[: types - 1], point.new_zeros(1)]).softmax(-1)
    free = point[types - 1 :].unflatten(0, (types, -1))
    rewards, place = {}, 0
    for prompt, count in design.responses.items():
        part = free[:, place : place + count - 1]
        rewards[prompt] = torch.cat([torch.zeros_like(part[:, :1]), part], -1)
        place += count - 1
    known: dict[Question, Tensor] = {}
    seen = []
    for group in design.groups:
        joint = shares.unsqueeze(-1)  # (K, outcomes so far)
        for question in group:
            if question not in known:
                known[question] = _answers(question, rewards[question.prompt])
            joint = (joint.unsqueeze(-1) * known[question].unsqueeze(1)).flatten(1)
        seen.append(joint.sum(0))
    return torch.cat(seen)


def _answers(question: Question, reward: Tensor) -> Tensor:
    """Probability (K, O) of every answer to a question under each type."""
    orders = sorted(set(permutations(question.ranks)))
    rank = torch.tensor(orders)
    given = reward[:, list(question.responses)]  # (K, N)
    return torch.stack(
        [(-factors(one.expand(len(orders), -1), rank).sum(-1)).exp() for one in given]
    )


def _question(
    row: Comparison, prompts: dict[str, int], texts: dict[str, dict[str, int]]
) -> Question | None:
    ranks = row.rank or ()
    judged = [place for place, rank in enumerate(ranks) if rank is not None]
    places = sorted({ranks[place] for place in judged}, key=lambda rank: rank or 0)
    if row.annotator is None or len(places) < 2 or len(judged) > LONGEST:
        return None
    order = sorted(places.index(ranks[place]) + 1 for place in judged)
    above = Counter(rank for rank in order if rank < len(places))
    if max(above.values()) > 1:
        return None
    prompt = str(row.prompt)
    number, known = prompts.setdefault(prompt, len(prompts)), texts[prompt]
    responses = [known.setdefault(row.responses[place], len(known)) for place in judged]
    return Question(number, tuple(sorted(responses)), tuple(order))


def _most_judged(
    asked: dict[str, list[Question]], responses: dict[int, int], room: int
) -> set[int]:
    """Prompts in order of how much they were judged, as long as their rewards fit; at least one."""
    judged = Counter(question.prompt for questions in asked.values() for question in questions)
    kept: set[int] = set()
    for prompt, _ in sorted(judged.items(), key=lambda found: (-found[1], found[0])):
        if kept and responses[prompt] - 1 > room:
            break
        kept.add(prompt)
        room -= responses[prompt] - 1
    return kept
