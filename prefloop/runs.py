"""Files of a run: folders that are never overwritten, JSON that is never half written.

Everything a command leaves behind is plain JSON, JSON-lines or safetensors, so that every report
can be made again from disk and every command can be killed and run again.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs

from prefloop.errors import UserError

PACKAGES = ("prefloop", "torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scipy")


def create_run(out: Path) -> Path:
    """A new, empty run folder; a folder that holds anything is refused."""
    out = Path(out)
    refuse_taken(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def refuse_taken(out: Path) -> None:
    """A folder that holds anything, or a file, is no place for a new run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} exists already and is never overwritten. Choose another --out, or pass "
            "--resume to go on with that run."
        )


def start_run(
    out: Path,
    command: str,
    settings: Mapping[str, Any],
    resume: bool,
    may_change: Collection[str] = (),
) -> Path:
    """The folder of a run with its `config.json`: a new one, or with `resume` the one it was.

    What a killed process was writing goes away, so that the run ends with the files of one that
    nobody killed. One process calls this, before any other writes.

    Args:
        out: the folder.
        command: of prefloop.
        settings: of the command.
        resume: whether to go on with a run.
        may_change: settings that a run may be gone on with others of; `config.json` then has the
            new ones.

    Raises:
        UserError: the folder exists and `resume` is off; or the run to go on with had other
            settings, each of which is named.
    """
    config = Path(out) / "config.json"
    if not (resume and config.exists()):
        if resume:
            _sweep(Path(out), f".{config.name}.*.part")
        create_run(out)
        write_json(
            config,
            {"command": command, "settings": dict(settings), "provenance": provenance()},
        )
        return Path(out)
    stored = read_json(config)
    before = stored.get("settings", {})
    now = json.loads(json.dumps(dict(settings)))
    differ = [name for name, value in now.items() if before.get(name) != value]
    changed = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}"
        for name in differ
        if name not in {"out", "resume", *may_change}
    ]
    if stored.get("command") != command or changed:
        raise UserError(
            f"{config}: a run is gone on with by the settings it was started with; "
            f"{'; '.join(changed) or 'this is a run of prefloop ' + str(stored.get('command'))}. "
            f"Use `prefloop {command} --config {config} --out {out} --resume`, or a new --out."
        )
    if set(differ) & set(may_change):
        write_json(config, {**stored, "settings": now})
    _sweep(Path(out), ".*.part")
    return Path(out)


def _sweep(run: Path, temporary: str) -> None:
    """Remove files and folders of a run that stand under a temporary name."""
    for left in sorted(run.rglob(temporary)):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)  # it may have stood in a folder that is gone


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary name first, then a rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON document; a user error names the file and the line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}), so not JSON") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def is_whole(document: Path) -> bool:
    """Whether a stage is done: its JSON document is there, and the `file` beside it that it names.

    The document is written last.
    """
    return document.exists() and (document.parent / read_json(document)["file"]).exists()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line, whole or not at all; returns how many."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line in one write, so that a killed run leaves at most one torn last line."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file that prefloop itself wrote; a torn last line is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def cache_folder() -> Path:
    """Where prefloop keeps what it can make again: `PREFLOOP_CACHE`, or the user's cache folder.

    The variable moves the files and changes no result.
    """
    chosen = os.environ.get("PREFLOOP_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("prefloop")


def provenance() -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_id(),
    }


def _git_id() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
