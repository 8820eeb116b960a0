"""What a mixture of policies can be: a draw of one type a prompt, or a pool of logits.

A form is a function (types, prompts, weights, settings, seed) -> one answer a prompt.
To add one: the function, and its name in `FORMS`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from prefloop.aggregate import choose_policy
from prefloop.aggregating.loading import Types
from prefloop.aggregating.teaching import Student
from prefloop.objectives.family import log_ratio
from prefloop.policies import Policy, Sampling
from prefloop.policies.policy import evaluating
from prefloop.policies.readers import Reader, adapters_by_row
from prefloop.policies.sampling import Pool, derived_seed, sample, sample_pool
from prefloop.settings import TrainSettings
from prefloop.trainer import build_trainer, fit
from prefloop.trainer.loop import Metrics
from prefloop.training import Training
from prefloop.types import Judgement, Logps, PerComparison, PerResponse, Tokenized, UserError

Prompts = Sequence[Sequence[int]]
Tokens = tuple[int, ...]


def draw_one_type(
    types: Types, prompts: Prompts, weights: Float[Tensor, " K"], settings: Sampling, seed: int
) -> list[Tokens]:
    """Draw k ~ weights once a prompt and let type k answer: exact for sum_k w_k pi_k(y|x)."""
    rng = torch.Generator().manual_seed(derived_seed(seed, "type"))
    chosen = choose_policy(weights, len(prompts), rng).tolist()
    answers: list[Tokens] = [()] * len(prompts)
    for index in sorted(set(chosen)):
        places = [place for place, one in enumerate(chosen) if one == index]
        asked = [prompts[place] for place in places]
        one = partial(sample, types.use(index), n=1, settings=settings, seed=seed)
        drawn = types.worker.mapped(one, asked)
        for place, found in zip(places, drawn, strict=True):
            answers[place] = found[0].tokens
    return answers


def pool_logits(
    types: Types, prompts: Prompts, weights: Float[Tensor, " K"], settings: Sampling, seed: int
) -> list[Tokens]:
    """Answer from pi_ref prod_k (pi_k / pi_ref)^w_k, pooled token by token.

    Over whole answers that policy is pi_ref exp(sum_k w_k h_k / beta): rewards are averaged. Token
    by token it is the usual approximation.
    """
    drawn = pooled_answers(types, prompts, weights, settings, 1, seed)
    return [answers[0] for answers in drawn]


def pooled_answers(
    types: Types,
    prompts: Prompts,
    weights: Float[Tensor, " K"],
    settings: Sampling,
    n: int,
    seed: int,
) -> list[list[Tokens]]:
    """`n` answers of the geometric pool to each prompt, many side by side; see `pool_logits`.

    z = (1 - sum_k w_k) z_ref + sum_k w_k z_k,   one model, an adapter a row
    """
    policy = types.policies[0]
    model = policy.model
    if not types.share_a_base or not isinstance(model, PeftModel):
        raise UserError(
            "the geometric pool reads all types token by token, and these are whole models; train "
            "adapters (--lora-rank above 0), or use --form draw"
        )
    names = ["__base__", *(name for name in types.names if name is not None)]

    def switch(rows: int) -> AbstractContextManager[None]:
        return adapters_by_row(model, [name for name in names for _ in range(rows // len(names))])

    @contextmanager
    def sources(padded: bool) -> Iterator[list[Reader]]:
        with evaluating(model):
            yield [Reader(model, policy.base, sources=len(names), switch=switch, padded=padded)]

    shares = weights.tolist()
    pool = Pool(sources, (1 - sum(shares), *shares))
    drawn = types.worker.mapped(
        lambda asked: sample_pool(policy, asked, n, settings, seed, pool), prompts
    )
    return [[one.tokens for one in answers] for answers in drawn]


FORMS: dict[str, Callable[[Types, Prompts, Tensor, Sampling, int], list[Tokens]]] = {
    "draw": draw_one_type,
    "geometric": pool_logits,
}
"""Name on the command line -> form."""


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """Supervised fine-tuning on every response of a row: the mean over responses of -log pi(y|x).

    The loss of distillation by samples: its minimum over all policies is the policy that answered.
    """

    needs_reference: bool = False
    couples_batch: bool = False
    uses_ties: bool = False
    needs_collision: bool = False
    data: tuple[str, ...] = ("label",)

    def rewards(self, policy: Logps, reference: Logps | None) -> Float[Tensor, "*shape"]:
        """log pi(y|x), less log pi_ref(y|x) where it is known."""
        return policy.sum if reference is None else log_ratio(policy, reference)

    def per_comparison(
        self, policy: Logps, reference: Logps | None, judgement: Judgement
    ) -> PerComparison:
        """One loss a row, in nats."""
        nll: PerResponse = -policy.sum
        return nll.sum(-1) / policy.exists.sum(-1)


def answers_of(
    form: str, types: Types, prompts: Prompts, weights: Tensor, settings: Sampling, seeds: range
) -> Iterator[list[Tokens]]:
    """For each seed one answer a prompt, by the form of that name."""
    for seed in seeds:
        yield FORMS[form](types, prompts, weights, settings, seed)


def distil(
    policy: Policy,
    prompts: Prompts,
    answers: Sequence[Sequence[Tokens]],
    settings: TrainSettings,
    accelerator: Accelerator,
    out: Path,
) -> Metrics:
    """Train `policy` to answer as `answers` ([prompt][answer]) do; it is saved as `out`/policy."""
    training = Training(
        policy=policy,
        objective=Imitation(),
        settings=settings,
        accelerator=accelerator,
        out=out,
    )
    return training(_rows(prompts, answers))


def distil_by_kl(
    policy: Policy,
    prompts: Prompts,
    answers: Sequence[Sequence[Tokens]],
    teacher: tuple[Types, str, Tensor],
    training: tuple[TrainSettings, Accelerator],
    out: Path,
) -> Metrics:
    """`distil`, by KL(teacher || student) at every token of the answers; see `teaching`.

    Args:
        policy: who learns; saved as `out`/policy.
        prompts, answers: of the teacher itself, [prompt][answer].
        teacher: types, form ("draw" or "geometric") and weights of the mixture.
        training: the numbers of the loop, and devices.
        out: the run folder.
    """
    settings, accelerator = training
    policy.model.to(accelerator.device)  # pyright: ignore[reportArgumentType] - overloads
    student = Student(policy, *teacher)
    trainer = build_trainer(student, Imitation(), None, settings, accelerator)
    metrics = fit(trainer, _rows(prompts, answers), [], out)
    if accelerator.is_main_process:
        policy.save(out / "policy")
    accelerator.wait_for_everyone()
    return metrics


def _rows(prompts: Prompts, answers: Sequence[Sequence[Tokens]]) -> list[Tokenized]:
    return [
        Tokenized(
            prompt=tuple(prompt),
            responses=tuple(given),
            label=(True,) * len(given),
            id=f"prompt-{number}",
            place=f"prompt {number}",
        )
        for number, (prompt, given) in enumerate(zip(prompts, answers, strict=True), 1)
    ]
