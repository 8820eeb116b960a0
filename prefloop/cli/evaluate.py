"""`prefloop evaluate`: a trained policy against its reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

if TYPE_CHECKING:
    from prefloop.mixture import Votes
    from prefloop.policies import Policy, Sampling
    from prefloop.shares import Worker
    from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a trained policy with its reference on held-out data."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `prefloop train`; with --by annotator also of `prefloop aggregate`."""
    data: Path
    """Held-out prompts (with --reward), or held-out comparisons."""
    reward: str | None = None
    """Sample answers and score them: vader, module:function, or a reward model."""
    by: Literal["everybody", "annotator"] = "everybody"
    """annotator: worst-off and average annotator, Gini; of every form of a mixture."""
    columns: tuple[str, ...] = ()
    """Other names of columns of --data, new=old: annotator=worker."""
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

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    def __call__(self) -> None:
        """Write evaluation.json and say what is in it."""
        from prefloop.runs import write_json
        from prefloop.shares import this_worker

        out, worker = self.out or self.run, this_worker()
        found = (
            self._by_annotator(worker)
            if self.by == "annotator"
            else self._by_everybody(out, worker)
        )
        if not worker.leads:
            return
        out.mkdir(parents=True, exist_ok=True)
        if self.by == "annotator":
            from prefloop.aggregating import annotators_section

            say_forms(found["forms"])
            write_json(out / "annotators.section.json", annotators_section(found))
        else:
            say(found)
        write_json(out / "evaluation.json", found)
        print(f"wrote {out / 'evaluation.json'}")
        print(f"next: prefloop report {self.run}")

    def _by_everybody(self, out: Path, worker: "Worker") -> dict[str, Any]:
        from prefloop.collecting import Draw
        from prefloop.comparing import compare, ranking, trained_policy
        from prefloop.data import parse_columns, read, read_prompts
        from prefloop.rewards import load_reward

        policy = trained_policy(self.run)
        if self.reward is None:
            return ranking(policy, read(self.data, parse_columns(self.columns)), worker)
        out.mkdir(parents=True, exist_ok=True)
        prompts, reward = read_prompts(self.data), load_reward(self.reward)
        draw = Draw(n=self.n, settings=self._sampling(), seed=self.seed)
        return compare(policy, prompts, reward, out, draw, worker)

    def _by_annotator(self, worker: "Worker") -> dict[str, Any]:
        import torch

        from prefloop import data
        from prefloop.aggregating import (
            Drawing,
            evaluate_by_annotator,
            load_types,
            ranking_by_annotator,
        )
        from prefloop.comparing import trained_policy
        from prefloop.errors import UserError
        from prefloop.mixture import with_annotators
        from prefloop.policies import load_policy
        from prefloop.runs import read_json

        if self.reward is not None:
            raise UserError(
                "--by annotator reads votes and the types' own rewards; leave --reward out"
            )
        read = data.read(self.data, data.parse_columns(self.columns))
        rows = with_annotators(read, "refuse")
        if not (self.run / "regret.json").is_file():
            policy = trained_policy(self.run)
            return ranking_by_annotator(policy, self._votes(rows, policy, worker), worker)
        run = Path(read_json(self.run / "config.json")["settings"]["run"])
        types = load_types(run, worker=worker)
        mixtures = {
            name: torch.tensor(one["weights"], dtype=torch.float64)
            for name, one in read_json(self.run / "regret.json")["mixtures"].items()
        }
        distilled = (self.run / "policy").is_dir()
        others = {"distilled": load_policy(self.run / "policy")} if distilled else {}
        drawing = Drawing(n=self.n, settings=self._sampling(), seed=self.seed)
        votes = self._votes(rows, types.reference, worker)
        return evaluate_by_annotator(types, votes, mixtures, others, drawing)

    def _votes(self, rows: "list[Comparison]", policy: "Policy", worker: "Worker") -> "Votes":
        from prefloop.data import Overlong, tokenize
        from prefloop.errors import UserError
        from prefloop.mixture import Votes

        ordered = [row for row in rows if len({r for r in row.rank or () if r}) > 1]
        if not ordered:
            raise UserError(f"{self.data}: no row puts one response before another; ranks are read")
        tokens, left_out = tokenize(ordered, policy.tokenizer, policy.context, Overlong.drop)
        if worker.leads:
            print(f"{len(tokens)} judgements; {len(rows) - len(ordered)} ties left out; {left_out}")
        return Votes.of(tokens)

    def _sampling(self) -> "Sampling":
        from prefloop.policies import Sampling

        return Sampling(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, rows=self.rows
        )


def say(found: dict[str, object]) -> None:
    """Print the result table."""
    rows = found["result"]
    assert isinstance(rows, list)
    for row in rows:
        print(
            f"{row['name']:<34}{row['value']:>9.4f}  [{row['low']:.4f}, {row['high']:.4f}]  "
            f"{row['unit']}, n = {row['n']}"
        )


def say_forms(forms: dict[str, dict[str, Any]]) -> None:
    """Print worst and average annotator of every form, and the Gini coefficient."""
    said = {"accuracy": "accuracy", "win_rate": "win rate", "regret": "regret"}
    head = "".join(f"{name + ': worst':>17}{'average':>9}{'Gini':>7}" for name in said.values())
    print(f"{'form':<24}{head}")
    for name, one in forms.items():
        cells = ""
        for kind in said:
            found = one.get(kind)
            numbers = ("worst", "average", "gini")
            shown = [None if found is None else found[number] for number in numbers]
            text = ["" if value is None else f"{value:.3f}" for value in shown]
            cells += f"{text[0]:>17}{text[1]:>9}{text[2]:>7}"
        print(f"{name:<24}{cells}")
