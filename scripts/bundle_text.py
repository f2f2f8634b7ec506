#!/usr/bin/env python3
"""Make the calibration text that the plugin ships: part of WikiText-2's validation split as prose.

    python scripts/bundle_text.py

Twenty articles with the fewest words cut to <unk>, the first 7,500 characters of each (whole
lines), detokenised as `kakeya calibrate` does it. The output depends on the input alone; a test
compares it with what is committed.
"""

import re
from pathlib import Path

from kakeya_vllm.text import BUNDLED_TEXT, detokenise, read_text

SOURCE = Path(__file__).resolve().parent.parent / "data" / "wikitext2-valid-tokenised.txt"
ARTICLES = 20
# A passage of calibration (2,048 tokens) is longer: it meets two articles.
CHARACTERS = 7500


def bundled_text(source: str) -> str:
    """The text from the whole split."""
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = $)", source)[1:]
    by_holes = sorted(articles, key=lambda article: article.count("<unk>") / len(article))
    chosen = set(by_holes[:ARTICLES])
    return "".join(_beginning(article) for article in articles if article in chosen)


def _beginning(article: str) -> str:
    lines, size = [], 0
    for line in detokenise(article).strip().split("\n"):
        size += len(line) + 1
        if size > CHARACTERS and lines:
            break
        lines.append(line)
    return "\n".join(lines).strip() + "\n\n"


if __name__ == "__main__":
    BUNDLED_TEXT.write_text(bundled_text(read_text(SOURCE)), encoding="utf-8")
    print(f"wrote {BUNDLED_TEXT}")
