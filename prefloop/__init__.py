"""prefloop: choose prompts, learn from people who disagree, train fast, see what training did.

Names are loaded when they are first used, so that `import prefloop` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Comparison": "types",
    "Logps": "types",
    "Pair": "types",
    "UserError": "types",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'prefloop' has no attribute {name!r}")
    return getattr(import_module(f"prefloop.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
