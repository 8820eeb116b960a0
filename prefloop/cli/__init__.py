"""`prefloop COMMAND`: find the command, parse, call.

The table below is all that `prefloop --help` needs, so it answers without importing torch. To add
a command: a file with its dataclass beside this one, and a row here.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

COMMANDS = {
    "check": "Read every row of preference data and say whether it can be trained on.",
    "sample": "Sample several answers to each prompt.",
    "score": "Score sampled answers with a reward.",
    "reward": "Train a reward model on comparisons, and say what it is worth.",
    "select": "Choose the prompts that are worth a label.",
    "train": "Train a policy on comparisons.",
    "judge": "Have a language model on a server rank answers.",
    "label": "Rank answers by hand, on a local page.",
    "online": "Rounds of sample, score, select and train.",
    "heads": "Which model of disagreement predicts held-out votes, in minutes.",
    "mixture": "Find types of annotators who disagree, and train a policy for each.",
    "aggregate": "One policy from the types of a mixture, fair to the worst-off.",
    "evaluate": "Compare a trained policy with its reference.",
    "diagnose": "Say what training did to the probabilities.",
    "report": "Write one self-contained HTML page from run folders.",
    "experiment": "Spend the same labels by several rules, and compare what comes out.",
    "reproduce": "Check a paper's claims exactly, in the tabular world.",
    "demo": "The whole loop on a real small model.",
}
"""Command -> what it does, in the order of the loop."""

HELP = """usage: prefloop COMMAND [OPTIONS]

prefloop closes the preference loop of language models.

commands:
{commands}

prefloop COMMAND --help    every option of a command, its unit and default
prefloop --version         the version
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the commands have their own
    if not words or words[0] in {"-h", "--help", "help"}:
        rows = "\n".join(f"  {name:<11}{what}" for name, what in COMMANDS.items())
        print(HELP.format(commands=rows))
        return 0
    if words[0] == "--version":
        from prefloop import __version__

        print(f"prefloop {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f" Perhaps you meant: {close[0]}." if close else ""
        return _mistake(f"there is no command {words[0]!r}.{meant} See prefloop --help.")
    return _run(words[0], words[1:])


def _run(name: str, words: list[str]) -> int:
    import tyro

    from prefloop.errors import UserError

    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, not of the user
    module = import_module(f"prefloop.cli.{name}")
    command = getattr(module, name.capitalize())
    try:
        words, default = _with_config(command, name, words)
        settings = tyro.cli(
            command,
            prog=f"prefloop {name}",
            args=words,
            default=default,
        )
        _refuse_several(name, settings, os.environ)
        _refuse_taken(settings)
        settings()
    except UserError as error:
        return _mistake(str(error))
    except KeyboardInterrupt as pressed:
        resumes = any(field.name == "resume" for field in fields(command))
        said = str(pressed) or "stopped by Ctrl-C"
        then = "Go on with --resume." if resumes else "Run it again."
        print(f"prefloop: {said}. {then}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `prefloop ... | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        from prefloop.cli.machine import refusal

        if (said := refusal(error)) is None:
            raise
        return _mistake(said)
    return 0


def _refuse_several(name: str, command: Any, environment: Mapping[str, str]) -> None:
    """Refuse to be one of several processes that would all do the same and write the same files."""
    from prefloop.errors import UserError

    count = environment.get("WORLD_SIZE", "1")
    if count != "1" and not getattr(command, "shares", False):
        raise UserError(
            f"prefloop {name}, as it is asked here, runs in one process, and this is one of "
            f"{count}; start it without torchrun or accelerate launch. docs/scaling.md lists the "
            "commands that share their work"
        )


def _refuse_taken(command: Any) -> None:
    """Say before minutes of loading that --out is taken; under torchrun, the first process does."""
    from prefloop.runs import refuse_taken

    out, first = getattr(command, "out", None), os.environ.get("RANK", "0") == "0"
    if isinstance(out, Path) and getattr(command, "resume", None) is False and first:
        refuse_taken(out)


def _with_config(command: Any, name: str, words: list[str]) -> tuple[list[str], Any]:
    """Take `--config FILE` out of `words`; the file's settings become the defaults."""
    from prefloop.errors import UserError

    if "--config" not in words:
        return words, None
    at = words.index("--config")
    if at + 1 == len(words):
        raise UserError("--config needs a file: the config.json of a run")
    return words[:at] + words[at + 2 :], replayed(command, name, Path(words[at + 1]))


def replayed(command: Any, name: str, path: Path) -> Any:
    """The command `name` as it was run: with the settings of the config.json at `path`."""
    from prefloop.errors import UserError
    from prefloop.runs import read_json

    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("command") != name:
        raise UserError(f"{path}: this is not the config.json of a `prefloop {name}` run")
    names = {field.name for field in _flat_fields(command)}
    if unknown := sorted(set(stored["settings"]) - names):
        raise UserError(
            f"{path}: prefloop {name} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(sorted(names))}"
        )
    return _made(command, stored["settings"], str(path))


def settings(command: Any) -> dict[str, Any]:
    """The settings of a command as flat JSON: what config.json keeps."""
    flat: dict[str, Any] = {}
    for field in fields(command):
        value = getattr(command, field.name)
        if is_dataclass(value):
            flat |= settings(value)
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat


def _flat_fields(made: Any) -> Iterator[Field[Any]]:
    for field in fields(made):
        if is_dataclass(field.default_factory):
            yield from _flat_fields(field.default_factory)
        else:
            yield field


def _made(made: Any, flat: dict[str, Any], place: str) -> Any:
    """The command that `settings` was made from."""
    from prefloop.errors import UserError

    values = {}
    for field in fields(made):
        if is_dataclass(field.default_factory):
            values[field.name] = _made(field.default_factory, flat, place)
        elif field.name in flat:
            value = flat[field.name]
            path = "Path" in str(field.type) and isinstance(value, str)
            values[field.name] = Path(value) if path else _plain(value)
    try:
        return made(**values)
    except TypeError as error:
        raise UserError(f"{place}: {error}") from None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _mistake(text: str) -> int:
    print(f"prefloop: {text}", file=sys.stderr)
    return 2
