"""What MkDocs calls while it builds the site (`make docs`): adds pages, moves links, and links names of code."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from website import pages
from website.commands import commands_text
from website.equations import equation
from website.links import move_links

PLACES = pages.site_paths()
SOURCES = {place: path for path, place in PLACES.items() if not place.startswith("api/")}
"""The path in the repository of each page."""
NOT_LINKED = re.compile(r"(<(a|h[1-6]|pre|nav)\b.*?</\2>)", re.DOTALL)
NAME = re.compile(r"<code>(ddim(?:\.\w+)+)(?:\(\))?</code>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set what only Python can say, and add the pages of all modules to the navigation."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # the anchors that GitHub makes
    fence = {"name": "math", "class": "equation", "format": equation}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    for section in config.nav or []:
        for entry in next(iter(section.values())):
            if isinstance(entry, dict) and "Modules" in entry:
                entry["Modules"] = pages.module_navigation()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that are not in `docs/`."""
    generated = {"commands.md": commands_text(), "examples/index.md": pages.examples_text()}
    generated |= {pages.module_page(name): pages.module_text(name) for name in pages.modules()}
    for path, place in pages.repository_files().items():
        source = pages.ROOT / path
        if source.suffix == ".py":
            generated[place] = pages.example_text(source)
        else:
            files.append(File.generated(config, place, abs_src_path=str(source)))
    for place, text in generated.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Move the links of a page that stands in the repository."""
    source = SOURCES.get(page.file.src_uri)
    return markdown if source is None else move_links(markdown, source, PLACES, pages.titles())


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link names of the package, such as `ddim.tuning.tune`, to their documentation."""
    parts = NOT_LINKED.split(html)
    # Every third part is text between the elements; each of these is followed by its name.
    linked: list[Any] = [NAME.sub(_reference, part) if index % 3 == 0 else part for index, part in enumerate(parts)]
    return "".join(part for index, part in enumerate(linked) if index % 3 != 2)


def _reference(match: re.Match[str]) -> str:
    return f'<autoref identifier="{match[1]}" optional>{match[0]}</autoref>'
