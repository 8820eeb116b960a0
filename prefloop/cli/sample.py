"""`prefloop sample`: several answers to each prompt."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample several answers to each prompt."""

    model: str
    """Hugging Face name or folder of the policy; a folder with an adapter brings its base along."""
    data: Path
    """Rows with a `prompt`; other columns are carried along."""
    out: Path
    """Folder for responses.jsonl; refused if it holds a run."""
    n: int = 4
    """Answers a prompt."""
    sampler: str = "FromPolicy()"
    """Where answers come from: FromPolicy(), FromReference(), Hybrid(), Tilted(k=0.5), ..."""
    temperature: float = 1.0
    """Divides the logits; 1 is the model's own distribution, 0 the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    rows: int = 32
    """Answers decoded side by side; more is faster and needs more memory."""
    seed: int = 0
    """Answers follow from the seed and the prompt."""
    resume: bool = False
    """Go on with the run in --out."""

    def __call__(self) -> None:
        """Write responses.jsonl, kept as the answers come."""
        from prefloop import data
        from prefloop.cli import settings
        from prefloop.cli.console import progress
        from prefloop.collecting import Draw, sample_to_file
        from prefloop.expression import parse
        from prefloop.policies import Sampling, load_policy
        from prefloop.runs import start_run
        from prefloop.samplers import SAMPLERS

        sampler = parse(self.sampler, SAMPLERS)
        drawing = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            rows=self.rows,
        )
        draw = Draw(n=self.n, settings=drawing, seed=self.seed, sampler=sampler)
        prompts = data.read_prompts(self.data)
        policy = load_policy(self.model)
        out = start_run(self.out, "sample", settings(self), self.resume)
        with progress("sampling", len(prompts)) as step:
            sample_to_file(policy, prompts, out, draw, step)
        print(
            f"wrote {out / 'responses.jsonl'}: {self.n} answers to each of {len(prompts)} prompts"
        )
        print(f"next: prefloop score --data {out / 'responses.jsonl'} --reward vader --out SCORED")
