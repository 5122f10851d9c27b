"""Copy chapter 7's figure, optimizers against mixers, from its stored output to the landing page."""

import base64
import json
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
CHAPTER, FIGURE = BOOK / "07_moslora_appendix.ipynb", BOOK / "figures" / "symmetry.png"


def stored_figure() -> bytes:
    """The picture that the cell tagged `symmetry-figure` shows."""
    for cell in json.loads(CHAPTER.read_text("utf-8"))["cells"]:
        if "symmetry-figure" in cell["metadata"].get("tags", []):
            return base64.b64decode(next(output["data"]["image/png"] for output in cell["outputs"] if "data" in output))
    raise LookupError(f"{CHAPTER.name} has no cell tagged symmetry-figure")


if __name__ == "__main__":
    FIGURE.write_bytes(stored_figure())
