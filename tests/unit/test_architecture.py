"""docs/architecture.md names every module and no other, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for top in ("colbert_core", "cluster", "jobs", "serving")
    for path in (ROOT / top).rglob("__init__.py")
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_s_table_names_its_modules(package: str) -> None:
    found = re.search(rf"^### `{package}`\n(.*?)(?=^##)", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert found, f"docs/architecture.md has no section on {package}"
    named = re.findall(r"^\| `(\w+\.py)` \|", found[1], flags=re.MULTILINE)
    there = sorted(path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")
    assert sorted(named) == there


def test_every_invariant_names_tests_that_exist() -> None:
    table = TEXT[TEXT.index("## The invariants\n") : TEXT.index("## Limits\n")]
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert files, row
        assert [file for file in files if not (ROOT / file).is_file()] == []


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (ROOT / "docs" / target).is_file(), target
