"""Several reference policies in one: the combined reference of MRPO, as log-probabilities.

Combine first, then train any objective with the result. All references must tokenize alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefloop.types import Logps, Pair, PerPair, UserError

__all__ = ["agreement_weights", "clip_reference", "combine_references", "with_sum"]


def combine_references(references: Sequence[Logps], weights: Float[Tensor, " *shape"]) -> Logps:
    """The reference that stands for several (MRPO): a harmonic mean of sequence probabilities.

        1 / pi(y|x) = sum over k of weights_k / pi_k(y|x)

    Between the smallest and the largest of them, and theirs where they agree. The authors' code
    lets the weight computed from the first of two references multiply the second; that is
    `weights` reversed.

    Args:
        references: K log-probabilities of the same responses.
        weights: a weight of each reference, >= 0, summing to 1 over K; one for all responses (K,),
            or one a response (K, *shape).

    Returns:
        log-probabilities whose `.sum` is exact, see `with_sum`.

    References:
        Le et al. 2024, arXiv 2405.16388 (formula as reported; order of weights as in the text).
    """
    if not references or len(references) != len(weights):
        raise UserError(
            f"combine_references got {len(references)} references and {len(weights)} weights; give "
            "one weight for each of one or more references"
        )
    weights = weights.to(references[0].token.device)
    total = weights.sum(0)
    if (weights < 0).any() or not torch.allclose(total, torch.ones_like(total), atol=1e-5):
        raise UserError(
            "the weights of combine_references must be 0 or more and sum to 1 over the references, "
            f"got {weights.tolist()}; divide them by their sum"
        )
    sums = torch.stack([logps.sum for logps in references])
    shaped = weights.reshape(*weights.shape, *(1,) * (sums.ndim - weights.ndim))
    return with_sum(references[0], -(shaped.log() - sums).logsumexp(0))


def clip_reference(helper: Pair, anchor: Pair, eta: float = 0.1) -> Pair:
    """The helper's log-probabilities, held near the anchor's (the policy training starts from).

        log helper <- clip(log helper, (1 + e) log anchor, (1 - e) log anchor)
        e_w = eta B_w / (B_w + B_l),  e_l = eta - e_w,  B = |mean of the two log-probabilities|

    Args:
        eta: share by which a summed log-probability may differ, over both sides; in (0, 1).

    References:
        Le et al. 2024, arXiv 2405.16388; the adaptive e as in the authors' code.
    """
    if not 0 < eta < 1:
        raise UserError(f"eta of clip_reference must be in (0, 1), got {eta} (usual: 0.1)")
    middle = [(near.sum + far.sum).abs() / 2 for near, far in zip(helper, anchor, strict=True)]
    chosen = eta * middle[0] / (middle[0] + middle[1])
    bounds = (chosen, eta - chosen)
    clipped = [
        with_sum(near, near.sum.clamp((1 + e) * far.sum, (1 - e) * far.sum))
        for near, far, e in zip(helper, anchor, bounds, strict=True)
    ]
    return Pair(*clipped)


def agreement_weights(helper: Pair, anchor: Pair) -> PerPair:
    """Weight of the helper, pair by pair: its share of the two references' absolute margins.

        |margin of helper| / (|margin of helper| + |margin of anchor| + 1e-6)

    Weights that read the labels they then train on; a later study (arXiv 2512.10040, abstract)
    found single references to do better.

    References:
        The authors' code of Le et al. 2024, arXiv 2405.16388.
    """
    own = (helper.chosen.sum - helper.rejected.sum).abs()
    other = (anchor.chosen.sum - anchor.rejected.sum).abs()
    return own / (own + other + 1e-6)


def with_sum(like: Logps, total: Float[Tensor, "*shape"]) -> Logps:
    """`Logps` over the same tokens as `like` whose `.sum` is `total`, to the last bit.

    All of it stands on the first token of each response, since a sequence probability has no share
    for each token; `.mean` divides by the same length as before.
    """
    first = like.mask & (like.mask.cumsum(-1) == 1)
    return Logps(torch.where(first, total.unsqueeze(-1), 0.0), like.mask)
