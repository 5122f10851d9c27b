"""Copy the pictures that the landing page shows from the chapters' stored outputs: chapter 7's, optimizers against mixers,
and chapter 8's decision card."""

import base64
import json
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
FIGURES = {  # file: the chapter, and the tag of the cell that shows it
    "symmetry.png": ("07_moslora_appendix.ipynb", "symmetry-figure"),
    "decision_card.png": ("08_comparison.ipynb", "decision-card"),
}


def stored_figure(name: str) -> bytes:
    """The picture that a chapter shows."""
    chapter, tag = FIGURES[name]
    for cell in json.loads((BOOK / chapter).read_text("utf-8"))["cells"]:
        if tag in cell["metadata"].get("tags", []):
            return base64.b64decode(next(output["data"]["image/png"] for output in cell["outputs"] if "data" in output))
    raise LookupError(f"{chapter} has no cell tagged {tag}")


if __name__ == "__main__":
    for name in FIGURES:
        (BOOK / "figures" / name).write_bytes(stored_figure(name))
