"""What the benchmarks run on: models, preference data of given lengths, and the work it takes."""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

Shape = Literal["hh", "uf", "five", "five-long", "pandalm"]
ModelName = Literal["small", "smollm2"]
VOCABULARY = 32_000

# Mean tokens of prompt and response, and responses a prompt; log-normal lengths, spread 0.5.
# hh and uf are like HH-RLHF (long dialogues, short answers) and UltraFeedback (long answers).
LENGTHS: dict[str, tuple[int, int, int]] = {
    "hh": (142, 45, 2),
    "uf": (108, 218, 2),
    "five": (142, 45, 5),
    "five-long": (108, 218, 5),
}


@dataclass(frozen=True)
class Text:
    """A prompt and its responses, best first."""

    prompt: str
    responses: tuple[str, ...]


def texts(shape: Shape, count: int, votes: Path | None, seed: int = 0) -> list[Text]:
    """`count` comparisons: random words w0, w1, ... of the shape's lengths, or human votes."""
    if shape == "pandalm":
        return _votes(votes, count)
    rng = random.Random(seed)
    prompt, response, answers = LENGTHS[shape]

    def words(mean: int) -> str:
        length = max(4, round(mean * math.exp(rng.gauss(-0.125, 0.5))))
        return " ".join(f"w{rng.randrange(VOCABULARY - 4)}" for _ in range(length))

    return [
        Text(words(prompt), tuple(" " + words(response) for _ in range(answers)))
        for _ in range(count)
    ]


def _votes(path: Path | None, count: int) -> list[Text]:
    if path is None:
        raise SystemExit("--shape pandalm needs --votes, a file with prompt, responses and rank")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for row in rows:
        if len(row["responses"]) == 2 and sorted(row["rank"]) == [1, 2] and all(row["responses"]):
            first = row["rank"].index(1)
            best, other = row["responses"][first], row["responses"][1 - first]
            made.append(Text(row["prompt"] + "\n\n", (best, other)))
    return made[:count]


def small_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Qwen2 of 8.5 million weights, 6.1 of them its tied (32000, 192) output layer."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    words = ["<pad>", "<eos>", "<unk>", "<bos>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    return model, tokenizer


def load_model(name: ModelName) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32, and its tokenizer."""
    if name == "small":
        return small_model()
    from prefloop.smollm2 import demo_model

    folder = demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def useful_flops(model: PreTrainedModel, prompt: int, responses: list[int]) -> float:
    """Floating-point operations that a forward pass over one comparison cannot do without.

    The prompt once, every response once; attention over the tokens that are seen and no others;
    the output layer on response tokens only. A backward pass takes twice as many.
    """
    config = model.config
    head = model.get_output_embeddings().weight
    inputs = model.get_input_embeddings().weight
    tables = head.numel() + (0 if head is inputs else inputs.numel())
    inner = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) - tables
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    seen = prompt * (prompt + 1) / 2
    seen += sum(length * prompt + length * (length + 1) / 2 for length in responses)
    attention = 4 * width * config.num_hidden_layers * seen
    return 2 * inner * (prompt + sum(responses)) + attention + 2 * head.numel() * sum(responses)


def matmul_peak(seconds: float = 2.0) -> float:
    """The most floating-point operations a CPU second that a large float32 product reaches."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    out, best, until = torch.empty(2048, 2048), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.process_time()
        torch.mm(a, b, out=out)
        best = max(best, 2 * 2048**3 / (time.process_time() - started))
    return best
