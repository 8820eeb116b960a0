"""prefloop: choose prompts, learn from people who disagree, train fast, see what training did.

Names are loaded when they are first used, so that `import prefloop` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    name: home
    for home, names in {
        "data": "read tokenize",
        "errors": "UserError",
        "logps": "Scorer cached_reference",
        "objectives": "DPO IPO KTO ORPO PlackettLuce SFT SimPO",
        "policies": "Lora Policy Sampling load_policy",
        "report": "write_report",
        "selection": "PVar preference_variance",
        "settings": "TrainSettings",
        "stable": "Stable StableGradient",
        "trainer": "Trainer build_trainer fit",
        "types": "Comparison Judgement Logps Pair Tokenized",
    }.items()
    for name in names.split()
}

# One list, not two that must agree.
__all__ = sorted([*_HOME, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'prefloop' has no attribute {name!r}")
    return getattr(import_module(f"prefloop.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
