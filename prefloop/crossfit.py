"""Validation losses of comparisons by models that did not train on them: SelectiveDPO's order.

The prompts are cut in halves; a model trained on one half gives the DPO loss of the other, and the
other way round; over several seeds, each with its own halves, losses are averaged.

The file is read again for each model. Memory holds two numbers a row, the rows that one model
trains on, and a few rows whose losses are worked out.

References:
    SelectiveDPO, arXiv 2502.09650 (as in its public code: halves, swapped, three seeds, beta 0.01;
    it also averages over checkpoints, which is left out here).
"""

import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import compress, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefloop.data import where
from prefloop.data.keys import prompt_key
from prefloop.logps import buckets
from prefloop.objectives import DPO
from prefloop.policies import Lora, Policy, load_policy
from prefloop.policies.sampling import derived_seed
from prefloop.settings import TrainSettings
from prefloop.training import Handling, Training, prepare
from prefloop.types import Comparison, Tokenized, UserError, judgement

Rows = Callable[[], Iterable[Comparison]]
"""The rows of a file from the first, as often as it is called."""
ROUND = 1024
"""Rows whose losses are worked out together."""


@dataclass(frozen=True, eq=False)
class ByRow:
    """A number a row, found by the row's id; 16 bytes a row.

    Attributes:
        keys: 64 bits that stand for the ids, ascending.
        values: the numbers, in the order of `keys`.
    """

    keys: Int[Tensor, " M"]
    values: Float[Tensor, " M"]

    def __getitem__(self, name: str) -> float:
        """The number of the row whose id is `name`."""
        return float(self.values[torch.searchsorted(self.keys, _key(name))])


@dataclass(frozen=True, kw_only=True)
class CrossFit:
    """How the models are trained.

    Attributes:
        model: Hugging Face name or folder that each begins with.
        adapter: its new adapter; None trains the whole model.
        settings: the numbers of the loop.
        beta: of the DPO loss, in training and in validation.
        seeds: how often the halves are drawn anew; two models each.
        most: rows that a model trains on, drawn from its half; 0 is all of them. What a model
            trains on is held in memory.
        accelerator: device and precision; one process.
    """

    model: str
    adapter: Lora | None
    settings: TrainSettings
    accelerator: Accelerator
    beta: float = 0.01
    seeds: int = 3
    most: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds of the learning order must be 1 or more, got {self.seeds}")
        if self.most < 0:
            raise UserError(f"rows to fit on must be 0 (all) or more, got {self.most}")
        if self.accelerator.num_processes > 1:
            raise UserError(
                "the learning order is fitted in one process; start it without torchrun"
            )

    def __call__(
        self, rows: Rows, out: Path, on_fit: Callable[[int], None] = lambda done: None
    ) -> ByRow:
        """Mean validation loss of each comparison, nats; kept in `out` fit by fit.

        Raises:
            UserError: a comparison that orders no two responses, two with one id, or all with one
                prompt.
        """
        ids, prompt = _numbered(rows)
        sums = torch.zeros(len(ids), dtype=torch.float64)
        for seed in range(self.seeds):
            first = first_half(prompt, derived_seed(self.settings.seed, "halves", seed))
            for side, seen in enumerate((first, ~first)):
                file, folder = (out / f"{name}-{seed}-{side}" for name in ("losses", "fit"))
                if not file.exists():
                    _save(file, self._fit(rows, seen, folder))
                    shutil.rmtree(folder)
                sums[~seen] += load_file(file)["loss"] / self.seeds
                on_fit(2 * seed + side + 1)
        order = ids.argsort()
        return ByRow(ids[order], sums[order])

    def _fit(self, rows: Rows, seen: Bool[Tensor, " P"], folder: Path) -> Float[Tensor, " P2"]:
        """Train on the rows in `seen`, or some of them; the losses of the others, in order."""
        folder.mkdir(exist_ok=True)
        seed = derived_seed(self.settings.seed, folder.name)
        policy = load_policy(
            self.model, adapter=self.adapter, device=self.accelerator.device, seed=seed
        )
        policy = policy if policy.adapter else policy.with_frozen_copy()
        objective = DPO(beta=self.beta)
        ready = partial(prepare, policy=policy, objective=objective, handling=Handling())
        training = Training(
            policy=policy,
            objective=objective,
            settings=replace(self.settings, seed=seed, log_displacement=False),
            accelerator=self.accelerator,
            out=folder,
        )
        training(ready(list(compress(rows(), drawn(seen, self.most, seed).tolist()))).rows)
        self.accelerator.free_memory()
        losses: list[float] = []
        unseen = compress(rows(), (~seen).tolist())
        while part := list(islice(unseen, ROUND)):
            losses += self._losses(policy, ready(part).rows, objective)
        return torch.tensor(losses, dtype=torch.float64)

    def _losses(self, policy: Policy, rows: Sequence[Tokenized], objective: DPO) -> list[float]:
        found = torch.zeros(len(rows), dtype=torch.float64)
        for part in buckets(rows, self.settings.token_budget):
            batch = [rows[at] for at in part]
            ours = policy.logps(batch, self.settings.token_budget)
            theirs = policy.reference_logps(batch, self.settings.token_budget)
            found[part] = objective.per_comparison(ours, theirs, judgement(batch)).double()
        return found.tolist()


