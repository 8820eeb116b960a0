"""`prefloop reward`: judged rows -> a reward model, and what it is worth."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from prefloop.reward_training import CausalBackbone, EncoderBackbone, Measured
    from prefloop.reward_training.losses import Loss
    from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model on comparisons: heads on a sentence encoder, or a causal model."""

    data: Path
    """Comparisons: ranked or scored rows, in any form that `prefloop check` reads."""
    out: Path
    """Run folder; refused if it holds a run."""
    encoder: str = "minilm"
    """Frozen sentence encoder under the heads: minilm, or a folder or hub name."""
    model: str = ""
    """Hugging Face name or folder of a causal model to train instead of heads on an encoder."""
    loss: str = "BradleyTerry()"
    """BradleyTerry(margin=0, score_margin=0, label_smoothing=0, centre=0), or PlackettLuce()."""
    members: int = 0
    """Reward models of the ensemble, each on its own draw of the rows; 0: 5 with an encoder, 1 with
    a model. Doubtful labels need 2 or more."""
    features: tuple[str, ...] = ("response", "product")
    """What a head on an encoder reads: response, product, distance, length."""
    hidden: int = 0
    """Width of a hidden layer of a head on an encoder; 0 is linear."""
    l2: float = 0.0
    """Pull to 0 of the weights of a head on an encoder; 0 finds one on a fifth of the prompts."""
    held_out: Path | None = None
    """Comparisons to measure on, never trained on."""
    held_out_share: float = 0.2
    """Share of the prompts of --data to hold out where --held-out is not given; 0 holds none."""
    pairs: Literal["best-worst", "all"] = "best-worst"
    """Which responses are ordered where a row has scores only."""
    lora_rank: int = 16
    """Rank of the adapter of a causal model; 0 trains it whole."""
    lora_alpha: float = 32.0
    """Scale of the adapter, divided by its rank."""
    max_length: int = 0
    """Most tokens of a prompt and its response in a causal model; 0 is its context."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What a causal model does with longer rows; an encoder cuts them."""
    empty: Literal["refuse", "drop"] = "refuse"
    """What a causal model does with rows with an empty response; an encoder reads them."""
    columns: tuple[str, ...] = ()
    """Other names of columns, new=old: prompt=instruction annotator=worker."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass of a causal model, by Accelerate."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out."""

    @property
    def shares(self) -> bool:
        """Whether the processes of torchrun share the work; heads on an encoder take seconds."""
        return bool(self.model)

    def __call__(self) -> None:
        """Check everything, train the members, measure, say what came out."""
        from accelerate import PartialState

        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.expression import parse
        from prefloop.reward_training import LOSSES, CausalBackbone, RewardTraining
        from prefloop.runs import start_run
        from prefloop.trainer import finish

        loss = parse(self.loss, LOSSES)
        members = self.members or (1 if self.model else 5)
        with progress("training", members) as bar:
            backbone = self._causal(loss) if self.model else self._encoder(loss)
            training = RewardTraining(
                backbone=backbone,
                members=members,
                seed=self.loop.seed,
                out=self.out,
                on_member=bar,
            )
            rows, held_out = self._rows(backbone)
            if PartialState().is_main_process:
                start_run(self.out, "reward", settings(self), self.resume)
                print(f"training {members} on {len(rows)} rows; {len(held_out)} held out")
            PartialState().wait_for_everyone()
            measured = training(rows, held_out)
        if isinstance(backbone, CausalBackbone):
            finish(backbone.accelerator)
        if measured:
            _say(self.out, measured)

    def _encoder(self, loss: "Loss") -> "EncoderBackbone":
        from prefloop.reward_training import EncoderBackbone
        from prefloop.rewards.encoders import load_encoder

        return EncoderBackbone(
            encoder=load_encoder(self.encoder),
            loss=loss,
            features=self.features,
            hidden=self.hidden,
            l2=self.l2,
        )

    def _causal(self, loss: "Loss") -> "CausalBackbone":
        from prefloop.data import Empty, Overlong
        from prefloop.policies import Lora
        from prefloop.reward_training import CausalBackbone
        from prefloop.trainer.build import accelerator_for

        adapter = Lora(rank=self.lora_rank, alpha=self.lora_alpha) if self.lora_rank else None
        return CausalBackbone(
            model=self.model,
            adapter=adapter,
            loss=loss,
            settings=self.loop,
            accelerator=accelerator_for((), self.out, self.precision),
            max_length=self.max_length or None,
            overlong=Overlong(self.overlong),
            empty=Empty(self.empty),
        )

    def _rows(
        self, backbone: "CausalBackbone | EncoderBackbone"
    ) -> tuple[list["Comparison"], list["Comparison"]]:
        """What is trained on and what is held out, ranked."""
        from prefloop import data
        from prefloop.reward_training import EncoderBackbone, judged
        from prefloop.training import PAIRS

        columns = data.parse_columns(self.columns)
        share, seed = self.held_out_share, self.loop.seed
        rows, held_out = data.read_divided(self.data, self.held_out, share, seed, columns)
        order = PAIRS[self.pairs]
        if isinstance(backbone, EncoderBackbone) and (cut := backbone.cut([*rows, *held_out])):
            limit = backbone.encoder.max_tokens
            print(f"{cut} texts are longer than the encoder's {limit} tokens and are cut there")
        train = judged(backbone.readable(rows), order)
        return train, judged(backbone.readable(held_out), order) if held_out else []


def _say(out: Path, measured: "list[Measured]") -> None:
    for one in measured:
        low, high = one.accuracy.low, one.accuracy.high
        print(
            f"{one.name + ':':<10} accuracy {one.accuracy.value:.3f} [{low:.3f}, {high:.3f}] on "
            f"{one.accuracy.clusters} pairs, ECE {one.calibration.ece:.3f}"
        )
    if (out / "flips.jsonl").exists():
        print(f"labels by how doubtful they are: {out / 'flips.jsonl'}")
    print(f"next: prefloop score --data ANSWERS --reward {out} --out SCORED")
