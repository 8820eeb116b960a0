"""`prefloop aggregate`: the types of a mixture run -> one policy that no type loses much by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from prefloop.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from prefloop.aggregating import Answered, Solved, Types
    from prefloop.policies import Sampling
    from prefloop.types import Comparison


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One policy from the types of a mixture: regrets, fair weights, and a policy made of them."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `prefloop mixture`."""
    data: Path
    """Prompts to estimate regrets on, and to distil on."""
    out: Path
    """Folder for regret.json and what else is asked for; refused if it holds a run."""
    n: int = 2
    """Answers of each type to each prompt, for the regrets."""
    importance: tuple[float, ...] = ()
    """How much a unit of each type's regret counts; 1 for each by default."""
    held_out: Path | None = None
    """Judgements to evaluate every form on, by annotator."""
    new: Path | None = None
    """A few judgements of new annotators: their types go to personal.jsonl."""
    distil: int = 0
    """Answers a prompt to train one policy on; 0 trains none. They are kept in answers.jsonl."""
    by: Literal["sft", "kl"] = "sft"
    """How it learns: from the answers' tokens, or from the form's whole distribution at each."""
    weights: Literal["min-max", "max-min", "population", "uniform", "personal"] = "min-max"
    """How often each type answers, for --distil: min-max regret, max-min reward, shares, equal."""
    annotator: str = ""
    """Whose posterior mixture is distilled, with --weights personal; of the run, or of --new."""
    form: Literal["draw", "geometric"] = "draw"
    """draw: one type answers a prompt; geometric: logits are pooled, which averages rewards."""
    lora_rank: int = 16
    """Rank of the distilled adapter; 0 trains the whole model."""
    temperature: float = 1.0
    """Divides the logits; regrets are those of the policies themselves only at 1."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    rows: int = 32
    """Answers decoded side by side."""
    columns: tuple[str, ...] = ()
    """Other names of columns of --held-out and --new, new=old: annotator=worker."""
    loop: Annotated[TrainSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainSettings)
    resume: bool = False
    """Go on with the run in --out."""

    shares: ClassVar[bool] = True  # the work, with the processes of torchrun

    def __call__(self) -> None:
        """Write regret.json, then what was asked for, and say who loses how much."""
        from prefloop.aggregating import answer, load_types, solve
        from prefloop.cli import settings
        from prefloop.data import encoder, read_prompts
        from prefloop.mixture import refuse_divided
        from prefloop.policies import Sampling
        from prefloop.runs import start_run
        from prefloop.shares import PATIENCE, worker_of
        from prefloop.trainer.build import accelerator_for, finish

        prompts = read_prompts(self.data)
        accelerator = accelerator_for((), self.out, "no", PATIENCE)
        refuse_divided(accelerator)
        worker = worker_of(accelerator)
        types = load_types(self.run, worker=worker)
        new = self._new(types)
        known = types.gamma | new
        self._refuse_nobody(known)
        worker.led(lambda: start_run(self.out, "aggregate", settings(self), self.resume))
        drawing = Sampling(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, rows=self.rows
        )
        tokens = encoder(types.reference.tokenizer).prompts(prompts)
        answered = answer(types, tokens, self.n, drawing, self.loop.seed)
        solved = solve(types, answered, self.importance)
        if worker.leads:
            self._write(solved, prompts, answered, new)
        if self.held_out:
            self._evaluate(types, solved)
        if self.distil:
            self._distil(types, self._weights(known, solved), tokens, drawing, accelerator)
        finish(accelerator)
        if worker.leads:
            print(f"next: prefloop report {self.out}")

    def _write(
        self,
        solved: "Solved",
        prompts: "list[Comparison]",
        answered: "Answered",
        new: dict[str, list[float]],
    ) -> None:
        from prefloop.aggregating import regret_section
        from prefloop.runs import write_json, write_jsonl

        write_json(self.out / "regret.json", solved.as_json())
        section = regret_section(solved, [_shown(prompt) for prompt in prompts], answered)
        write_json(self.out / "regret.section.json", section)
        _say(solved.as_json())
        if self.new:
            lines = ({"annotator": name, "gamma": gamma} for name, gamma in new.items())
            write_jsonl(self.out / "personal.jsonl", lines)
            print(f"types of {len(new)} new annotators: {self.out / 'personal.jsonl'}")

    def _refuse_nobody(self, known: Mapping[str, list[float]]) -> None:
        from prefloop.errors import UserError

        if self.weights == "personal" and self.annotator not in known:
            raise UserError(
                f"--weights personal needs --annotator, one of the {len(known)} annotators "
                f"of {self.run} and of --new; got {self.annotator!r}"
            )

    def _weights(self, known: Mapping[str, list[float]], solved: "Solved") -> "Tensor":
        import torch

        if self.weights == "personal":
            return torch.tensor(known[self.annotator], dtype=torch.float64)
        return solved.weights()[self.weights]

    def _evaluate(self, types: "Types", solved: "Solved") -> None:
        from prefloop.aggregating import accuracy_by_annotator
        from prefloop.runs import write_json

        assert self.held_out is not None
        found = accuracy_by_annotator(types, self._votes(types, self.held_out), solved.weights())
        if not types.worker.leads:
            return
        write_json(self.out / "annotators.json", found)
        print("accuracy on held-out judgements, by annotator: worst, mean")
        for name, one in found.items():
            print(f"  {name:<24}{one['worst']:.3f}  {one['average']:.3f}")

    def _new(self, types: "Types") -> dict[str, list[float]]:
        """Posterior of each annotator of --new."""
        from prefloop.aggregating import posterior

        if self.new is None:
            return {}
        votes = self._votes(types, self.new)
        return dict(zip(votes.names, posterior(types, votes).tolist(), strict=True))

    def _votes(self, types: "Types", path: Path) -> Any:
        from prefloop import data
        from prefloop.mixture import Votes, with_annotators
        from prefloop.objectives import PlackettLuce
        from prefloop.training import Handling, prepare

        read = data.read(path, data.parse_columns(self.columns))
        named = with_annotators(read, "refuse")
        prepared = prepare(named, types.reference, PlackettLuce(), Handling(pairs="all"))
        return Votes.of(prepared.rows)

    def _distil(
        self,
        types: "Types",
        weights: "Tensor",
        prompts: list[tuple[int, ...]],
        drawing: "Sampling",
        accelerator: "Accelerator",
    ) -> None:
        from prefloop.aggregating import answers_of, distil, distil_by_kl
        from prefloop.policies import Lora, load_policy
        from prefloop.runs import write_jsonl

        seeds = range(self.loop.seed, self.loop.seed + self.distil)
        drawn = list(answers_of(self.form, types, prompts, weights, drawing, seeds))
        answers = [tuple(one[place] for one in drawn) for place in range(len(prompts))]
        decode = types.reference.tokenizer.decode
        told = (
            {"prompt": decode([*prompt]), "answers": [decode([*one]) for one in given]}
            for prompt, given in zip(prompts, answers, strict=True)
        )
        types.worker.led(lambda: write_jsonl(self.out / "answers.jsonl", told))
        adapter = Lora(rank=self.lora_rank, alpha=2.0 * self.lora_rank) if self.lora_rank else None
        policy = load_policy(types.model, adapter=adapter, seed=self.loop.seed)
        if self.by == "kl":
            teacher, training = (types, self.form, weights), (self.loop, accelerator)
            metrics = distil_by_kl(policy, prompts, answers, teacher, training, self.out)
        else:
            metrics = distil(policy, prompts, answers, self.loop, accelerator, self.out)
        if not types.worker.leads:
            return
        said = f"distilled {self.form} of {self.weights} by {self.by}"
        print(f"{said}: loss {metrics['loss']:.4f} nats an answer")
        print(f"policy: {self.out / 'policy'}")


def _say(found: Mapping[str, Any]) -> None:
    for row, errors in zip(found["matrix"], found["standard_error"], strict=True):
        cells = (f"{x:8.4f} ({e:.4f})" for x, e in zip(row, errors, strict=True))
        print("regret  " + "  ".join(cells))
    for name in ("min-max", "max-min", "population", "uniform"):
        one = found["mixtures"][name]
        weights = " ".join(f"{weight:.3f}" for weight in one["weights"])
        print(f"{name:<12}weights {weights}  worst regret {one['worst']:.4f}")
    gap = found["min_max"]["gap"]
    apart = abs(found["multiplicative_weights"]["worst"] - found["min_max"]["worst"])
    print(f"certificate: gap {gap:.1e}; multiplicative weights are {apart:.1e} off")


def _shown(prompt: "Comparison") -> str:
    text = prompt.prompt
    return text if isinstance(text, str) else str(text[-1]["content"])
