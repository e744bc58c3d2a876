"""The documents agree with the code: error lines, links, anchors and paths."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))
TROUBLESHOOTING = ROOT / "docs/reference/troubleshooting.md"
PACKAGES = ("armd_scale", "data_pipeline", "launchers")
FOREIGN = {
    "ModuleNotFoundError: No module named 'armd_scale'",  # Python
    "Watchdog caught collective operation timeout",  # PyTorch
}
"""Messages of the troubleshooting page that are not texts of this project."""
SHORTEST = 8  # characters of a constant part of a message that is compared
PATH = re.compile(r"(armd_scale|data_pipeline|launchers|tools|tests|configs|docs)/[\w./*-]*")
FUTURE = {"docs/results/gpu/"}  # made by `armd bench gpu`
PLACEHOLDER = re.compile(r"(^|[^A-Z])(NAME|DATE)([^A-Z]|$)")


def prose(page):
    """The text of a page without fenced code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def joined(node):
    """The text of a string literal or f-string, with NUL in the places of values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(joined(part) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def literals():
    """All string literals and f-strings of the product; Python joins adjacent literals when it parses them."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {text for node in nodes if (text := joined(node))}


def messages():
    """The messages in the tables of the troubleshooting page: code in the first column of tables of lines or symptoms,
    and code with ``...`` in their other columns.
    """
    first = ""  # first column of the header of the current table
    for line in TROUBLESHOOTING.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            first = ""
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        first = first or cells[0]
        if not first.startswith(("line", "symptom")):
            continue
        yield from (code for code in re.findall(r"`([^`]+)`", cells[0]) if " " in code)
        yield from (code for cell in cells[1:] for code in re.findall(r"`([^`]+)`", cell) if "..." in code)


MESSAGES = list(dict.fromkeys(messages()))
LITERALS = literals()


@pytest.mark.parametrize("message", [message for message in MESSAGES if message not in FOREIGN])
def test_a_message_of_the_troubleshooting_page_is_in_the_code(message):
    parts = [re.escape(part) for part in message.split("...") if len(part) >= SHORTEST]
    assert parts, "too short to be compared"
    assert any(re.search(".*".join(parts), text, re.DOTALL) for text in LITERALS)


def test_the_page_has_the_foreign_messages():
    assert set(MESSAGES) >= FOREIGN


def anchors(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(other), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    words = [word for code in re.findall(r"`([^`]+)`", prose(page)) for word in code.split()]
    paths = {word for word in words if PATH.fullmatch(word) and not PLACEHOLDER.search(word)} - FUTURE
    missing = [path for path in sorted(paths) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing
