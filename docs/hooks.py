"""What MkDocs does besides: it puts the changelog, which lies beside docs/, on a page."""

from pathlib import Path
from typing import Any

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
MARK = "<!-- CHANGELOG.md -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put CHANGELOG.md in the place of its mark, its links as seen from docs/."""
    if MARK not in markdown:
        return markdown
    text = CHANGELOG.read_text(encoding="utf-8").partition("\n")[2]
    return markdown.replace(MARK, text.replace("](docs/", "]("))
