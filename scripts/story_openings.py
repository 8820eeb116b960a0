"""The first words of TinyStories as prompts.

    python scripts/story_openings.py STORIES OUT [--words 10]

STORIES is a text file in which <|endoftext|> stands between stories; the first and the last piece
are left out, since a file cut by bytes has them in part. Openings that are equal count once.
"""

import argparse
from pathlib import Path

from prefloop.runs import write_jsonl


def openings(text: str, words: int) -> list[str]:
    """The first `words` words of each story between the first and the last, each once."""
    stories = [piece.split() for piece in text.split("<|endoftext|>")[1:-1]]
    return list(dict.fromkeys(" ".join(story[:words]) for story in stories if len(story) > words))


if __name__ == "__main__":
    asked = argparse.ArgumentParser()
    asked.add_argument("stories", type=Path)
    asked.add_argument("out", type=Path)
    asked.add_argument("--words", type=int, default=10)
    given = asked.parse_args()
    found = openings(given.stories.read_text(encoding="utf-8"), given.words)
    write_jsonl(given.out, [{"prompt": opening} for opening in found])
    print(f"{len(found)} openings of {given.words} words in {given.out}")
