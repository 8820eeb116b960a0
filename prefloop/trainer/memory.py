"""What a training run will need in memory, measured on one row before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prefloop.settings import TrainSettings
from prefloop.trainer.loop import global_batch
from prefloop.trainer.plan import forward_passes, steps_per_epoch, tokens
from prefloop.types import Tokenized, UserError, score

PROBE_TOKENS = 64
PROBE_STEPS = 32
ADAMW_STATE = 3  # a gradient and two moments for each trained weight
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one process. What stays out: Python and torch themselves, a GPU's context, the
    scratch space of single operations.

    Attributes:
        weights: of the policy, its reference included where that is the same model.
        training: gradients and AdamW's two moments of the weights that are trained.
        activations: what the largest forward pass keeps for its backward pass.
        pass_tokens: tokens of that pass.
    """

    weights: int
    training: int
    activations: int
    pass_tokens: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations

    def __str__(self) -> str:
        return (
            f"{_shown(self.total)} a process (weights {_shown(self.weights)}, gradients and AdamW "
            f"{_shown(self.training)}, activations {_shown(self.activations)} for "
            f"{self.pass_tokens:,} tokens a pass)"
        )


def estimate(
    scorer: nn.Module,
    rows: Sequence[Tokenized],
    settings: TrainSettings,
    processes: int = 1,
    divided: tuple[int, int] = (1, 1),
) -> Memory:
    """What an optimizer step will need, from a forward pass over one short row.

    The forward pass counts the bytes that autograd keeps; they grow with the tokens of a pass, so
    the largest pass of the first steps needs them times tokens over tokens. An estimate: attention
    without a memory-saving kernel grows faster, a table of logits stops growing (320 MiB).

    Args:
        scorer: the policy, not yet wrapped; eval or train mode, both are left as they are.
        rows: everything that will be trained on.
        settings: batch size and token budget.
        processes: over which the batch is divided.
        divided: over how many processes the weights are, and the gradients and moments: FSDP2 and
            ZeRO 3 divide both, ZeRO 2 the second, ZeRO 1 all of that but gradients, counted as 2.
    """
    if not rows:
        raise UserError("there is nothing to train on: no comparison is left")
    probe = _probe(rows)
    kept = _kept(scorer, probe)
    largest = _largest_pass(rows, settings, processes)
    weights = sum(_bytes(value) for value in scorer.parameters())
    trained = sum(_bytes(value) for value in scorer.parameters() if value.requires_grad)
    return Memory(
        weights=weights // divided[0],
        training=ADAMW_STATE * trained // divided[1],
        activations=round(kept * largest / sum(map(tokens, probe))),
        pass_tokens=largest,
    )


def _probe(rows: Sequence[Tokenized]) -> list[Tokenized]:
    """The shortest row that has tokens enough to measure with, or the longest there is."""
    enough = [row for row in rows if tokens(row) >= PROBE_TOKENS]
    return [min(enough, key=tokens) if enough else max(rows, key=tokens)]


def _kept(scorer: nn.Module, batch: Sequence[Tokenized]) -> int:
    """Bytes that autograd keeps of one forward pass, weights and shared storage counted once."""
    own = {value.untyped_storage().data_ptr() for value in scorer.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed block could come back under the same address

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    with saved_tensors_hooks(note, lambda value: value):
        score(scorer, batch)
    return sum(found.values())


def _largest_pass(rows: Sequence[Tokenized], settings: TrainSettings, processes: int) -> int:
    """Tokens of the largest forward pass that is likely: of the first steps, or the longest row."""
    largest = max(map(tokens, rows))
    for step in range(min(PROBE_STEPS, steps_per_epoch(len(rows), settings.batch_size))):
        batch = global_batch(rows, settings, step)
        for share in forward_passes(batch, processes, settings.token_budget):
            largest = max(largest, *(sum(map(tokens, part)) for part in share))
    return largest


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _shown(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"
