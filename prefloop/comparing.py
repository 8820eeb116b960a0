"""A trained policy against its reference, on held-out prompts: samples, rewards, win rate, KL.

Both answer every prompt with the same seed. Writes `samples.jsonl` (before and after, side by
side) and `evaluation.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from prefloop.collecting import Draw, with_answers
from prefloop.data import Empty, Overlong, as_text, encoder, tokenize
from prefloop.diagnostics.displacement import displacement
from prefloop.diagnostics.ranking import ranking as order
from prefloop.evaluation import kl, length_controlled_win_rate, outcomes, win_rate
from prefloop.intervals import Estimate, mean
from prefloop.policies import Policy, load_policy
from prefloop.policies.sampling import FromPolicy, Sample
from prefloop.rewards import Reward, score
from prefloop.runs import read_json, write_json, write_jsonl
from prefloop.samplers import FromReference
from prefloop.shares import ALONE, Worker
from prefloop.types import Comparison, Logps, Tokenized, UserError, judgement


@dataclass(frozen=True)
class Answers:
    """What one policy answered: `drawn` (prompts x n), their rewards, and the rows in tokens."""

    drawn: list[list[Sample]]
    rewards: torch.Tensor
    rows: list[Tokenized]


def compare(
    policy: Policy,
    prompts: Sequence[Comparison],
    reward: Reward,
    out: Path,
    draw: Draw,
    worker: Worker = ALONE,
) -> dict[str, Any]:
    """Sample, score and compare; what evaluation.json holds. Workers share the prompts."""
    after = _answers(policy, prompts, reward, replace(draw, sampler=FromPolicy()), worker)
    before = _answers(policy, prompts, reward, replace(draw, sampler=FromReference()), worker)
    found = _numbers(before, after, _divergence(policy, after, worker))
    if worker.leads:
        write_jsonl(
            out / "samples.jsonl",
            (
                {
                    "prompt": as_text(prompt.prompt),
                    "before": before.drawn[i][0].text,
                    "after": after.drawn[i][0].text,
                    "reward_before": float(before.rewards[i, 0]),
                    "reward_after": float(after.rewards[i, 0]),
                }
                for i, prompt in enumerate(prompts)
            ),
        )
        write_json(out / "evaluation.json", found)
    worker.wait()
    return found


def trained_policy(run: Path) -> Policy:
    """The policy of a run; one that was trained whole gets the model it started from as reference.

    Raises:
        UserError: the run holds no policy.
    """
    if not (run / "policy").is_dir():
        raise UserError(f"{run}: there is no trained policy here; run prefloop train first")
    policy = load_policy(run / "policy")
    if policy.adapter:
        return policy
    base = read_json(run / "config.json")["settings"]["model"]
    return replace(policy, frozen=load_policy(base).base)


def ranking(
    policy: Policy, comparisons: Sequence[Comparison], worker: Worker = ALONE
) -> dict[str, Any]:
    """How often policy, reference and implicit reward order held-out comparisons as people did.

    What evaluation.json holds; a pair of a comparison counts once, intervals are over prompts.
    """
    rows, trained, base, left_out = both_logps(policy, comparisons, worker)
    rank, prompt = judgement(rows).rank, same_prompt(rows)
    found = order(trained, base, rank, clusters=prompt)
    chosen = displacement(trained, base, rank, prompt).chosen
    names = {
        "policy, log-probability": found.policy,
        "policy, per token": found.policy_token,
        "reference, log-probability": found.reference,
        "reference, per token": found.reference_token,
        "implicit reward": found.implicit,
    }
    result = [part.accuracy.row(f"accuracy, {name}", "share") for name, part in names.items()]
    fell = chosen.fell.row("chosen became less likely", "share")
    moved = chosen.mean.row("change of chosen log-probability", "nats")
    return {"result": [*result, fell, moved], "rows": left_out}


def same_prompt(rows: Sequence[Tokenized]) -> Int[Tensor, " B"]:
    """A number for each row's prompt: rows that share one are one cluster of an interval."""
    numbers = {prompt: at for at, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    return torch.tensor([numbers[row.prompt] for row in rows])


def both_logps(
    policy: Policy, comparisons: Sequence[Comparison], worker: Worker = ALONE
) -> tuple[list[Tokenized], Logps, Logps, str]:
    """Held-out rows in tokens, what policy and reference say of them, and what was left out."""
    rows, report = tokenize(
        comparisons, policy.tokenizer, policy.context, Overlong.drop, empty=Empty.drop
    )
    if not rows:
        raise UserError("no comparison fits the model's context")
    trained = policy.logps(rows, worker=worker)
    base = policy.reference_logps(rows, worker=worker)
    return rows, trained, base, str(report)


def _answers(
    policy: Policy,
    prompts: Sequence[Comparison],
    reward: Reward,
    draw: Draw,
    worker: Worker,
) -> Answers:
    tokens = encoder(policy.tokenizer).prompts(prompts)
    mine = draw(policy, worker.share(tokens))
    answered = [
        with_answers(prompt, answers)
        for prompt, answers in zip(worker.share(prompts), mine, strict=True)
    ]
    scores = worker.gathered([row.scores for row in score(answered, reward)] if mine else [])
    drawn = worker.gathered(mine)
    rows = [
        Tokenized(prompt=tuple(asked), responses=tuple(one.tokens for one in answers), id=prompt.id)
        for prompt, asked, answers in zip(prompts, tokens, drawn, strict=True)
    ]
    return Answers(drawn, torch.tensor(scores, dtype=torch.float64), rows)


def _numbers(before: Answers, after: Answers, divergence: Estimate) -> dict[str, Any]:
    prompts, n = after.rewards.shape
    rate = win_rate(after.rewards, before.rewards)
    clusters = torch.arange(prompts).repeat_interleave(n)
    rewards = {
        name: mean(answers.rewards.flatten(), clusters)
        for name, answers in (("reference", before), ("policy", after))
    }
    lengths = {
        name: mean(_lengths(answers).flatten(), clusters)
        for name, answers in (("reference", before), ("policy", after))
    }
    result = [
        rate.rate.row("win rate against the reference", "share"),
        *_controlled(before, after),
        *(value.row(f"mean reward, {name}", "reward") for name, value in rewards.items()),
        divergence.row("KL(policy || reference)", "nats a response"),
        *(value.row(f"length, {name}", "tokens") for name, value in lengths.items()),
    ]
    return {
        "result": result,
        "wins": rate.wins,
        "ties": rate.ties,
        "losses": rate.losses,
        "reward_kl": [
            _point("reference", rewards["reference"], None),
            _point("policy", rewards["policy"], divergence),
        ],
    }


def _divergence(policy: Policy, after: Answers, worker: Worker) -> Estimate:
    """KL(policy || reference) by the answers of the policy itself."""
    trained = policy.logps(after.rows, worker=worker)
    base = policy.reference_logps(after.rows, worker=worker)
    return kl(trained, base).sequence


def _controlled(before: Answers, after: Answers) -> list[Mapping[str, Any]]:
    """The win rate at equal length, where the lengths vary enough to tell."""
    credit = outcomes(after.rewards, before.rewards)
    difference = _lengths(after).unsqueeze(-1) - _lengths(before).unsqueeze(-2)
    clusters = torch.arange(len(credit)).repeat_interleave(credit[0].numel())
    if difference.min() == difference.max():
        return []
    found = length_controlled_win_rate(credit.flatten(), difference.flatten(), clusters)
    return [found.rate.row("win rate at equal length", "share")]


def _lengths(answers: Answers) -> torch.Tensor:
    return torch.tensor(
        [[float(len(one.tokens)) for one in row] for row in answers.drawn], dtype=torch.float64
    )


def _point(name: str, reward: Estimate, divergence: Estimate | None) -> dict[str, Any]:
    return {
        "name": name,
        "reward": reward.value,
        "reward_se": reward.error,
        "kl": 0.0 if divergence is None else divergence.value,
        "kl_se": 0.0 if divergence is None else divergence.error,
    }
