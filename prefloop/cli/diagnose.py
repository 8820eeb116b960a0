"""`prefloop diagnose`: what training did to the probabilities."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say what training did: displacement, mass, ranking, calibration, text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `prefloop train`."""
    data: Path
    """Judged comparisons that were not trained on."""
    out: Path | None = None
    """Folder for diagnosis.json; the run folder by default."""
    beta: float = 0.1
    """Of the training: the size of the margins."""

    def __call__(self) -> None:
        """Write diagnosis.json and say the verdict."""
        from prefloop.comparing import trained_policy
        from prefloop.data import read
        from prefloop.diagnosing import diagnose

        comparisons = read(self.data)
        policy = trained_policy(self.run)
        out = self.out or self.run
        out.mkdir(parents=True, exist_ok=True)
        held = diagnose(policy, comparisons, self.beta, self.run, out)
        for sentence in held["verdict"]:
            print(f"- {sentence}")
        print(f"wrote {out / 'diagnosis.json'}")
        print(f"next: prefloop report {self.run}")
