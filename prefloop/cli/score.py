"""`prefloop score`: a reward for each answer."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score sampled answers with a reward."""

    data: Path
    """Rows with `prompt` and `responses`."""
    out: Path
    """Folder for scored.jsonl; refused if it holds a run."""
    reward: str
    """vader, brevity, questions; module:function; or the folder or name of a reward model."""
    resume: bool = False
    """Go on with the run in --out."""

    def __call__(self) -> None:
        """Write scored.jsonl, kept as the scores come."""
        from prefloop import data
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.collecting import score_to_file
        from prefloop.rewards import load_reward
        from prefloop.runs import start_run

        rows = data.read(self.data)
        reward = load_reward(self.reward)
        out = start_run(self.out, "score", settings(self), self.resume)
        with progress("scoring", len(rows)) as step:
            scored = score_to_file(rows, reward, out, step)
        flat = [value for row in scored for value in row.scores or ()]
        mean = sum(flat) / len(flat)
        print(f"wrote {out / 'scored.jsonl'}: {len(flat)} answers, mean reward {mean:.4f}")
        print(f"next: prefloop select --data {out / 'scored.jsonl'} --out SELECTED")
