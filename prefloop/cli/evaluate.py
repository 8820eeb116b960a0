"""`prefloop evaluate`: a trained policy against its reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a trained policy with its reference on held-out data."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `prefloop train`."""
    data: Path
    """Held-out prompts (with --reward), or held-out comparisons."""
    reward: str | None = None
    """Sample answers and score them: vader, module:function, or a reward model."""
    out: Path | None = None
    """Folder for evaluation.json and samples.jsonl; the run folder by default."""
    n: int = 2
    """Answers a prompt, of each policy."""
    temperature: float = 1.0
    """Divides the logits; KL is only estimated without bias at 1."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    rows: int = 32
    """Answers decoded side by side."""
    seed: int = 0
    """Answers follow from the seed and the prompt."""

    def __call__(self) -> None:
        """Write evaluation.json and say what is in it."""
        from prefloop.collecting import Draw
        from prefloop.comparing import compare, ranking, trained_policy
        from prefloop.data import read, read_prompts
        from prefloop.policies import Sampling
        from prefloop.rewards import load_reward
        from prefloop.runs import write_json

        policy = trained_policy(self.run)
        out = self.out or self.run
        out.mkdir(parents=True, exist_ok=True)
        if self.reward is None:
            found = ranking(policy, read(self.data))
            write_json(out / "evaluation.json", found)
        else:
            drawing = Sampling(
                temperature=self.temperature, max_new_tokens=self.max_new_tokens, rows=self.rows
            )
            prompts, reward = read_prompts(self.data), load_reward(self.reward)
            draw = Draw(n=self.n, settings=drawing, seed=self.seed)
            found = compare(policy, prompts, reward, out, draw)
        say(found)
        print(f"wrote {out / 'evaluation.json'}")
        print(f"next: prefloop report {self.run}")


def say(found: dict[str, object]) -> None:
    """Print the result table."""
    rows = found["result"]
    assert isinstance(rows, list)
    for row in rows:
        print(
            f"{row['name']:<34}{row['value']:>9.4f}  [{row['low']:.4f}, {row['high']:.4f}]  "
            f"{row['unit']}, n = {row['n']}"
        )
