"""What the tests of experiments have in common: each `QUICK` is run once a session, whichever process asks first."""

import time

import pytest
import torch
from filelock import FileLock

from deltaw import results
from deltaw.experiments.engine import harness


@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory):
    """A folder of all processes of the session, where the code corpus and its bases are kept, too."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared"  # pytest-xdist's processes have one each
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CODE", str(folder / "code"))
        yield folder


@pytest.fixture(scope="session")
def quick(shared):
    """`quick(name)`: the table of an experiment's quick run, and in `.attrs["cpu"]` the seconds of CPU that it took."""

    def run(name):
        with FileLock(shared / f"{name}.lock"):
            cpu = shared / f"{name}.cpu"
            if not cpu.exists():
                began, state = time.process_time(), torch.get_rng_state()
                harness.run(name, quick=True, device="cpu", out=shared, progress=False)
                assert torch.equal(torch.get_rng_state(), state)  # a notebook's own draws stay what they were
                cpu.write_text(str(time.process_time() - began))
        table = results.load(f"{name}-quick", folder=shared)
        table.attrs["cpu"] = float(cpu.read_text())
        return table

    return run
