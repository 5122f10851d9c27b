"""The book around the chapters: what `make test` alone would let pass, and what must agree between files."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
INSTALL_TAGS = {"remove-cell", "skip-execution", "nbval-skip"}  # for the page, for execution, for nbval

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"]
OWNER, NAME = ADDRESS.removeprefix("https://github.com/").split("/")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def text_files() -> list[tuple[str, str]]:
    """(name, text) of every file that is, or would be, in a commit."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = []
    for name in sorted(set(names)):
        try:
            found.append((name, (ROOT / name).read_text("utf-8")))
        except (UnicodeDecodeError, OSError):
            pass  # a picture or a table; or deleted
    return found


# The table of contents


def toc_files(entry: dict) -> list[str]:
    files = [entry[key] for key in ("root", "file") if key in entry]
    for key in ("parts", "chapters", "sections"):
        for part in entry.get(key, []):
            files += toc_files(part)
    return files


def test_toc_and_folder_have_the_same_notebooks():
    listed = toc_files(read_yaml("_toc.yml"))
    assert len(listed) == len(set(listed))
    sources = [next(iter(ROOT.glob(f"{name}.*")), None) for name in listed]
    assert None not in sources, f"in _toc.yml and nowhere else: {listed[sources.index(None)]}"
    assert sorted(source for source in sources if source.suffix == ".ipynb") == NOTEBOOKS
    assert NOTEBOOKS


# The chapters


@each_notebook
def test_outputs_are_stored(path):
    """nbval compares nothing where nothing is stored; and one run from top to bottom must have stored it."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    run = [cell for cell in cells if "skip-execution" not in tags(cell)]
    assert run
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1)), "run `make notebooks`"


@each_notebook
def test_stored_outputs_are_clean(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" or "raises-exception" in tags(cell), cell.source
            assert output.get("name") != "stderr", f"writes to stderr:\n{cell.source}\n{output.text}"


@each_notebook
def test_first_code_cell_installs_the_library(path):
    """From the repository, never by its bare name from the package index; and on Colab only."""
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert INSTALL_TAGS <= tags(first)
    assert first.source == f'%pip install -q "{PROJECT["name"]} @ git+{ADDRESS}"'
    others = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]
    assert not any("pip install" in cell.source for cell in others)


# The claims, and the figure on the landing page


def markdown(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


def test_every_claim_has_its_place_in_a_chapter():
    """A line `(claim-…)=` above the paragraph that derives it, to which chapter 10's table links."""
    from deltaw import claims

    anchors = {path.stem: set(re.findall(r"^\(claim-([a-z0-9-]+)\)=$", markdown(path), re.MULTILINE)) for path in NOTEBOOKS}
    listed = {chapter: {one.id for one in claims.all_claims() if one.chapter == chapter} for chapter in anchors}
    assert anchors == listed


def test_claims_are_many_and_not_all_of_them_flatter():
    from deltaw import claims

    everything = claims.all_claims()
    corrected = [one for one in everything if one.verdict != "holds" and not one.source.startswith("this book")]
    assert len(everything) >= 40
    assert len(corrected) >= 6


@pytest.mark.parametrize("chapter", ["02", "03", "04", "05", "06", "07", "09"])
def test_a_chapter_has_what_a_chapter_has(chapter):
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(chapter))
    text = markdown(path)
    assert all(f"\n{part}\n:" in text for part in ("You will know", "You need", "Not reproduced here"))
    assert "## What we learnt" in text and "## References" in text
    exercises = re.findall(r"^:label: (ex-[a-z0-9-]+)$", text, re.MULTILINE)
    solutions = re.findall(r"\{solution\} (ex-[a-z0-9-]+)$", text, re.MULTILINE)
    assert len(exercises) >= 4 and exercises == solutions
    assert text.count("{admonition} Before you look") >= 2
    cells = nbformat.read(path, as_version=4).cells
    assert sum("hide-cell" in tags(cell) for cell in cells) >= 4, "a solution's answer is executed"


