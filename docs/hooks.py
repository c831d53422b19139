"""MkDocs hooks: writes the settings and the model zoo, shows CONTRIBUTING.md, hides what only tests read."""

import pathlib
import re
from typing import Any

from tlvit import config, model_zoo

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS_MARK = "<!-- settings -->"
MODELS_MARK = "<!-- model zoo -->"
CONTRIBUTING_MARK = "<!-- CONTRIBUTING.md -->"
TEST_SETUP = re.compile(r"<!-- setup:.*?-->\n?", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the marks of a page."""
    if SETTINGS_MARK in markdown:
        markdown = markdown.replace(SETTINGS_MARK, settings_tables())
    if MODELS_MARK in markdown:
        markdown = markdown.replace(MODELS_MARK, model_zoo.tables())
    if CONTRIBUTING_MARK in markdown:
        text = (ROOT / "CONTRIBUTING.md").read_text()
        markdown = markdown.replace(CONTRIBUTING_MARK, text.partition("\n")[2])
    return TEST_SETUP.sub("", markdown)


def settings_tables() -> str:
    """One table for each section of `tlvit.config.Config`, made from the fields themselves."""
    sections: dict[str, list[str]] = {}
    for name, default, limits, meaning in config.settings():
        path = name.removeprefix("config.")
        section, _, _ = path.rpartition(".")
        value = "empty" if default in ("", (), {}) else f"`{default}`"
        cells = (f"`{path}`", value, limits.replace("|", "\\|"), meaning.replace("|", "\\|"))
        sections.setdefault(section, []).append("| " + " | ".join(cells) + " |")
    head = "| setting | default | range | meaning |\n|---|---|---|---|\n"
    return "\n\n".join(
        f"## {section or 'Run'}\n\n{head}" + "\n".join(rows) for section, rows in sections.items()
    )
