"""What the machine refused, said like a user's mistake: a full disk, a folder that is read-only.

To add one: a row in `ADVICE`.
"""

import errno
import re

FULL = "Free some room, or write elsewhere: --out for the run, PREFLOOP_CACHE for the cache."
NOT_ALLOWED = (
    "Take a place that this user may read and write: --out for the run, PREFLOOP_CACHE for the "
    "cache."
)
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: NOT_ALLOWED,
    errno.EPERM: NOT_ALLOWED,
    errno.EROFS: NOT_ALLOWED,
    errno.EISDIR: "A file is wanted here.",
    errno.ENOTDIR: "What stands before the last / must be a folder.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EMFILE: "Close other programs, or raise the limit: ulimit -n 4096.",
}
"""Number of the system's error -> what to do about it."""


def refusal(error: Exception) -> str | None:
    """The error in one line, or None where it is no refusal by the machine but a bug."""
    number, place = _number(error), getattr(error, "filename", None)
    if number not in ADVICE:
        return None
    what = getattr(error, "strerror", None) or str(error)
    return f"{place}: {what}. {ADVICE[number]}" if place else f"{what}. {ADVICE[number]}"


def _number(error: Exception) -> int | None:
    """The system's number; safetensors, written in Rust, has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
