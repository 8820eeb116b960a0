"""EM with a learner that can remember every vote: what frees it from its start?

    python scripts/mixture_remembering.py --seeds 0 1 2 3 4 5

32 annotators of two opposite tastes give 8 votes each on 200 answers. An answer has one number that
tastes are about and 100 random ones, so that a linear reward can explain any vote by itself.
M-steps are solved (Newton); `ridge` is the penalty ridge / 2 |w|^2 that keeps the policy near its
reference. Swept: the ridge, what the E-step reads (prefloop.mixture.EVIDENCE), and the start:
random responsibilities, or clusters that are right about three annotators of four. Prints how many
annotators are in their type after the rounds: the mean over seeds, the least and the most.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefloop import em
from prefloop.heads.linear import maximum
from prefloop.mixture import Evidence, Halves, HeldOut, Trained, Votes
from prefloop.types import Tokenized

PEOPLE, EACH, ANSWERS, NOISE = 32, 8, 200, 100
SHARPNESS = 2.0
"""Log-odds of a vote per unit of what tastes are about."""
EVIDENCE: tuple[Evidence, ...] = (Trained(), Halves(), HeldOut(folds=2), HeldOut(folds=4))


def world(seed: int) -> tuple[Votes, Tensor, Tensor]:
    """Who voted, their types, and features of the better less the worse answer (J, 1 + NOISE)."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.arange(PEOPLE) % 2
    who = torch.arange(PEOPLE).repeat_interleave(EACH)
    features = torch.randn(ANSWERS, 1 + NOISE, generator=rng).double()
    features[:, 1:] *= 0.3
    shown = torch.randint(ANSWERS, (len(who), 2), generator=rng)
    direction = features[shown[:, 0]] - features[shown[:, 1]]
    taste = torch.where(truth[who] == 0, SHARPNESS, -SHARPNESS)
    first = torch.rand(len(who), generator=rng) < (taste * direction[:, 0]).sigmoid()
    direction = torch.where(first.unsqueeze(-1), direction, -direction)
    rows = [Tokenized((0,), ((1,), (2,)), annotator=f"person-{one}") for one in who.tolist()]
    return Votes.of(rows), truth, direction


def starts(truth: Tensor, seed: int) -> dict[str, Tensor]:
    """Responsibilities of the first M-step."""
    rng = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(truth), generator=rng) < len(truth) // 4
    return {
        "random": em.dirichlet_start(len(truth), (1.0, 1.0), seed),
        "3 of 4 right": em.given_start(torch.where(wrong, 1 - truth, truth), 2),
    }


def accuracy(
    given: tuple[Votes, Tensor, Tensor],
    start: Tensor,
    evidence: Evidence,
    ridge: float,
    count: int,
    average: int,
) -> float:
    """Share of annotators in their type after `count` rounds; E-steps average over `average`."""
    votes, truth, direction = given

    def fit(gamma: Tensor, number: int) -> Tensor:
        loglik = torch.zeros(len(direction), 2, dtype=torch.float64)
        for part in evidence(votes, number, 0):
            for kind in (0, 1):
                weight = gamma[votes.annotator, kind] * part.trained
                policy = maximum(direction, weight, ridge, torch.zeros(1 + NOISE).double())
                loglik[part.scored, kind] = logsigmoid(direction[part.scored] @ policy)
        return em.by_annotator(loglik, votes.annotator, PEOPLE)

    *_, last = em.rounds(em.averaged(fit, average), start, count)
    return em.type_accuracy(truth, last.belief.responsibilities)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--ridges", type=float, nargs="+", default=[0.1, 1.0, 3.0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--average", type=int, default=1, help="rounds that an E-step averages")
    given = parser.parse_args()
    worlds = {seed: world(seed) for seed in given.seeds}
    for begun in ("random", "3 of 4 right"):
        for evidence in EVIDENCE:
            for ridge in given.ridges:
                found = [
                    accuracy(
                        worlds[seed],
                        starts(worlds[seed][1], seed)[begun],
                        evidence,
                        ridge,
                        given.rounds,
                        given.average,
                    )
                    for seed in given.seeds
                ]
                mean = sum(found) / len(found)
                print(
                    f"{begun:<13}{evidence!r:<18} ridge {ridge:<5g}{mean:.2f} "
                    f"[{min(found):.2f}, {max(found):.2f}]",
                    flush=True,
                )


if __name__ == "__main__":
    main()
