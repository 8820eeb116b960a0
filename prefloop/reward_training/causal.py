"""Heads on causal models, with LoRA or whole, trained by the one trainer."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefloop.data import Empty, Overlong, has_empty, tokenize
from prefloop.errors import UserError
from prefloop.policies import Lora, Policy, load_policy
from prefloop.reward_training.losses import Loss
from prefloop.rewards.causal import RewardScorer, hidden_width, new_head
from prefloop.rewards.trained import HEAD
from prefloop.settings import TrainSettings
from prefloop.trainer import Progress, build_trainer, fit
from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalBackbone:
    """Trains a causal model and a head on its last token.

    Attributes:
        model: folder or hub name.
        adapter: LoRA on it, or None to train it whole.
        loss: what is minimised.
        settings: the numbers of the loop; its seed is shifted by the member's.
        accelerator: devices and processes.
        max_length: most tokens of a prompt and its response; None is the model's context.
        overlong: refuse or drop longer rows; a response that was cut says nothing of its end.
        empty: refuse or drop rows with an empty response.
        dtype: of the weights; None as in `load_policy`.
        on_step: told after every optimizer step.
    """

    model: str
    adapter: Lora | None
    loss: Loss
    settings: TrainSettings
    accelerator: Accelerator
    max_length: int | None = None
    overlong: Overlong = Overlong.refuse
    empty: Empty = Empty.refuse
    dtype: torch.dtype | None = None
    on_step: Callable[[Progress], None] = lambda progress: None

    def __post_init__(self) -> None:
        if self.overlong is Overlong.truncate:
            raise UserError(
                "overlong is truncate, but a reward is read off the last token of a whole "
                "response; use drop or refuse"
            )

    def describe(self) -> Mapping[str, Any]:
        """What reward.json keeps."""
        return {"kind": "causal", "model": self.model, "whole": self.adapter is None}

    def readable(self, rows: Sequence[Comparison]) -> list[Comparison]:
        """The rows that fit; what does not is dropped or refused, as `overlong` and `empty` say."""
        kept = [row for row in rows if self.empty is Empty.refuse or not has_empty(row)]
        tokenizer, context = self._reads
        tokens, _ = tokenize(_closed(kept), tokenizer, self.max_length or context, self.overlong)
        fitting = {row.id for row in tokens}
        return [row for row in kept if row.id in fitting]

    @cached_property
    def _reads(self) -> tuple[PreTrainedTokenizerBase, int | None]:
        """Tokenizer and context of the model, loaded whole so that a bad one is refused early."""
        policy = load_policy(self.model, device="cpu")
        return policy.tokenizer, policy.context

    def train(
        self, rows: Sequence[Comparison], held_out: Sequence[Comparison], folder: Path, seed: int
    ) -> Mapping[str, int | float]:
        """Train one member on `rows` by their weights and save it in `folder`; its last metrics.

        Goes on from the newest checkpoint in `folder`/training, if there is one.
        """
        policy = self._policy(seed)
        head = new_head(hidden_width(policy), seed).to(self.accelerator.device)
        scorer = RewardScorer(policy.scorer(None), head)
        settings = replace(self.settings, seed=self.settings.seed + seed, log_displacement=False)
        trainer = build_trainer(scorer, self.loss, None, settings, self.accelerator)
        train, _ = tokenize(_closed(rows), policy.tokenizer)
        held, _ = tokenize(_closed(held_out), policy.tokenizer)
        metrics = fit(trainer, train, held, folder / "training", self.on_step)
        weights = trainer.engine.weights(frozen=policy.adapter is None)
        if self.accelerator.is_main_process:
            _save(policy, weights, folder)
        self.accelerator.wait_for_everyone()
        return metrics

    def asking(self) -> AbstractContextManager[Any]:
        """The autocast of training."""
        return self.accelerator.autocast()

    def _policy(self, seed: int) -> Policy:
        policy = load_policy(
            self.model,
            adapter=self.adapter,
            dtype=self.dtype,
            device=self.accelerator.device,
            seed=self.settings.seed + seed,
        )
        _freeze_unused(policy)
        return policy


def _closed(rows: Sequence[Comparison]) -> list[Comparison]:
    """The rows with every response closed: a reward is read at the end of a turn, cut or not."""
    return [replace(row, finished=None) for row in rows]


def _save(policy: Policy, weights: Mapping[str, Tensor], folder: Path) -> None:
    """The model and its head, and no checkpoint any more: a member is whole or not there."""
    training, part = folder / "training", folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    inside = "engine.model."  # where a `RewardScorer` has the model
    own = {name.removeprefix(inside): weights[name] for name in weights if name.startswith(inside)}
    policy.save(part, own)
    save_file({"weight": weights["head.weight"].float().cpu().contiguous()}, part / HEAD)
    shutil.copyfile(training / "metrics.jsonl", part / "metrics.jsonl")
    shutil.rmtree(folder)
    part.rename(folder)


def _freeze_unused(policy: Policy) -> None:
    """The output layer takes no part in a reward; where it is not the input's too, it is frozen."""
    output, read = policy.base.get_output_embeddings(), policy.base.get_input_embeddings()
    if isinstance(output, torch.nn.Module) and isinstance(read, torch.nn.Module):
        shared = {id(weight) for weight in read.parameters()}
        for weight in output.parameters():
            if id(weight) not in shared:
                weight.requires_grad_(False)
