"""EM over hidden annotator types: the parts that a table and a language model share.

Every annotator i is of one unknown type k. A round fits one policy a type to all judgements, each
weighted by how likely its annotator is of that type (M-step), then asks again who is of which type
(E-step). Here are the E-step, the loop, the starts, the splits and the checks; whoever calls says
how policies are fitted. Pure functions, log space, any leading axes for independent problems.

The log-likelihood of a judgement is minus the loss of an objective that is a likelihood: DPO for
pairs, PlackettLuce for rankings, BestOfN for the best of n. The normalizers of the policies cancel.

References:
    "Direct Preference Optimization with Unobserved Preference Heterogeneity", arXiv 2405.15065 and
    2510.15716 (EM-DPO), after the authors' public code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prefloop.types import UserError


class Belief(NamedTuple):
    """Who is of which type.

    Attributes:
        responsibilities: gamma_ik, probability that annotator i is of type k; rows sum to 1.
        evidence: log sum_k share_k p_k(all judgements of i), in nats.
    """

    responsibilities: Float[Tensor, "*G I K"]
    evidence: Float[Tensor, "*G I"]


@dataclass(frozen=True)
class Round:
    """One round of EM.

    Attributes:
        number: 0 for the first round; its policies are those of the start (cluster-then-DPO when
            the start is hard).
        shares: eta_k, share of each type that this round's E-step used.
        belief: the outcome of the E-step.
    """

    number: int
    shares: Float[Tensor, "*G K"]
    belief: Belief


def soft(belief: Belief) -> Float[Tensor, "*G I K"]:
    """What the next M-step trains on: every annotator counts for each type as far as it is one."""
    return belief.responsibilities


def hard(belief: Belief) -> Float[Tensor, "*G I K"]:
    """Every annotator counts for its likeliest type only, as in MaxMin-RLHF (arXiv 2402.08925)."""
    types = belief.responsibilities.shape[-1]
    likeliest = belief.responsibilities.argmax(-1)
    return torch.nn.functional.one_hot(likeliest, types).to(belief.responsibilities)


def rounds(
    fit: Callable[[Tensor, int], Tensor],
    start: Float[Tensor, "*G I K"],
    count: int,
    assign: Callable[[Belief], Tensor] = soft,
) -> Iterator[Round]:
    """Run `count` rounds of EM, handing out each one.

    Args:
        fit: given responsibilities (*G, I, K) and the round's number, fits one policy a type and
            returns the log-likelihood (*G, I, K) of each annotator's judgements under each.
        start: responsibilities of the first M-step.
        count: rounds to run.
        assign: `soft`, or `hard`: whom the next M-step counts for which type.
    """
    gamma = start
    for number in range(count):
        shares = type_shares(gamma)
        belief = responsibilities(fit(gamma, number), shares)
        gamma = assign(belief)
        yield Round(number, shares, belief)


def averaged(fit: Callable[[Tensor, int], Tensor], over: int) -> Callable[[Tensor, int], Tensor]:
    """`fit`, but its log-likelihoods are averaged over about the last `over` rounds.

        mean_t = mean_(t-1) + max(1 / t, 1 / over) (loglik_t - mean_(t-1)),   t = 1, 2, ...

    Policies that are trained by a few steps of stochastic gradients differ from round to round by
    chance; the E-step then reads less of that. 1 is plain EM.

    References:
        Delyon, Lavielle and Moulines 1999, "Convergence of a stochastic approximation version of
        the EM algorithm".
    """
    mean: Tensor | None = None

    def fitted(gamma: Tensor, number: int) -> Tensor:
        nonlocal mean
        found = fit(gamma, number)
        step = max(1 / (number + 1), 1 / over)
        mean = found if mean is None else mean + step * (found - mean)
        return mean

    return fitted


def responsibilities(loglik: Float[Tensor, "*G I K"], shares: Float[Tensor, "*G K"]) -> Belief:
    """The E-step.

        gamma_ik = share_k exp(loglik_ik) / sum_l share_l exp(loglik_il),   in log space

    A type of share 0 stays at 0; an annotator without judgements (loglik 0) gets the shares.

    Args:
        loglik: log-likelihood of all judgements of annotator i under type k, in nats.
        shares: eta_k, share of each type among the annotators.
    """
    joint = shares.log().unsqueeze(-2) + loglik
    return Belief(joint.softmax(-1), joint.logsumexp(-1))


def type_shares(gamma: Float[Tensor, "*G I K"]) -> Float[Tensor, "*G K"]:
    """eta_k = mean over annotators of gamma_ik."""
    return gamma.mean(-2)


def by_annotator(
    loglik: Float[Tensor, "M K"], annotator: Int[Tensor, " M"], annotators: int
) -> Float[Tensor, "I K"]:
    """Sum over the judgements of each annotator, in float64; 0 for one without judgements.

    Args:
        loglik: log-likelihood of each of M judgements under each type.
        annotator: who gave it, 0 <= annotator < annotators.
    """
    total = torch.zeros(annotators, loglik.shape[-1], dtype=torch.float64, device=loglik.device)
    return total.index_add(0, annotator, loglik.double())


def penalized_loglik(
    evidence: Float[Tensor, "*G I"], penalty: Float[Tensor, "*G"]
) -> Float[Tensor, "*G"]:
    """Observed log-likelihood of all annotators minus the penalty on the policies.

    With exact M-steps it never falls from round to round; with gradient steps it does so only on
    average.
    """
    return evidence.sum(-1) - penalty


def effective_types(shares: Float[Tensor, "*G K"]) -> Float[Tensor, "*G"]:
    """exp(entropy of the shares): between 1 (all annotators in one type) and K."""
    return torch.special.entr(shares).sum(-1).exp()


def dirichlet_start(annotators: int, concentration: Sequence[float], seed: int) -> Tensor:
    """Random responsibilities (I, K), each row Dirichlet; unequal numbers leave the saddle faster.

    Args:
        concentration: one positive number a type; (10, 5) leans to the first type.
    """
    if len(concentration) < 1 or min(concentration) <= 0:
        raise UserError(
            f"a Dirichlet start needs a positive concentration for each type, got {concentration}"
        )
    rows = np.random.default_rng(seed).dirichlet(concentration, annotators)
    return torch.from_numpy(rows)


def given_start(labels: Int[Tensor, " I"], types: int) -> Float[Tensor, "I K"]:
    """Hard responsibilities: annotator i is of type labels[i] for sure."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= types):
        raise UserError(
            f"labels of annotators must be 0 to {types - 1}, found {int(labels.min())} to "
            f"{int(labels.max())}; number the clusters from 0, or ask for more types"
        )
    return torch.nn.functional.one_hot(labels.long(), types).double()


