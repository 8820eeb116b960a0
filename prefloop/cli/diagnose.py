"""`prefloop diagnose`: what training did to the probabilities."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from prefloop.diagnosing import Probe
    from prefloop.shares import Worker
    from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say what training did: displacement, mass, ranking, calibration, information, text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `prefloop train`."""
    data: Path
    """Judged comparisons that were not trained on."""
    out: Path | None = None
    """Folder for diagnosis.json; the run folder by default."""
    beta: float = 0.1
    """Of the training: the size of the margins."""
    samples: int = 0
    """Answers of the reference to draw for each prompt: DID entropy, and where probability went."""
    max_new_tokens: int = 64
    """Longest of them, in tokens."""
    seed: int = 0
    """Of the sampled answers."""
    rejected_policy: Path | None = None
    """Who wrote the rejected responses, or a model fitted to them: for the data's own beta."""
    init_sweep: tuple[int, ...] = ()
    """Train the run again from SFT checkpoints at these steps, 0 10 40, and show what moved."""
    sft_lr: float = 1e-4
    """Learning rate of the sweep's SFT."""

    @property
    def shares(self) -> bool:
        """Whether the processes of torchrun share the work; trainings of a sweep are one's."""
        return not self.init_sweep

    def __call__(self) -> None:
        """Write diagnosis.json and say the verdict; with --init-sweep, init_sweep.json."""
        from prefloop.comparing import trained_policy
        from prefloop.data import read
        from prefloop.diagnosing import diagnose
        from prefloop.shares import this_worker

        comparisons = read(self.data)
        out = self.out or self.run
        if self.init_sweep:
            self._sweep(comparisons, out)
            return
        worker = this_worker()
        policy = trained_policy(self.run)
        out.mkdir(parents=True, exist_ok=True)
        held = diagnose(policy, comparisons, self.beta, self.run, out, self._probe(worker))
        if not worker.leads:
            return
        for sentence in held["verdict"]:
            print(f"- {sentence}")
        print(f"wrote {out / 'diagnosis.json'}")
        print(f"next: prefloop report {self.run}")

    def _probe(self, worker: "Worker") -> "Probe":
        from prefloop.diagnosing import Probe
        from prefloop.policies import load_policy

        rejected = None if self.rejected_policy is None else load_policy(self.rejected_policy)
        return Probe(
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            rejected=rejected,
            worker=worker,
        )

    def _sweep(self, held_out: "list[Comparison]", out: Path) -> None:
        from dataclasses import replace

        from prefloop.cli import replayed
        from prefloop.cli.train import Train
        from prefloop.initialization import InitSweep

        recipe = replayed(Train, "train", self.run / "config.json").recipe()
        rows = InitSweep(
            recipe=recipe,
            steps=self.init_sweep,
            sft=replace(recipe.settings, lr=self.sft_lr),
            held_out=held_out,
            beta=self.beta,
            out=out,
            on_stage=lambda stage: print(f"[{stage}]", flush=True),
        )()
        for row in rows:
            print(
                f"{row['SFT steps']:>5} SFT steps: chosen {row['chosen']:+.2f} nats, rejected "
                f"{row['rejected']:+.2f}, chosen fell in {100 * row['chosen fell']:.0f} %"
            )
        print(f"wrote {out / 'init_sweep.json'}")
        print(f"next: prefloop report {out}")
