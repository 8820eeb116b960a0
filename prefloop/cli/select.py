"""`prefloop select`: choose the prompts that are worth a label."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Select:
    """Choose the prompts that are worth a label, by a score of each prompt."""

    data: Path
    """Scored responses: scored.jsonl of `prefloop score`, or any data with a score a response."""
    out: Path
    """Folder for selected.jsonl and selection.json; refused if it holds a run."""
    rule: str = "PVar()"
    """What scores a prompt: PVar(scale=1.0), OnlinePVar(beta=0.1), RewardGap(), Random(seed=0)."""
    keep: Literal["top", "bottom", "above"] = "top"
    """Keep the highest scores, the lowest, or all of at least --threshold."""
    fraction: float = 0.5
    """Share of the prompts to keep, rounded down; with top and bottom."""
    budget: int = 0
    """Prompts to keep; 0 leaves it to --fraction."""
    threshold: float = 0.0
    """Smallest score to keep, in the rule's units; with above."""
    resume: bool = False
    """Go on with the run in --out."""

    def __call__(self) -> None:
        """Write every row with its score, its weight (1 kept, 0 not) and the reason."""
        from prefloop.cli import settings
        from prefloop.expression import parse
        from prefloop.runs import start_run
        from prefloop.selecting import Cut, select
        from prefloop.selection import RULES

        rule = parse(self.rule, RULES)
        cut = Cut(
            keep=self.keep,
            fraction=self.fraction,
            budget=self.budget,
            threshold=self.threshold,
        )
        out = start_run(self.out, "select", settings(self), self.resume)
        chosen = select(self.data, out, rule, cut)
        print(
            f"kept {chosen['kept']} of {chosen['total']} prompts by {self.rule}, {self.keep}; "
            f"scores {chosen['lowest']:.4g} to {chosen['highest']:.4g}, cut {chosen['cut']:.4g}"
        )
        print(f"wrote {out / 'selected.jsonl'}")
        print(f"next: prefloop train --data {out / 'selected.jsonl'} --model MODEL --out RUN")
