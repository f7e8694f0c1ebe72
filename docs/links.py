"""mkdocs hook that fixes links and images of symlinked pages, and links to files of the repository.

A page such as `docs/eval/RESULTS.md` is a symbolic link to `eval/RESULTS.md`, whose own links are relative to its place
there. Links to other pages become links within the site. Links to other files of the repository lead to `repo_url` if
it is set, and become plain text otherwise. Broken links are left unchanged, so `mkdocs build --strict` fails on them.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any, **_: Any) -> str:
    """The page with links that work on the site."""
    source = Path(page.file.abs_src_path).resolve()
    pages = {Path(f.abs_src_path).resolve(): f.src_uri for f in files if f.abs_src_path and f.inclusion.is_included()}
    here = os.path.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups(default="")
        target = (source.parent / link).resolve()
        if target in pages:
            return f"{image}[{text}]({os.path.relpath(pages[target], here or '.')}{anchor})"
        if image or not target.exists() or not target.is_relative_to(ROOT):
            return match.group(0)
        if not config.repo_url:
            return text
        kind = "tree" if target.is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT)}{anchor})"

    blocks = FENCED.split(markdown)  # text and code alternate
    return "".join(block if i % 2 else LINK.sub(replace, block) for i, block in enumerate(blocks))
