"""README and docs: the site builds without a warning, links lead somewhere, and what is said of the source is true."""

import importlib.util
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from smdlm.data.config import KINDS
from smdlm.evaluate.protocol import PRESETS
from smdlm.sampling.policies import POLICIES

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"!?\[[^]]*\]\(([^) ]+)\)")


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page):
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_the_site_builds_without_a_warning(tmp_path):
    """Strict: broken links and anchors, pages outside of the menu, names of the API page that are not there."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    assert 'id="smdlm.library.Trained.sample"' in page and "the same seed gives the same texts" in page
    listed = (tmp_path / "site" / "troubleshooting" / "index.html").read_text("utf-8")
    assert listed.count("<li>") > 400 and "softmask.p_sm: got …, wanted 0 &lt;= p_sm &lt;= 1" in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files and headings; the anchors of the API page are made when the site is built, which checks them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert page.parent != DOCS or file.is_relative_to(DOCS), f"{link}: the site has nothing outside of docs/"
        if anchor and not anchor.startswith("smdlm."):
            assert anchor in anchors(file), f"{link}: {sorted(anchors(file))}"


def test_quoted_code_stands_in_the_source():
    """But for indentation and blank lines, which formatting may change."""
    quotes = re.findall(r'^```python title="(\S+)"\n(.*?)^```$', (DOCS / "method.md").read_text("utf-8"), re.M | re.S)
    assert len(quotes) > 8

    def plain(text):
        return [line.strip() for line in textwrap.dedent(text).splitlines() if line.strip()]

    for name, quote in quotes:
        lines, wanted = plain((ROOT / name).read_text("utf-8")), plain(quote)
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), f"{name}:\n{quote}"


def test_quoted_messages_stand_in_the_source():
    found = {text for texts in hooks().messages().values() for text in texts}
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.M)
    assert len(found) > 400 and len(quoted) > 50
    assert not (wrong := [text for text in quoted if text not in found]), wrong


def test_tables_are_those_of_the_source():
    """Presets of protocols field by field; every policy and source by name."""
    rows = re.findall(r"^\|(.*)\|$", (DOCS / "protocols.md").read_text("utf-8"), re.M)
    head, _, *fields = ([cell.strip() for cell in row.split("|")] for row in rows)
    assert head[1:] == [f"`{name}`" for name in PRESETS]
    assert {row[0] for row in fields} >= {"samples", "length", "steps", "top_p", "top_p_rule", "scorer"}
    for name, *shown in fields:
        values = (getattr(preset, name) for preset in PRESETS.values())
        assert shown == ["-" if x is None else str(x) or "none" for x in values], name
    commands = (DOCS / "commands.md").read_text("utf-8")
    assert not (missing := [name for name in POLICIES if f"`{name}`" not in commands]), missing
    assert not (missing := [name for name in KINDS if f"`{name}:" not in commands]), missing


def test_the_readme_is_short_and_versions_agree():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
    version = re.search(r'version="(.*?)"', (ROOT / "setup.py").read_text("utf-8")).group(1)
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
