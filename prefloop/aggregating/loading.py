"""The policies of a mixture run, ready to answer and to score: adapters on one base."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from prefloop.logps.layout import TOKENS, by_buckets
from prefloop.policies import Policy, load_policy
from prefloop.policies.policy import evaluating
from prefloop.runs import read_json, read_jsonl
from prefloop.shares import ALONE, Worker
from prefloop.types import Tokenized, UserError, score


@dataclass(frozen=True, kw_only=True, eq=False)
class Types:
    """The K policies of `prefloop mixture`.

    Attributes:
        policies: one a type; with adapters they are K times the same base.
        names: the adapter of each type, None for whole models.
        reference: what they were trained from: the base with its adapters off, or a model.
        shares: eta_k, share of each type among the annotators.
        beta: strength of the KL constraint they were trained with, per nat.
        gamma: responsibilities of each annotator by name.
        model: name or folder of the base.
        worker: this process among those that share answers and scores.
    """

    policies: tuple[Policy, ...]
    names: tuple[str | None, ...]
    reference: Policy
    shares: Float[Tensor, " K"]
    beta: float
    gamma: dict[str, list[float]]
    model: str
    worker: Worker = ALONE

    def __len__(self) -> int:
        return len(self.policies)

    @property
    def share_a_base(self) -> bool:
        """Whether the types are adapters on one model."""
        return None not in self.names

    def use(self, index: int) -> Policy:
        """The policy of type `index`, counted from 0, in use until the next call."""
        name = self.names[index]
        if name is not None:
            self.policies[index].use_adapter(name)
        return self.policies[index]

    @torch.no_grad()
    def logps(
        self, rows: Sequence[Tokenized], token_budget: int = TOKENS
    ) -> Float[Tensor, "Q B N"]:
        """log pi(y|x) of each response, in nats, float64: under the reference, then each type."""
        tables = [self.reference_logps(rows, token_budget)]
        for index in range(len(self)):
            policy = self.use(index)
            with evaluating(policy.model):
                tables.append(response_logps(policy, rows, token_budget, self.worker))
        return torch.stack(tables)

    def reference_logps(
        self, rows: Sequence[Tokenized], token_budget: int = TOKENS
    ) -> Float[Tensor, "B N"]:
        """log pi_ref(y|x) of each response, in nats, float64."""
        if not self.share_a_base:
            with evaluating(self.reference.model):
                return response_logps(self.reference, rows, token_budget, self.worker)
        with self.reference.reference() as model, evaluating(model):
            return response_logps(self.reference, rows, token_budget, self.worker)


def load_types(
    run: Path, device: torch.device | str | None = None, worker: Worker = ALONE
) -> Types:
    """The types of the run folder of `prefloop mixture`.

    Raises:
        UserError: the folder is not that of a finished mixture.
    """
    if not (run / "mixture.json").is_file():
        raise UserError(
            f"{run}: no mixture.json, so this is no finished run of prefloop mixture; run it first "
            "or give its folder"
        )
    found: dict[str, Any] = read_json(run / "mixture.json")
    folders = [run / name for name in found["policies"]]
    first = load_policy(folders[0], device=device)
    if isinstance(first.model, PeftModel):
        names = ("default", *(f"type-{number}" for number in range(2, len(folders) + 1)))
        for name, folder in zip(names[1:], folders[1:], strict=True):
            first.model.load_adapter(str(folder), adapter_name=name)
        first.model.eval()
        policies, reference = (first,) * len(folders), first
    else:
        names = (None,) * len(folders)
        policies = (first, *(load_policy(folder, device=device) for folder in folders[1:]))
        reference = load_policy(found["model"], device=device)
    told = read_jsonl(run / "responsibilities.jsonl")
    return Types(
        policies=policies,
        names=names,
        reference=reference,
        shares=torch.tensor(found["shares"], dtype=torch.float64),
        beta=float(found["beta"]),
        gamma={row["annotator"]: row["gamma"] for row in told},
        model=found["model"],
        worker=worker,
    )


@torch.no_grad()
def response_logps(
    policy: Policy,
    rows: Sequence[Tokenized],
    token_budget: int = TOKENS,
    worker: Worker = ALONE,
) -> Float[Tensor, "B N"]:
    """log p(y|x) of every response of `rows`, in batches; 0 where there is none."""
    scorer = policy.scorer(None)
    summed: list[Float[Tensor, " N"]] = worker.mapped(
        lambda mine: by_buckets(
            lambda batch: score(scorer, batch).sum.cpu().double(), mine, token_budget
        ),
        rows,
    )
    return torch.nn.utils.rnn.pad_sequence(summed, batch_first=True)
