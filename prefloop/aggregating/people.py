"""What the types mean for people: posteriors of new annotators, held-out votes by annotator."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop import em
from prefloop.aggregate import geometric, mixture
from prefloop.aggregating.loading import Types
from prefloop.evaluation import by_group
from prefloop.mixture import Votes
from prefloop.objectives.listwise import factors
from prefloop.types import judgement, ordered_pairs


def posterior(types: Types, votes: Votes) -> Float[Tensor, "I K"]:
    """Probability of each type for each annotator of `votes`, from the shares and their votes.

    gamma_k ~ share_k prod over judgements of the Plackett-Luce likelihood under h_k
    """
    logps = types.logps(votes.rows)
    rank = judgement(votes.rows).rank
    implicit = types.beta * (logps[1:] - logps[0])  # (K, J, N)
    loglik = torch.stack([-factors(reward, rank).sum(-1) for reward in implicit], -1)
    total = em.by_annotator(loglik, votes.annotator, len(votes.names))
    return em.responsibilities(total, types.shares).responsibilities


def known_weights(types: Types, votes: Votes) -> Float[Tensor, "I K"]:
    """Responsibilities of the run for its annotators, the shares for people it never saw."""
    shares = types.shares.tolist()
    return torch.tensor([types.gamma.get(name, shares) for name in votes.names]).double()


def accuracy_by_annotator(
    types: Types, votes: Votes, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """How often each form of the mixture ranks held-out responses as each annotator did.

    Args:
        types: the policies.
        votes: judgements that nothing was trained on.
        weights: name -> weights of a mixture; each is also pooled geometrically. Beside them
            stands "personal": each annotator's own mixture.

    Returns:
        form -> {"worst", "worst_group", "average", "pooled", "gini", "groups"}; accuracies.
    """
    logps = types.logps(votes.rows)  # (1 + K, J, N)
    forms = {name: mixture(logps[1:], one) for name, one in weights.items()}
    for name, one in weights.items():
        if int((one > 0).sum()) > 1:
            # One number a response is a "vocabulary" of one to the pool: constants cancel in pairs.
            pooled = geometric(logps[1:].unsqueeze(-1), logps[0].unsqueeze(-1), one)
            forms[f"{name}, geometric"] = pooled.squeeze(-1)
    personal = known_weights(types, votes)[votes.annotator].mT  # (K, J)
    forms["personal"] = mixture(logps[1:], personal)
    return {name: accuracy_of(found - logps[0], votes) for name, found in forms.items()}


def accuracy_of(log_ratio: Float[Tensor, "J N"], votes: Votes) -> dict[str, Any]:
    """How often log pi / pi_ref orders responses as each annotator did; a tie counts 1/2."""
    row, better, worse = ordered_pairs(judgement(votes.rows).rank)
    margin = log_ratio[row, better] - log_ratio[row, worse]
    credit = (margin.sign() + 1) / 2
    names = [votes.names[index] for index in votes.annotator[row].tolist()]
    found = by_group(credit, names, row)
    return {
        "worst": found.groups[found.worst].value,
        "worst_group": found.worst,
        "average": found.average,
        "pooled": found.pooled,
        "gini": found.gini,
        "groups": {name: asdict(estimate) for name, estimate in found.groups.items()},
    }