def test_labels_are_unique_in_the_book():
    labels = [label for path in NOTEBOOKS for label in
              re.findall(r"\$\$ \(([a-z0-9-]+)\)|^:label: ([a-z0-9-]+)$|^\(([a-z0-9-]+)\)=$", markdown(path), re.MULTILINE)]
    labels = ["".join(label) for label in labels]
    assert sorted(labels) == sorted(set(labels))


def test_the_landing_page_shows_the_chapters_figures():
    spec = importlib.util.spec_from_file_location("landing_figure", ROOT / ".ci" / "landing_figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in module.FIGURES:
        assert (module.BOOK / "figures" / name).read_bytes() == module.stored_figure(name), "run `make notebooks`"


# One address, one version


def test_configuration_and_citation_have_the_address():
    assert read_yaml("_config.yml")["repository"]["url"] == ADDRESS
    assert read_yaml("CITATION.cff")["repository-code"] == ADDRESS


def test_citation_has_the_version():
    assert read_yaml("CITATION.cff")["version"] == PROJECT["version"]


def test_no_file_has_another_address():
    """Also in https://colab.research.google.com/github/OWNER/NAME, and with git+ before it."""
    address = re.compile(rf"github(?:\.com)?/([\w.-]+)/{re.escape(NAME)}(?![\w-])")
    found = {(name, owner) for name, text in text_files() for owner in address.findall(text)}
    assert {name for name, _ in found} >= {"README.md", "book/index.md", "_config.yml", "CITATION.cff"}
    assert {owner for _, owner in found} == {OWNER}


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    links = [link.removeprefix(f"https://colab.research.google.com/github/{OWNER}/{NAME}/blob/main/") for link in links]
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


# What must run anywhere


def test_no_file_names_the_machine_it_was_written_on():
    folders = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|mnt|opt|srv|work)/|[.]{2}/shared\b|/[.]library\b")
    found = []
    for name, text in text_files():
        if str(ROOT) in text:
            found.append(f"{name}: {ROOT}")
        found += [f"{name}: {text[match.start():match.end() + 20]!r}" for match in folders.finditer(text)]
    assert not found


def load_check_site():
    spec = importlib.util.spec_from_file_location("check_site", ROOT / ".ci" / "check_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "html, fetched",
    [
        ('<script src="https://a.org/x.js"></script>', ["https://a.org/x.js"]),
        ('<link rel="stylesheet" href="//a.org/x.css">', ["//a.org/x.css"]),
        ('<link rel="preload stylesheet" href="http://a.org/x.css">', ["http://a.org/x.css"]),
        ('<img src="https://a.org/x.png">', ["https://a.org/x.png"]),
        ('<img srcset="x.png 1x, https://a.org/x.png 2x">', ["https://a.org/x.png"]),
        ("<style>@import 'https://a.org/x.css';</style>", ["https://a.org/x.css"]),
        ('<p style="background: url(//a.org/x.png)">', ["//a.org/x.png"]),
        ('<a href="https://a.org/">a link</a>', []),
        ('<link rel="canonical" href="https://a.org/">', []),
        ('<script src="_static/x.js"></script><img src="x.png"><p>url(https://a.org)</p>', []),
    ],
)
def test_check_site_sees_what_a_page_fetches(html, fetched):
    assert load_check_site().fetched_by_page(html) == fetched


def test_check_site_sees_a_directive_that_was_not_read():
    page = load_check_site().read("<p>```{prf:theorem} Eckart and Young</p><p>a ``` fence, {cite} and :::</p>")
    assert page.unread == ["```{prf:theorem} Eckart and Young"]



def test_built_pages_fetch_nothing_from_outside():
    site = ROOT / "_build" / "html"
    if not site.exists():
        pytest.skip("not built; `make book` checks it")
    assert load_check_site().check(site) == []
