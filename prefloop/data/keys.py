"""What counts as the same prompt, how one reads, and short names of long texts."""

import json
from hashlib import blake2b
from typing import TypeAlias

from prefloop.data.tokens import Prompt

Digest: TypeAlias = bytes


def prompt_key(prompt: Prompt) -> str:
    """A text that is equal for equal prompts: of plain text itself, of messages their JSON."""
    if isinstance(prompt, str):
        return f"text:{prompt}"
    return "chat:" + json.dumps([dict(message) for message in prompt], sort_keys=True)


def as_text(prompt: Prompt) -> str:
    """A prompt to read: plain text as it is, of messages a paragraph each, behind its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def digest(*texts: str) -> Digest:
    """16 bytes that stand for `texts`: tables of them fit in memory where the texts do not."""
    whole = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little"))  # ("ab", "c") is not ("a", "bc")
        whole.update(data)
    return whole.digest()
