"""Write the repository's address into every file that gives it.

    python .ci/set_repository.py https://github.com/OWNER/NAME

pyproject.toml is where the address stands; the book's configuration, the citation, the README and the
chapters' install cells repeat it, and tests/test_book.py holds them together. For whoever moves or forks
the project; the pages of a fork are built with it.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GITHUB = "https://github.com/"


def main(address: str) -> None:
    new = address.removesuffix("/").removesuffix(".git").removeprefix(GITHUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", new):
        sys.exit(f"not of the form {GITHUB}OWNER/NAME: {address}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    old = project["urls"]["Repository"].removeprefix(GITHUB)
    # github.com/OWNER/NAME, and colab.research.google.com/github/OWNER/NAME
    pattern = re.compile(rf"(github\.com/|google\.com/github/){re.escape(old)}(?![\w-])")
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(files, cwd=ROOT, text=True).splitlines():
        path = ROOT / name
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a picture or a table; or deleted
        changed = pattern.sub(rf"\g<1>{new}", text)
        if changed != text:
            path.write_text(changed, "utf-8")
            print(name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
