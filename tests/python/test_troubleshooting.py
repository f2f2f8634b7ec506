"""docs/troubleshooting.md names messages; those that are ours must be in the sources as quoted."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources() -> str:
    """Texts of the plugin and the library, strings that go over several lines joined."""
    files = [*ROOT.glob("vllm_plugin/kakeya_vllm/**/*.py"), *ROOT.glob("crates/*/src/**/*.rs")]
    text = "\n".join(file.read_text("utf-8") for file in files)
    text = re.sub(r'"\s*\n\s*f?r?"', "", text)  # Python's adjacent literals
    return re.sub(r"\\\n\s*", "", text)  # Rust's continued lines


def fragments(quoted: str) -> list[str]:
    """The parts of a quoted message between what changes: dots, numbers, N, M and names."""
    parts = re.split(r"\.\.\.|\b[0-9][0-9.x]*\b|\b[NM]\b|kakeya-[a-z0-9.x-]+|KAKEYA_LIB\w+", quoted)
    return [part.strip(" ':(),=;") for part in parts if len(part.strip(" ':(),=;")) >= 10]


def test_quoted_messages_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    text = sources()
    checked, missing = 0, []
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            for part in fragments(quoted):
                checked += 1
                if part not in text:
                    missing.append(part)
    assert not missing
    assert checked > 25
