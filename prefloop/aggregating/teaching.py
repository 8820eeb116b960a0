"""Distillation by KL: the student meets the teacher's whole next-token distribution.

    loss of an answer = sum over its tokens t of KL( teacher(. | x, y_<t) || student(. | x, y_<t) )

The answers are the teacher's own, so that the mean is KL(teacher || student) of whole answers. SFT
on the same answers has the same expected gradient with more noise: it sees one token of each
distribution. To add a teacher: a function of type `Teacher`, and its form's name in `TEACHERS`.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prefloop.aggregate import geometric, next_token
from prefloop.aggregating.loading import Types
from prefloop.logps import Scorer
from prefloop.logps.head import Head
from prefloop.logps.layout import Sheet
from prefloop.logps.ways import Way
from prefloop.policies import Policy
from prefloop.policies.policy import evaluating
from prefloop.types import Tokenized, score

Teacher = Callable[[Types, Way, Sequence[Sheet], Sequence[Tokenized], Tensor], Tensor]
"""(types, way, sheets, batch, weights) -> next-token probabilities (M, V) at the sheets' places."""


def mixture_teacher(
    types: Types, way: Way, sheets: Sequence[Sheet], batch: Sequence[Tokenized], weights: Tensor
) -> Float[Tensor, "M V"]:
    """The affine mixture: types weigh in as far as the answer so far is theirs."""
    logits, before = [], []
    for index in range(len(types)):
        policy = types.use(index)
        with evaluating(policy.model):
            logits.append(_logits(policy.model, way, sheets))
            token = score(policy.scorer(None), batch).token
        earlier = (token.cumsum(-1) - token).flatten()  # log pi_k(y_<t)
        before.append(earlier[_places(sheets).to(earlier.device)])
    return next_token(torch.stack(logits), torch.stack(before), weights.to(before[0]))


def pool_teacher(
    types: Types, way: Way, sheets: Sequence[Sheet], batch: Sequence[Tokenized], weights: Tensor
) -> Float[Tensor, "M V"]:
    """The geometric pool of `forms.pool_logits`, token by token."""
    with types.reference.reference() as model, evaluating(model):
        base = _logits(model, way, sheets)
    logits = []
    for index in range(len(types)):
        policy = types.use(index)
        with evaluating(policy.model):
            logits.append(_logits(policy.model, way, sheets))
    return geometric(torch.stack(logits), base, weights.float().to(base.device)).softmax(-1)


TEACHERS: dict[str, Teacher] = {"draw": mixture_teacher, "geometric": pool_teacher}
"""Form of a mixture -> its next-token distribution."""


class Student(nn.Module):
    """A scorer whose token "log-probabilities" are minus KL(teacher || student), in nats.

    Args:
        policy: who learns.
        types: who teaches, in the `form` of that name, with `weights`.
    """

    def __init__(self, policy: Policy, types: Types, form: str, weights: Float[Tensor, " K"]):
        super().__init__()
        self.scorer = Scorer(policy.model, token_budget=None, head=self._minus_kl)
        self.types, self.teacher, self.weights = types, TEACHERS[form], weights
        self.aim: Tensor | None = None

    def forward(self, batch: Sequence[Tokenized]) -> tuple[Tensor, ...]:
        """-KL (B, N, T) and its mask (B, N, T)."""
        if self.scorer.way is None:  # found with a plain head: ours is no log-probability
            with torch.no_grad():
                self.scorer.way = Scorer(self.scorer.model).way_for(batch)
        way = self.scorer.way
        with torch.no_grad():
            sheets = self.scorer.sheets(way, batch)
            self.aim = self.teacher(self.types, way, sheets, batch, self.weights)
        return self.scorer(batch)

    def _minus_kl(
        self, head: Head, hidden: Tensor, target: Tensor, with_collision: bool
    ) -> tuple[Tensor, None]:
        assert self.aim is not None, "a teacher speaks first"
        crossed = cross_entropy(head.logits(hidden), self.aim, reduction="none")
        return torch.special.entr(self.aim).sum(-1) - crossed, None


def _logits(model: nn.Module, way: Way, sheets: Sequence[Sheet]) -> Float[Tensor, "M V"]:
    states = torch.cat([way.states(model, sheet) for sheet in sheets])
    return way.head(model).logits(states)


def _places(sheets: Sequence[Sheet]) -> Int[Tensor, " M"]:
    """Where each token of the sheets is in the flat table (B, N, T)."""
    return torch.cat([sheet.place for sheet in sheets])
