"""A policy: a causal language model of `transformers`, with or without an adapter of `peft`."""

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from prefloop.data import encoder
from prefloop.errors import UserError
from prefloop.logps import TOKENS, Scorer, random_state_kept, shared_logps
from prefloop.policies.settings import Lora
from prefloop.runs import read_json, write_json
from prefloop.shares import ALONE, Worker
from prefloop.types import Logps, Tokenized

DEFAULT_ADAPTER = "default"
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, eq=False)
class Policy:
    """pi_theta: a model, its tokenizer, and what stands for pi_ref.

    With an adapter the reference is the same model with the adapter off: no second copy exists.

    Attributes:
        model: a causal model of `transformers`, or `peft`'s wrapper around one.
        tokenizer: its tokenizer; has a pad token.
        name: the model's name on the hub, or its folder.
        frozen: a copy of the model that stays as it is, the reference of a model that is trained
            whole; None where an adapter (or a cache of its log-probabilities) does that job.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    frozen: PreTrainedModel | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model of `transformers`, inside its adapters where it has any."""
        if isinstance(self.model, PeftModel):
            return self.model.get_base_model()  # pyright: ignore[reportReturnType] - never a bare module here
        return self.model

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use, or None."""
        return active_adapter(self.model) if isinstance(self.model, PeftModel) else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.device

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its response together, or None where nothing limits them."""
        config = self.base.config.get_text_config().to_dict()
        return next((config[name] for name in CONTEXT_NAMES if config.get(name)), None)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a response: EOS, and the end of a turn in the chat template."""
        config = self.base.generation_config
        listed = config.eos_token_id if config is not None else None
        stops = {
            encoder(self.tokenizer).end,
            *([listed] if isinstance(listed, int) else listed or ()),
        }
        if self.tokenizer.eos_token_id is not None:
            stops.add(self.tokenizer.eos_token_id)
        return frozenset(stops)

    def scorer(self, token_budget: int | None = TOKENS, with_collision: bool = False) -> Scorer:
        """The module that gives log-probabilities of responses under this policy.

        Args:
            token_budget: tokens (padding included) of one forward pass.
            with_collision: also give `Logps.collision`, for objectives that need it.
        """
        return Scorer(self.model, token_budget=token_budget, with_collision=with_collision)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model that is pi_ref, for the length of a `with` block.

        With an adapter it is this very model, its adapters off: inside the block the policy is the
        reference. Adapters are never merged, so the base's numbers are exact.

        Raises:
            UserError: the model is trained whole and no frozen copy was kept.
        """
        if self.frozen is not None:
            yield self.frozen
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            raise UserError(
                f"{self.name} has no adapter and no frozen copy, so nothing holds its reference. "
                "Train an adapter, keep a copy with `with_frozen_copy()`, or score the reference "
                "before training and keep the numbers"
            )

    def logps(
        self,
        rows: Sequence[Tokenized],
        token_budget: int | None = TOKENS,
        worker: Worker = ALONE,
    ) -> Logps:
        """log pi_theta of the responses of `rows` on the CPU, without a gradient, dropout off.

        Each worker scores its share; all get the whole.
        """
        with evaluating(self.model):
            return shared_logps(self.scorer(token_budget), rows, worker)

    def reference_logps(
        self,
        rows: Sequence[Tokenized],
        token_budget: int | None = TOKENS,
        worker: Worker = ALONE,
    ) -> Logps:
        """log pi_ref of the responses of `rows`, like `logps`."""
        with self.reference() as model, evaluating(model):
            return shared_logps(Scorer(model, token_budget=token_budget), rows, worker)

    def with_frozen_copy(self) -> "Policy":
        """This policy, and a copy of its weights as they are now as the reference."""
        if isinstance(self.model, PeftModel):
            raise UserError(
                f"{self.name} has an adapter, and its reference is the base with the adapter off; "
                "a copy would only cost memory"
            )
        return replace(self, frozen=copy.deepcopy(self.model).eval().requires_grad_(False))

    def add_adapter(self, name: str, lora: Lora, seed: int = 0) -> "Policy":
        """The policy with one more adapter on the same base, random from `seed`, not yet in use.

        A policy without adapters becomes one with adapters: go on with what is returned. The first
        adapter of a base is in use at once.
        """
        if isinstance(self.model, PeftModel):
            if name in self.model.peft_config:
                raise UserError(f"{self.name} has an adapter named {name!r} already")
            with _seeded(seed, self.device), _targets_named(lora):
                self.model.add_adapter(name, _lora_config(self.base, lora))
            return self
        with _seeded(seed, self.device), _targets_named(lora):
            wrapped = get_peft_model(self.model, _lora_config(self.model, lora), adapter_name=name)
        assert isinstance(wrapped, PeftModel)
        return replace(self, model=wrapped.eval())

    def use_adapter(self, name: str) -> None:
        """From now on the policy is the base with the adapter `name`; only that one is trained."""
        adapters = list(self.model.peft_config) if isinstance(self.model, PeftModel) else []
        if name not in adapters:
            raise UserError(
                f"{self.name} has no adapter {name!r}; it has: {', '.join(adapters) or 'none'}"
            )
        self.model.set_adapter(name)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write weights (safetensors), tokenizer and generation settings, whole or not at all.

        With an adapter only the adapter in use is written. The folder is what `transformers` or
        `peft` load with `from_pretrained`, and `load_policy` too. An earlier one is replaced.

        Args:
            folder: what is written.
            weights: by the model's own names, where the model here does not hold them whole.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            part.chmod(0o755)
            self._write_weights(part, weights)
            self.tokenizer.save_pretrained(part)
            self._write_generation_config(part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write_weights(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        given: dict[str, Any] = {} if weights is None else {"state_dict": weights}
        if not isinstance(self.model, PeftModel):
            self.model.save_pretrained(folder, **given)
            return
        name = active_adapter(self.model)
        self.model.peft_config[name].base_model_name_or_path = self.name
        # peft writes the adapter "default" into the folder itself and any other one level below;
        # it would look for base models on the hub to decide about embeddings, which we never train.
        self.model.save_pretrained(
            str(folder), selected_adapters=[name], save_embedding_layers=False, **given
        )
        if name != DEFAULT_ADAPTER:
            for file in (folder / name).iterdir():
                file.rename(folder / file.name)
            (folder / name).rmdir()
        _sort_layers(folder / "adapter_config.json")

    def _write_generation_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.base.generation_config)
        if config is not None:
            config.eos_token_id = sorted(self.stop_tokens)
            config.pad_token_id = self.tokenizer.pad_token_id
            config.save_pretrained(folder)


def _sort_layers(config: Path) -> None:
    """Put the adapted layers in order; peft writes a set in an order that differs by process."""
    found = read_json(config)
    if isinstance(found["target_modules"], list):
        found["target_modules"].sort()
    write_json(config, found)


def active_adapter(model: PeftModel) -> str:
    """Name of the one adapter in use."""
    name = model.active_adapter
    assert isinstance(name, str), "several adapters at once are never set here"
    return name


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """peft draws new weights from the global generator: lend it ours, and put it back."""
    with random_state_kept(device):
        torch.manual_seed(seed)
        yield


@contextmanager
def _targets_named(lora: Lora) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"the adapter cannot be put on this model: {str(error).splitlines()[0]}. "
            f"Lora.targets is {lora.targets}; leave it empty for every linear layer"
        ) from error


def _lora_config(model: nn.Module, lora: Lora) -> LoraConfig:
    settings: dict[str, Any] = {}
    if any(isinstance(module, Conv1D) for module in model.modules()):
        settings["fan_in_fan_out"] = True  # GPT-2 stores its linear layers transposed
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - peft divides it, any number will do
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        **settings,
    )
