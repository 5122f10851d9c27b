"""Check that the built pages fetch nothing from another site, and show no markup that was not understood.

    python .ci/check_site.py _build/html

The book must open without a network. Links that a reader may click are fine. What a browser loads by itself is
not: scripts, style sheets, fonts, images, frames. And a directive that MyST could not read is no warning to
Sphinx: it stands on the page as text.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# <link rel=…> that loads something; the others (canonical, next, search …) only name an address.
LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
CSS_ADDRESS = re.compile(r"""(?:url\(\s*|@import\s+)["']?\s*((?:https?:)?//[^"')\s;]+)""", re.IGNORECASE)
UNREAD = re.compile(r"(?:```|:::)\{[\w:-]+\}.{0,40}")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def is_external(address: str) -> bool:
    return bool(re.match(r"\s*(?:https?:)?//", address, re.IGNORECASE))


def in_css(text: str) -> list[str]:
    return CSS_ADDRESS.findall(COMMENT.sub("", text))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.unread: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self._in_style = tag == "style"
        addresses = []
        if tag == "link" and LOADING_LINKS & set(values.get("rel", "").lower().split()):
            addresses.append(values.get("href", ""))
        if tag in {"script", "img", "iframe", "source", "audio", "video", "embed", "input", "track"}:
            addresses.append(values.get("src", ""))
            addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "object":
            addresses.append(values.get("data", ""))
        if tag in {"image", "use"}:  # inside an inline SVG
            addresses += [values.get("href", ""), values.get("xlink:href", "")]
        self.fetched += [address for address in addresses if is_external(address)]
        self.fetched += in_css(values.get("style", ""))

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self.fetched += in_css(data)
        self.unread += UNREAD.findall(data)


def read(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    return page


def fetched_by_page(html: str) -> list[str]:
    return read(html).fetched


def check(site: Path) -> list[str]:
    """One line for each address outside the site that a page or a style sheet loads, and each directive not read."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = read(path.read_text("utf-8"))
            addresses = page.fetched
            found += [f"{path.relative_to(site)} shows the markup {text!r}" for text in page.unread]
        elif path.suffix == ".css" or path.suffix == ".svg":
            addresses = in_css(path.read_text("utf-8"))
        else:
            continue
        found += [f"{path.relative_to(site)} fetches {address}" for address in addresses]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    if not any(site.rglob("*.html")):
        sys.exit(f"no pages in {site}")
    problems = check(site)
    if problems:
        sys.exit("\n".join(problems))
    print("The pages fetch nothing from outside, and every directive was read.")
