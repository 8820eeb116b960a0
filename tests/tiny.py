"""Tiny random models of many architectures, a tiny tokenizer, random rows: material for every test.

Everything is seeded, offline and small (two layers, 32 wide, 99 tokens). A model is
`tiny.llama()`, `tiny.gemma3(seed=1)`, ... or `tiny.MODELS["llama"]()`; all are in eval mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefloop.types import Tokenized

VOCABULARY = 99  # odd on purpose: no chunk size divides it
CONTEXT = 512
PAD, BOS, EOS = 0, 1, 2

WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
HEAD: dict[str, Any] = {"head_dim": 8}
WINDOW = 8

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDTH),
    "qwen2": ("qwen2", WIDTH),
    "qwen3": ("qwen3", WIDTH | HEAD),
    "mistral": ("mistral", WIDTH | HEAD | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", WIDTH | HEAD | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        WIDTH
        | HEAD
        | {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", WIDTH | {"sliding_window": WINDOW, "pad_token_id": PAD}),
    "olmo2": ("olmo2", WIDTH),
    "smollm3": ("smollm3", WIDTH | {"no_rope_layers": [1, 0], "pad_token_id": PAD}),
    "granite": ("granite", WIDTH | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", WIDTH | {"logit_scale": 0.25, "pad_token_id": PAD}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    ),
    "opt": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in WIDTH.items() if k != "num_key_value_heads"}),
    "phi": ("phi", WIDTH),
    "mixtral": ("mixtral", WIDTH | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        WIDTH
        | HEAD
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "mamba": (
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal model of the architecture `name`, float32, eval mode, weights not tiny.

    `changes` go into the configuration. Weights are drawn so wide that the next-token
    distributions are far from uniform and a wrong mask or position shows.
    """
    kind, settings = CONFIGS[name]
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(kind, **(settings | special | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config)
        _widen(made)
    return made.eval()


def _widen(made: torch.nn.Module) -> None:
    for parameter in made.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.25)
    for module in made.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.25)


def _maker(name: str) -> Callable[..., PreTrainedModel]:
    def make(*, seed: int = 0, **changes: Any) -> PreTrainedModel:
        return model(name, seed=seed, **changes)

    make.__name__ = name
    return make


MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: _maker(name) for name in CONFIGS}

llama = MODELS["llama"]
qwen2 = MODELS["qwen2"]
qwen3 = MODELS["qwen3"]
mistral = MODELS["mistral"]
gemma2 = MODELS["gemma2"]
gemma3 = MODELS["gemma3"]
phi3 = MODELS["phi3"]
olmo2 = MODELS["olmo2"]
smollm3 = MODELS["smollm3"]
granite = MODELS["granite"]
cohere = MODELS["cohere"]
gpt2 = MODELS["gpt2"]
opt = MODELS["opt"]
gpt_neox = MODELS["gpt_neox"]
mixtral = MODELS["mixtral"]
qwen3_moe = MODELS["qwen3_moe"]
mamba = MODELS["mamba"]
bloom = MODELS["bloom"]


def lora(base: PreTrainedModel, *, seed: int = 0, targets: Sequence[str] | str = "all-linear"):
    """`base` with a LoRA adapter whose matrices are random and not zero, eval mode."""
    from peft import LoraConfig, get_peft_model

    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=names, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=rng)
    return adapted.eval()


def reward_model(*, seed: int = 0) -> PreTrainedModel:
    """A random Llama with one number as output, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama", num_labels=1, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, **WIDTH
        )
        made = AutoModelForSequenceClassification.from_config(config)
    return made.eval()


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly `VOCABULARY` tokens, with or without a chat template.

    Knows `<pad> <bos> <eos> <unk>`, the chat marks, and the words w0, w1, ...; punctuation apart.
    `add_special_tokens=True` puts `<bos>` first, as Llama's tokenizer does.
    """
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    marks = ["<user>", "<assistant>", "<system>", "<end>"]
    words = [*special, *marks, *(f"w{i}" for i in range(VOCABULARY - len(special) - len(marks)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=marks,
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def row(prompt: int, responses: Sequence[int], *, seed: int = 0, **judgement: Any) -> Tokenized:
    """A `Tokenized` of a prompt of `prompt` random tokens and responses of the given lengths."""
    rng = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=rng).tolist())

    return Tokenized(
        prompt=draw(prompt),
        responses=tuple((*draw(length - 1), EOS) for length in responses),
        id=f"row-{seed}",
        **judgement,
    )


def batch(
    size: int = 4, *, responses: Sequence[int] = (1, 2, 3, 5), seed: int = 0, longest: int = 20
) -> list[Tokenized]:
    """`size` random rows, ragged in every direction, ranked 1, 2, 3, ... in the order given.

    Row b has `responses[b % len(responses)]` responses; `batch(8, responses=(2,))` is plain pairs.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int) -> int:
        return int(torch.randint(low, longest + 1, (), generator=rng))

    rows = []
    for index in range(size):
        count = responses[index % len(responses)]
        lengths = [draw(1) for _ in range(count)]
        rows.append(
            row(draw(2), lengths, seed=1000 * seed + index, rank=tuple(range(1, count + 1)))
        )
    return rows