def vote_features(
    direction: Float[Tensor, "M F"], annotator: Int[Tensor, " M"], annotators: int
) -> Float[Tensor, "I F"]:
    """What each annotator votes for: the sum of the directions of their judgements.

    Args:
        direction: e(chosen) - e(rejected) of each judgement: one-hot over a few items, or the
            embeddings of two texts.
        annotator: who judged.
    """
    return by_annotator(direction, annotator, annotators)


def kmeans(features: Float[Tensor, "I F"], types: int, seed: int, restarts: int = 20) -> Tensor:
    """Cluster labels (I,): the best of `restarts` runs of Lloyd's algorithm from k-means++ starts.

    All restarts run at once. A cluster that loses its last member keeps its centre.
    """
    if not 1 <= types <= len(features):
        raise UserError(f"cannot make {types} clusters of {len(features)} annotators")
    rng = torch.Generator().manual_seed(seed)
    points = features.double()
    centers = _plus_plus(points, types, restarts, rng)  # (R, K, F)
    labels = torch.cdist(points, centers).argmin(-1)  # (R, I)
    for _ in range(100):
        member = torch.nn.functional.one_hot(labels, types).double()  # (R, I, K)
        count = member.sum(1).unsqueeze(-1)
        means = member.mT @ points / count.clamp(min=1)
        centers = torch.where(count > 0, means, centers)
        moved = torch.cdist(points, centers).argmin(-1)
        if torch.equal(moved, labels):
            break
        labels = moved
    within = torch.cdist(points, centers).amin(-1).square().sum(-1)
    return labels[within.argmin()]


