"""Documents that must not fall behind."""

import re
from pathlib import Path

from app.config import Settings

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(
    re.findall(r"^\| `KINDRED_(\w+)` \| (.+?) \| .+ \|$", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
)


def in_words(default: object) -> str:
    """A default as the page writes it."""
    if default is None:
        return "unset"
    if isinstance(default, int | float):
        for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
            if default >= size and default % size == 0:
                return f"{default // size} {unit}"
        return f"{default:.15g}"
    return f"`{default}`"


def test_every_setting_is_documented_and_every_documented_setting_exists():
    assert sorted(SETTINGS) == sorted(name.upper() for name in Settings.model_fields)


def test_every_documented_default_is_the_default():
    assert {name.upper(): in_words(setting.default) for name, setting in Settings.model_fields.items()} == SETTINGS


PAGES = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in addresses, as GitHub makes it."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere():
    found = [(page, target) for page in PAGES for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())]
    assert len(found) > 50
    for page, target in found:
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_decisions_are_numbered_without_gaps():
    numbers = [page.name[:4] for page in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == [f"{number:04d}" for number in range(1, len(numbers) + 1)]


def test_the_readme_opens_with_the_two_commands():
    first = (ROOT / "README.md").read_text().split("```")[1]
    assert first.index("make demo") < first.index("make test")
