"""Models and tokenizers from a folder or the hub; what is not safe or not a model is refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import model_info, try_to_load_from_cache
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefloop.errors import UserError
from prefloop.policies.policy import DEFAULT_ADAPTER, Policy
from prefloop.policies.settings import Lora

HUB_PATIENCE = 10.0  # seconds
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_policy(
    name: str | Path,
    *,
    adapter: Lora | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Policy:
    """Load a causal model of `transformers` and put an adapter on it, if one is asked for.

    Args:
        name: a folder, or a name on the hub. A folder that holds an adapter (`Policy.save` of a
            policy with one) brings its base along and is trained on.
        adapter: a new adapter; or the folder of a saved one, to go on with; or None: train whole.
        dtype: of the weights. None: bfloat16 for the frozen base of an adapter on a GPU that has
            it, else float32, since weights trained in bfloat16 lose small updates.
        device: None takes the one that Accelerate would.
        seed: of a new adapter's weights.

    Raises:
        UserError: not a model, no safetensors weights (pickled weights run code when they are
            read, and are refused), weights missing from the file, or a hub that cannot be reached.
    """
    base, saved = _base_of(name)
    if saved is not None and adapter is not None:
        raise UserError(
            f"{name} is an adapter already; train it on without asking for another, or load its "
            f"base, {base}"
        )
    saved = adapter if isinstance(adapter, Path) else saved
    device = PartialState().device if device is None else torch.device(device)
    assert device is not None
    dtype = dtype or _dtype_for(device, adapted=saved is not None or adapter is not None)
    model = load_weights(AutoModelForCausalLM, base, dtype).to(device)  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(base if saved is None else _tokenizer_home(saved, base))
    _refuse_foreign_tokenizer(model, tokenizer, base)
    policy = Policy(model.eval(), tokenizer, _absolute(base))
    if saved is not None:
        return _with_saved_adapter(policy, saved)
    if isinstance(adapter, Lora):
        return policy.add_adapter(DEFAULT_ADAPTER, adapter, seed)
    return policy


def load_weights(
    auto: Any, name: str | Path, dtype: torch.dtype, **settings: Any
) -> PreTrainedModel:
    """A model of `transformers` from safetensors, every one of its weights read from the file.

    Args:
        auto: the class that loads it, `AutoModelForCausalLM` or one of its kin.
        name: a folder, or a name on the hub.
        dtype: of the weights.
        settings: of the model's configuration.
    """
    _refuse_no_weights(name)
    _refuse_unknown(name)
    with explained(name, "model"):
        model, report = auto.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,  # left out, transformers reads pickled weights too
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{name}: {len(missing)} weights of a {type(model).__name__} are not in its files "
            f"({', '.join(missing[:3])}); they would be random. Is it a model of another kind?"
        )
    return model


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; the one place that gives a pad token to those without."""
    _refuse_unknown(name)
    with explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{name}: its tokenizer has no pad, end or unknown token; one is needed to put rows of "
            "different length side by side. Set tokenizer.pad_token and save it again"
        )
    return tokenizer


@contextmanager
def explained(name: str | Path, kind: str) -> Iterator[None]:
    """Turn what loading raises for a name, a folder or a file that is wrong into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        found = "folder" if Path(name).is_dir() else "name on the hub"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = lines if lines and lines[0].endswith(":") else lines[:1]  # a list follows
        reason = " ".join(told) or type(error).__name__
        raise UserError(f"{name}: this {found} gives no {kind}: {reason[:300]}") from error


def _base_of(name: str | Path) -> tuple[str | Path, Path | None]:
    """The model that `name` stands for, and the folder of its adapter where `name` is one."""
    folder = Path(name)
    if not folder.exists():
        _refuse_missing_path(name)
        return name, None
    if not folder.is_dir():
        raise UserError(f"{name}: a file; give the folder that holds the model")
    if (folder / "adapter_config.json").is_file():
        base = _adapter_config(folder).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UserError(f"{folder}/adapter_config.json: base_model_name_or_path is not set")
        return base, folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: not a model folder: it has no config.json")
    return folder, None


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(read, dict):
        raise UserError(f"{file}: not a JSON object")
    return read


def _with_saved_adapter(policy: Policy, folder: Path) -> Policy:
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: not an adapter folder: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        # The check is ours: peft reads adapter_model.bin even when told to use safetensors.
        raise UserError(
            f"{folder}: no adapter_model.safetensors{_pickles(folder)}. Save the adapter again as "
            "safetensors"
        )
    with explained(folder, "adapter"):
        model = PeftModel.from_pretrained(
            policy.base, str(folder), adapter_name=DEFAULT_ADAPTER, is_trainable=True
        )
    return Policy(model.eval(), policy.tokenizer, policy.name)


def _refuse_no_weights(name: str | Path) -> None:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: no weights in safetensors format{_pickles(folder)}. Convert them with "
            "`save_pretrained` on a machine that trusts them"
        )


def _refuse_missing_path(name: str | Path) -> None:
    """A name that can only be a path, of nothing."""
    told = str(name)
    if isinstance(name, Path) or told.startswith((".", "/", "~")) or told.count("/") > 1:
        raise UserError(f"{name}: there is no such folder; give a model's folder or hub name")


def _refuse_unknown(name: str | Path) -> None:
    """Ask the hub once about a name that is not here: loading would ask for a minute first."""
    if Path(name).is_dir():
        return
    _refuse_missing_path(name)
    try:
        if not isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            model_info(str(name), timeout=HUB_PATIENCE)
    except Exception as error:  # of kinds that changed with the versions of the hub's client
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: neither a folder here nor a model that the hub gives: {reason}"
        ) from error


def _pickles(folder: Path) -> str:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if not pickled:
        return ""
    return f"; pickled weights ({pickled[0]}) can run code when they are read and are refused"


def _refuse_foreign_tokenizer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue]
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model {rows}; they do not "
            "belong together"
        )


def _tokenizer_home(saved: Path, base: str | Path) -> str | Path:
    return saved if (saved / "tokenizer_config.json").is_file() else base


def _absolute(name: str | Path) -> str:
    """A name that still holds when it is read from another working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _dtype_for(device: torch.device, adapted: bool) -> torch.dtype:
    if adapted and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32
