"""What mixing two models' logits costs: `Tilted` against `FromPolicy`, and `generate` beside them.

The policy is the demo's model with a LoRA adapter of rank 16 on every linear layer; the reference
is its base. `Tilted` runs both as one batch. CPU seconds, the fewest of a few runs, no early end of
an answer, so that every way makes the same number of tokens.

    python benchmarks/mixing.py --rows 4 8 16 --tokens 48
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from prefloop.data import encoder
from prefloop.policies import Lora, Policy, Sampling, load_policy
from prefloop.policies.sampling import FromPolicy, sample
from prefloop.samplers import Tilted
from prefloop.smollm2 import demo_model
from prefloop.types import Comparison

PROMPTS = (
    "Tell me a short story about a dog.",
    "What do you think of rainy days?",
    "Name a good book and say why.",
    "How was your weekend at the sea?",
    "Describe a quiet morning.",
    "Is it better to read or to travel?",
    "What makes a good friend?",
    "Tell me about your favourite meal.",
)
ANSWERS = 4


def policy_with_adapter() -> Policy:
    """The demo's model with a random adapter, and no token that ends an answer."""
    policy = load_policy(demo_model(), adapter=Lora(), device="cpu", dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=rng)
    return policy


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of `repeats` runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def generate(policy: Policy, prompts: list[tuple[int, ...]], tokens: int) -> None:
    """The same job by `transformers`: each prompt encoded once for each answer."""
    longest = max(map(len, prompts))
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=ANSWERS,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )


def main() -> None:
    """Print a table of CPU seconds and their ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32])
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    policy = policy_with_adapter()
    coder = encoder(policy.tokenizer)
    rows = [Comparison(prompt=prompt, responses=("",)) for prompt in PROMPTS]
    encoded = coder.prompts(rows)
    # Endless answers: the stop token can never be the likeliest or be drawn.
    head = policy.base.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]), requires_grad=False)
    head.bias.data[sorted(policy.stop_tokens)] = -1e9
    print(f"{'rows':>5} {'generate':>10} {'policy':>10} {'tilted':>10} {'tilted/policy':>14}")
    for count in chosen.rows:
        prompts = encoded[: count // ANSWERS]
        settings = Sampling(max_new_tokens=chosen.tokens, rows=count)

        draw = partial(sample, policy, prompts, ANSWERS, settings, 0)
        plain = seconds(partial(draw, FromPolicy()), chosen.repeats)
        tilted = seconds(partial(draw, Tilted()), chosen.repeats)
        usual = seconds(partial(generate, policy, prompts, chosen.tokens), chosen.repeats)
        print(f"{count:5} {usual:10.2f} {plain:10.2f} {tilted:10.2f} {tilted / plain:14.2f}")


if __name__ == "__main__":
    main()
