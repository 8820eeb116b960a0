"""prefloop against TRL's DPOTrainer: the same pairs, weights, batches and optimizer, in turn.

    python benchmarks/train_vs_trl.py --shape hh --model small
    python benchmarks/train_vs_trl.py --shape pandalm --model smollm2 --votes VOTES --lora

Both sides train from the same weights on the same batches, TRL in its best setting on a CPU
(float32, no activation checkpointing, reference computed before, by default also its fastest batch
layout); the reference pass is counted for both. With `--precision bf16` prefloop multiplies in
bfloat16, with `--trl-precision bf16` TRL does: losses then agree to bfloat16's digits only.
Sides alternate within one process; what is compared is CPU time, since the machine may be shared.
Peak memory is measured in a process a side.
Needs `trl` (`pip install 'prefloop[bench]'`).
"""

import copy
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
import tyro
from shapes import ModelName, Shape, Text, load_model, matmul_peak, texts, useful_flops
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.types import Tokenized

TOLERANCE = {"no": 1e-4, "bf16": 0.1}  # relative difference of a step's loss
LR = 1e-5
Precision = Literal["no", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Train the same preference data with TRL and with prefloop; print speed, memory, equality."""

    shape: Shape = "hh"
    """Lengths of the data: hh, uf, five (answers a prompt), five-long, or pandalm (real votes)."""
    model: ModelName = "small"
    """small: random Qwen2 of 8.5 M weights, vocabulary 32,000; smollm2: SmolLM2-135M-Instruct."""
    comparisons: int = 24
    """Prompts to train on."""
    batch: int = 4
    """Prompts an optimizer step."""
    epochs: int = 1
    """Passes over the data."""
    precision: Precision = "no"
    """prefloop's matrix products: no (float32), or bf16 (autocast; a frozen base in bfloat16)."""
    trl_precision: Precision = "no"
    """TRL's; float32 is its best setting where it is the faster one."""
    lora: bool = False
    """Train LoRA adapters (r = 16, all linear layers) instead of all weights."""
    rounds: int = 3
    """How often each side runs."""
    threads: int = 1
    """Threads of each side."""
    votes: Path | None = None
    """For --shape pandalm: JSON-lines with prompt, responses and rank."""
    token_budget: int = 4096
    """prefloop's tokens of one forward pass."""
    memory: bool = True
    """Also measure peak memory, in one more process a side."""
    only: Literal["trl", "prefloop"] | None = None
    """Run one side once and print its JSON: what the memory measurement calls."""
    out: Path | None = None
    """Write the result as JSON here."""


@dataclass
class Run:
    """What one side took: CPU seconds of the reference pass and of training, losses, memory."""

    reference: float = 0.0
    training: float = 0.0
    losses: list[float] = field(default_factory=list)
    wall: float = 0.0
    peak_gb: float = 0.0
    loaded_gb: float = 0.0

    @property
    def seconds(self) -> float:
        return self.reference + self.training


@dataclass(frozen=True)
class Material:
    """Everything both sides start from."""

    case: Case
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: list[Text]


def lora_config():
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def starting_model(material: Material, precision: Precision) -> PreTrainedModel:
    """A copy of the model; a base that an adapter freezes is in the type of the products.

    A process that runs one side once, for its memory, takes the model itself: nobody who trains
    keeps a second one.
    """
    model = material.model if material.case.only else copy.deepcopy(material.model)
    return model.to(torch.bfloat16) if material.case.lora and precision == "bf16" else model


def trl_trainer(material: Material, folder: str):
    """TRL's trainer in its best setting on a CPU, with a note of every loss and of the reference's
    time."""
    from datasets import Dataset, disable_caching
    from trl import DPOConfig, DPOTrainer

    class Noting(DPOTrainer):
        losses: list[float]
        reference_seconds: float

        def _precompute_ref_logps(self, *args, **kwargs):
            started = time.process_time()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.process_time() - started
            self.losses = []
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(float(loss.detach()))
            return loss

    disable_caching()  # or the second round would find the first one's reference
    case = material.case
    answers = len(material.data[0].responses)
    rows = [
        {"prompt": text.prompt, "chosen": text.responses[i], "rejected": text.responses[j]}
        for text in material.data
        for i, j in combinations(range(answers), 2)
    ]
    config = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.batch * (answers * (answers - 1) // 2),
        num_train_epochs=case.epochs,
        learning_rate=LR,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=case.trl_precision == "bf16",
        use_cpu=True,
        max_length=None,
        weight_decay=0.0,
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Noting(
        model=starting_model(material, case.trl_precision),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=material.tokenizer,
        peft_config=lora_config() if case.lora else None,
    )


def tokenized(trainer, answers: int) -> list[Tokenized]:
    """The very tokens TRL trains on, put together by prompt."""
    per_prompt = answers * (answers - 1) // 2
    rows = list(trainer.train_dataset)
    made = []
    for start in range(0, len(rows), per_prompt):
        group = rows[start : start + per_prompt]
        first = tuple(group[0]["chosen_ids"])  # pairs (0, 1), (0, 2), ...: best against each other
        others = [tuple(row["rejected_ids"]) for row in group[: answers - 1]]
        made.append(
            Tokenized(
                prompt=tuple(group[0]["prompt_ids"]),
                responses=(first, *others),
                rank=tuple(range(1, answers + 1)),
                id=str(len(made)),
            )
        )
    return made


def run_trl(trainer) -> Run:
    started, wall = time.process_time(), time.perf_counter()
    trainer.train()
    return Run(
        reference=trainer.reference_seconds,
        training=time.process_time() - started,
        losses=list(trainer.losses),
        wall=time.perf_counter() - wall,
    )


def prefloop_model(material: Material, adapter: dict[str, torch.Tensor]) -> nn.Module:
    """The model as TRL starts from it, the random half of its adapter included."""
    model = starting_model(material, material.case.precision)
    if not material.case.lora:
        return model
    from peft import get_peft_model, set_peft_model_state_dict

    adapted = get_peft_model(model, lora_config())
    set_peft_model_state_dict(adapted, adapter)
    return adapted


def run_prefloop(material: Material, rows: list[Tokenized], model: nn.Module) -> Run:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prefloop.logps import Scorer, cached_reference, model_identity
    from prefloop.objectives import DPO
    from prefloop.trainer import TrainSettings, build_trainer

    case = material.case
    steps = -(-len(rows) // case.batch)
    with tempfile.TemporaryDirectory() as folder:
        AcceleratorState._reset_state(reset_partial_state=True)  # TRL's may be of another precision
        accelerator = Accelerator(cpu=True, mixed_precision=case.precision)
        started, wall = time.process_time(), time.perf_counter()
        with accelerator.autocast():
            reference = cached_reference(
                Scorer(model, token_budget=case.token_budget),
                rows,
                Path(folder),
                model_identity(model),
                case.token_budget,
            )
        scored = time.process_time()
        settings = TrainSettings(
            lr=LR, batch_size=case.batch, token_budget=case.token_budget, max_grad_norm=1.0
        )
        scorer = Scorer(model, token_budget=None)
        trainer = build_trainer(scorer, DPO(beta=0.1), reference, settings, accelerator)
        losses = []
        for number in range(steps * case.epochs):
            start = number % steps * case.batch
            metrics = trainer.step(rows[start : start + case.batch], number, LR)
            losses.append(float(metrics["loss"]))
        return Run(
            reference=scored - started,
            training=time.process_time() - scored,
            losses=losses,
            wall=time.perf_counter() - wall,
        )


def one_side(material: Material, side: str) -> Run:
    """One run of one side, for its memory."""
    loaded = peak_gb()
    with tempfile.TemporaryDirectory() as folder:
        if side == "trl":
            run = run_trl(trl_trainer(material, folder))
        else:
            rows = plain_rows(material)
            model = prefloop_model(material, {}) if not material.case.lora else fresh_lora(material)
            loaded = peak_gb()
            run = run_prefloop(material, rows, model)
    run.loaded_gb, run.peak_gb = loaded, peak_gb()
    return run


def peak_gb() -> float:
    """Peak memory of this process so far, GiB. Not getrusage: a child begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def fresh_lora(material: Material) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(starting_model(material, material.case.precision), lora_config())


def plain_rows(material: Material) -> list[Tokenized]:
    """Rows without TRL: prompt and response tokenized apart, EOS added."""
    end = material.tokenizer.eos_token_id

    def ids(text: str) -> tuple[int, ...]:
        return tuple(material.tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        Tokenized(
            prompt=ids(text.prompt),
            responses=tuple((*ids(response), end) for response in text.responses),
            rank=tuple(range(1, len(text.responses) + 1)),
            id=str(index),
        )
        for index, text in enumerate(material.data)
    ]


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {name: value.detach().clone() for name, value in state.items()}


def compare(material: Material) -> tuple[list[Run], list[Run], list[Tokenized]]:
    """Both sides in turn, `rounds` times."""
    from accelerate.state import AcceleratorState

    case = material.case
    trl_runs, prefloop_runs, rows = [], [], []
    for number in range(case.rounds):
        AcceleratorState._reset_state(reset_partial_state=True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(material, folder)
            rows = tokenized(trainer, len(material.data[0].responses))
            adapter = adapter_weights(trainer.model) if case.lora else {}
            trl_runs.append(run_trl(trainer))
        del trainer
        gc.collect()
        prefloop_runs.append(run_prefloop(material, rows, prefloop_model(material, adapter)))
        gc.collect()
        print(
            f"round {number + 1}: TRL {trl_runs[-1].seconds:.1f} CPU s, "
            f"prefloop {prefloop_runs[-1].seconds:.1f} CPU s, "
            f"{trl_runs[-1].seconds / prefloop_runs[-1].seconds:.2f} times as fast",
            flush=True,
        )
    return trl_runs, prefloop_runs, rows


def largest_gap(one: Run, other: Run) -> float:
    assert len(one.losses) == len(other.losses), (len(one.losses), len(other.losses))
    gaps = (abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True))
    return max(gaps)


TOLD = (
    "shape",
    "model",
    "comparisons",
    "batch",
    "epochs",
    "threads",
    "token_budget",
    "precision",
    "trl_precision",
)


def memory_of(case: Case, side: str) -> Run:
    """Peak memory of one side, in a process of its own."""
    command = [sys.executable, __file__, "--only", side, "--rounds", "1", "--no-memory"]
    for name in TOLD:
        command += [f"--{name.replace('_', '-')}", str(getattr(case, name))]
    command += ["--lora"] if case.lora else []
    command += ["--votes", str(case.votes)] if case.votes else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def main(case: Case) -> None:
    torch.set_num_threads(case.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    model, tokenizer = load_model(case.model)
    data = texts(case.shape, case.comparisons, case.votes)
    material = Material(case, model, tokenizer, data)
    if case.only:
        print(json.dumps(asdict(one_side(material, case.only))))
        return
    peak = matmul_peak()
    trl_runs, prefloop_runs, rows = compare(material)
    report(material, rows, trl_runs, prefloop_runs, max(peak, matmul_peak()))


def report(
    material: Material,
    rows: list[Tokenized],
    trl_runs: list[Run],
    prefloop_runs: list[Run],
    peak: float,
) -> None:
    case = material.case
    answers = len(rows[0].responses)
    pairs = len(rows) * answers * (answers - 1) // 2 * case.epochs
    forward = sum(
        useful_flops(material.model, len(row.prompt), [len(r) for r in row.responses])
        for row in rows
    )
    ratios = [a.seconds / b.seconds for a, b in zip(trl_runs, prefloop_runs, strict=True)]
    gap = max(largest_gap(a, b) for a, b in zip(trl_runs, prefloop_runs, strict=True))
    result = {
        "case": {name: str(value) for name, value in asdict(case).items()},
        "tokens": {
            "prompt": sum(len(row.prompt) for row in rows),
            "response": sum(len(r) for row in rows for r in row.responses),
        },
        "largest_relative_gap_of_a_loss": gap,
        "losses": prefloop_runs[0].losses,
        "ratio": {"median": statistics.median(ratios), "all": ratios},
        "matmul_peak_gflops": peak / 1e9,
    }
    print(f"largest relative difference of a step's loss: {gap:.1e}")
    for name, runs in (("TRL", trl_runs), ("prefloop", prefloop_runs)):
        seconds = statistics.median(run.seconds for run in runs)
        # training everything: forward and backward, thrice a forward; an adapter leaves out the
        # weights' own gradients, a third of that
        work = forward * (1 + case.epochs * (2 if case.lora else 3))
        result[name] = {
            "cpu_seconds": [run.seconds for run in runs],
            "reference_cpu_seconds": [run.reference for run in runs],
            "pairs_per_cpu_second": pairs / seconds,
            "useful_share_of_peak": work / seconds / peak,
        }
        print(
            f"{name:>8}: {seconds:8.2f} CPU s ({min(r.seconds for r in runs):.2f} to "
            f"{max(r.seconds for r in runs):.2f}), {pairs / seconds:7.2f} pairs a second, useful "
            f"work at {work / seconds / peak:.0%} of {peak / 1e9:.0f} GFLOP/s"
        )
    print(
        f"prefloop is {statistics.median(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if case.memory:
        add_memory(case, result)
    if case.out:
        case.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    allowed = max(TOLERANCE[case.precision], TOLERANCE[case.trl_precision])
    if gap > allowed:
        raise SystemExit(f"the losses differ by {gap:.1e}, more than {allowed:.0e}: not equal")


def add_memory(case: Case, result: dict) -> None:
    trl, ours = memory_of(case, "trl"), memory_of(case, "prefloop")
    result["memory_gb"] = {
        "TRL": {"peak": trl.peak_gb, "before": trl.loaded_gb},
        "prefloop": {"peak": ours.peak_gb, "before": ours.loaded_gb},
    }
    print(
        f"peak memory: TRL {trl.peak_gb:.2f} GiB, prefloop {ours.peak_gb:.2f} GiB "
        f"({ours.peak_gb / trl.peak_gb:.0%}); above the loaded model: "
        f"{trl.peak_gb - trl.loaded_gb:.2f} and {ours.peak_gb - ours.loaded_gb:.2f} GiB"
    )


if __name__ == "__main__":
    main(tyro.cli(Case))
