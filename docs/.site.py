"""What the pages need to be a site: links that leave `docs/`, and the page of the benchmarks."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Adds benchmarks/README.md to its page, and points links out of `docs/` to the repository."""
    if page.file.src_uri == "benchmarks.md":
        # One level down: the page has a title of its own.
        figures = (ROOT / "benchmarks" / "README.md").read_text()
        markdown += re.sub(r"^#", "##", figures, flags=re.MULTILINE).replace("](../docs/", "](")
    markdown = markdown.replace("](../benchmarks/README.md", "](benchmarks.md")
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
