"""The reward models that `prefloop reward` trains, read back from their run folder.

RUN/reward/reward.json           what the members are, and on what
RUN/reward/member-K/             head.safetensors; with a causal model also its adapter or weights
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Protocol, runtime_checkable

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prefloop.errors import UserError
from prefloop.policies import load_policy
from prefloop.rewards.causal import CausalMembers
from prefloop.rewards.encoders import load_encoder
from prefloop.rewards.heads import EncoderMembers, Head, refuse_unknown_features
from prefloop.rewards.models import Classifier, load_reward_model
from prefloop.rewards.scoring import Prompt
from prefloop.runs import read_json

FILE = "reward.json"
HEAD = "head.safetensors"


@runtime_checkable
class Members(Protocol):
    """K reward models that are asked together."""

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[tuple[float, ...], ...]]:
        """K rewards for each response of each prompt."""
        ...


@dataclass(frozen=True, eq=False)
class Ensemble:
    """K reward models as one: the mean of what they give, less a price on their disagreement.

        r = mean over k of r_k - penalty * (standard deviation over k of r_k)

    The standard deviation is that of the K numbers themselves (divided by K).

    Attributes:
        ask: the members.
        penalty: 0 for the mean; above 0 is pessimistic where the members disagree.
    """

    ask: Members
    penalty: float = 0.0

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """The reward of each response."""
        return [self.combined(row) for row in self.ask(prompts, responses)]

    def members(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> list[tuple[tuple[float, ...], ...]]:
        """What each of the K members gives each response."""
        return self.ask(prompts, responses)

    def combined(self, row: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """The reward of each response of one prompt, from what the members gave."""
        return tuple(fmean(values) - self.penalty * pstdev(values) for values in row)


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A reward model by its place, as the command line and config.json write it.

    Attributes:
        path: the run folder of `prefloop reward`, or the folder or hub name of a sequence
            classifier with one output.
        penalty: standard deviations of an ensemble that are taken off its mean, 0 or more.
    """

    path: str
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < float("inf"):
            raise UserError(f"RewardModel.penalty must be 0 or more, got {self.penalty}")

    def load(self) -> Ensemble | Classifier:
        """The reward itself.

        Raises:
            UserError: nothing there that is a reward model, or a penalty on a single one.
        """
        if trained := trained_folder(self.path):
            return load_trained(trained, self.penalty)
        if self.penalty:
            raise UserError(
                f"RewardModel.penalty is {self.penalty}, and {self.path} is a single reward model: "
                "it has no disagreement to pay for. Leave the penalty out, or train an ensemble "
                "with prefloop reward"
            )
        return load_reward_model(self.path)


def trained_folder(path: str | Path) -> Path | None:
    """The folder with reward.json that `path` is or holds, or None."""
    folders = (Path(path), Path(path) / "reward")
    return next((folder for folder in folders if (folder / FILE).is_file()), None)


def load_trained(folder: Path, penalty: float = 0.0) -> Ensemble:
    """The reward model that `prefloop reward` left in `folder`.

    Raises:
        UserError: a file that is missing, not safetensors, or of something else.
    """
    told: dict[str, Any] = read_json(folder / FILE)
    kinds = {"encoder": _encoder_members, "causal": _causal_members}
    if told.get("kind") not in kinds or not told.get("members"):
        raise UserError(
            f"{folder / FILE}: a reward model is of kind encoder or causal and has members; found "
            f"kind {told.get('kind')!r}, members {told.get('members')!r}"
        )
    members = kinds[told["kind"]](folder, told)
    if penalty and len(told["members"]) == 1:
        raise UserError(
            f"a penalty of {penalty} on {folder}, which has one member and so no disagreement. "
            "Leave it out, or train an ensemble with --members 5"
        )
    return Ensemble(members, penalty)


def _encoder_members(folder: Path, told: dict[str, Any]) -> EncoderMembers:
    features = tuple(told["features"])
    refuse_unknown_features(features)
    encoder = load_encoder(told["encoder"])
    if encoder.identity != told["identity"]:
        raise UserError(
            f"{folder / FILE}: the heads were trained on other weights of {told['encoder']} than "
            "are there now. Bring the old encoder back, or train the heads again"
        )
    heads = [Head(**_tensors(folder / name / HEAD)) for name in told["members"]]
    return EncoderMembers(encoder, features, tuple(heads))


def _causal_members(folder: Path, told: dict[str, Any]) -> CausalMembers:
    folders = [folder / name for name in told["members"]]
    heads = tuple(_linear(_tensors(member / HEAD)["weight"]) for member in folders)
    first = load_policy(folders[0])
    if not isinstance(first.model, PeftModel):
        policies = (first, *map(load_policy, folders[1:]))
        return CausalMembers(policies, (None,) * len(folders), heads)
    names = ("default", *(f"member-{number}" for number in range(2, len(folders) + 1)))
    for name, member in zip(names[1:], folders[1:], strict=True):
        if not (member / "adapter_model.safetensors").is_file():
            raise UserError(f"{member}: no adapter_model.safetensors; the run is not finished")
        first.model.load_adapter(str(member), adapter_name=name)
    first.model.eval()
    return CausalMembers((first,) * len(folders), names, heads)


def _linear(weight: Tensor) -> nn.Linear:
    head = nn.Linear(weight.shape[-1], 1, bias=False)
    head.load_state_dict({"weight": weight})
    return head.requires_grad_(False)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a readable head of a reward model ({error}); train it again"
        ) from None
