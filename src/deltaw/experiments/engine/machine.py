"""Where and with what an experiment runs. Nothing that names a host, a user or a path."""

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import deltaw

PACKAGE = Path(deltaw.__file__).parent
VERSIONS_OF = ("torch", "numpy", "transformers", "accelerate", "datasets", "scikit-learn", "pandas", "pyarrow")


def sitting(device: str) -> dict[str, Any]:
    """A manifest's entry for a sitting that begins now on "cpu", "cuda" or "cuda:N". What is not there is None."""
    gpu = device != "cpu"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "device": "cuda" if gpu else "cpu",
        "name": torch.cuda.get_device_name(device) if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {package: _version(package) for package in VERSIONS_OF},
        "commit": commit(),
        "source": source_hash(),
    }


def commit() -> str | None:
    """DELTAW_COMMIT if it is set; else the git commit of this package's files, with "-dirty" if they differ from it."""
    if said := os.environ.get("DELTAW_COMMIT"):
        return said
    git = ("git", "--no-optional-locks", "-C", str(PACKAGE))
    # An installed copy may lie inside another project's repository, which does not track it.
    if not _output(*git, "ls-files", "--error-unmatch", "__init__.py"):
        return None
    head = _output(*git, "rev-parse", "HEAD")
    return head and head + ("-dirty" if _output(*git, "status", "--porcelain", "--", "*.py") else "")


def source_hash() -> str:
    """SHA-256 of this package's .py files, names and contents."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(PACKAGE).as_posix()}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails, prints nothing or is not there."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.partition("\n")[0].strip() or None