def first_half(prompt: Int[Tensor, " P"], seed: int) -> Bool[Tensor, " P"]:
    """Which rows are of the first half: half of the prompts, with all their rows.

    Args:
        prompt: the number of each row's prompt, from 0.
        seed: another seed draws other halves.
    """
    count = int(prompt.max()) + 1
    rng = torch.Generator().manual_seed(seed)
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=rng)[: count // 2]] = True
    return first[prompt]


def drawn(seen: Bool[Tensor, " P"], most: int, seed: int) -> Bool[Tensor, " P"]:
    """`most` of the rows in `seen`, at random; all of them where they are no more, or it is 0."""
    places = seen.nonzero().flatten()
    if not most or len(places) <= most:
        return seen
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(seen)
    chosen[places[torch.randperm(len(places), generator=rng)[:most]]] = True
    return chosen


def _numbered(rows: Rows) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """(64 bits for the id, the number of the prompt) of each row, all of which are checked."""
    ids, prompts = array("q"), array("q")
    for row in rows():
        _refuse_unordered(row)
        ids.append(_key(row.id))
        prompts.append(_key(prompt_key(row.prompt)))
    known, prompt = torch.tensor(prompts, dtype=torch.long).unique(return_inverse=True)
    if len(known) < 2:
        raise UserError("the learning order needs two different prompts or more")
    found = torch.tensor(ids, dtype=torch.long)
    if len(found.unique()) < len(found):
        _refuse_repeated(rows)
    return found, prompt


def _refuse_repeated(rows: Rows) -> None:
    """Name two rows with one id, by their places."""
    before: dict[int, str] = {}
    for row in rows():
        key = _key(row.id)
        if key in before:
            raise UserError(
                f"{where(row)}: the id {row.id!r} is that of {before[key]} too; give each its own"
            )
        before[key] = where(row)


def _key(text: str) -> int:
    """64 bits that stand for a text."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _save(file: Path, losses: Float[Tensor, " P"]) -> None:
    part = file.with_name(f".{file.name}.part")
    save_file({"loss": losses}, part)
    part.replace(file)


def _refuse_unordered(row: Comparison) -> None:
    values = [one for one in row.rank or row.scores or () if one is not None]
    if len(set(values)) < 2:
        raise UserError(
            f"{where(row)}: orders no two responses, so it has no validation loss; drop the "
            "row, or give ranks or scores that differ"
        )
    if row.weight <= 0:
        raise UserError(
            f"{where(row)}: has weight 0, so nothing is trained on it; drop the row, or give "
            "it a weight"
        )