def _plus_plus(points: Tensor, types: int, restarts: int, rng: torch.Generator) -> Tensor:
    """Centres drawn from the points, each next one with probability ~ squared distance."""
    first = torch.randint(len(points), (restarts, 1), generator=rng)
    chosen = points[first]  # (R, 1, F)
    for _ in range(types - 1):
        nearest = torch.cdist(points, chosen).amin(-1).square() + 1e-12  # (R, I)
        following = torch.multinomial(nearest, 1, generator=rng)
        chosen = torch.cat([chosen, points[following]], 1)
    return chosen


def halves(annotator: Int[Tensor, " M"], seed: int) -> Bool[Tensor, " M"]:
    """A random half of every annotator's judgements, for cross-fitting.

    Fit on one half and score the other, and swap them each round: scoring the votes that a policy
    was fitted to freezes a random start. Of an odd count the larger half is True; an annotator
    with one judgement has nothing in the other half.
    """
    rng = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(annotator), generator=rng)
    order = shuffled[annotator[shuffled].argsort(stable=True)]  # by annotator, random within
    who = annotator[order]
    starts = torch.searchsorted(who, who)  # where each annotator's block begins
    half = torch.empty(len(annotator), dtype=torch.bool)
    half[order] = (torch.arange(len(annotator)) - starts) % 2 == 0
    return half


def match_types(first: Float[Tensor, "I K"], second: Float[Tensor, "I K"]) -> Int[Tensor, " K"]:
    """Which column of `second` agrees with each column of `first`: the names of types mean nothing.

    Maximises sum_k <first[:, k], second[:, order[k]]> over permutations.
    """
    agreement = (first.double().mT @ second.double()).numpy()
    _, order = linear_sum_assignment(agreement, maximize=True)
    return torch.from_numpy(order)


def type_accuracy(truth: Int[Tensor, " I"], gamma: Float[Tensor, "I K"]) -> float:
    """Share of annotators put into their true type, under the best naming of the types."""
    types = gamma.shape[-1]
    hard = given_start(gamma.argmax(-1), types)
    true = given_start(truth, types)
    return float((true * hard[:, match_types(true, hard)]).sum(-1).mean())


def adjusted_rand_index(first: Int[Tensor, " I"], second: Int[Tensor, " I"]) -> float:
    """Agreement of two clusterings of the same annotators: 1 the same, 0 as by chance.

        (sum_kl C(n_kl, 2) - E) / ((a + b) / 2 - E),   a, b = sums of C(size, 2),  E = a b / C(I, 2)

    References:
        Hubert and Arabie 1985, "Comparing partitions".
    """
    table = given_start(first, int(first.max()) + 1).mT @ given_start(second, int(second.max()) + 1)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    inside, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = a * b / max(1.0, len(first) * (len(first) - 1) / 2)
    return (inside - chance) / ((a + b) / 2 - chance) if (a + b) / 2 != chance else 1.0


class Identifiability(NamedTuple):
    """What observed probabilities say about the parameters close to a point.

    Attributes:
        rank: how many directions of the parameters change what is observed.
        parameters: how many there are.
        singular_values: of the Jacobian, largest first.
    """

    rank: int
    parameters: int
    singular_values: Float[Tensor, " D"]

    @property
    def locally_identified(self) -> bool:
        """Whether no direction leaves all observed probabilities as they are."""
        return self.rank == self.parameters


def local_identifiability(
    observe: Callable[[Tensor], Tensor], at: Float[Tensor, " D"], tolerance: float = 1e-9
) -> Identifiability:
    """Rank of the Jacobian of what can be observed (any shape) with respect to D parameters.

    Full rank: locally identified. It says nothing of other solutions far away, nor of how much data
    it takes: read the smallest singular value for that.

    Args:
        observe: differentiable map from parameters to observable probabilities.
        at: float64 parameters; a singular value counts when it exceeds `tolerance` times the
            largest.
    """
    jacobian = torch.func.jacrev(lambda point: observe(point).flatten())(at)  # (O, D)
    values = torch.linalg.svdvals(jacobian)
    values = torch.nn.functional.pad(values, (0, len(at) - len(values)))
    return Identifiability(int((values > tolerance * values[0]).sum()), len(at), values)
