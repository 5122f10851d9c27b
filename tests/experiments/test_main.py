"""The command line: what it prints, its exit codes, and the minutes that all experiments share."""

import subprocess
import sys

import fake_experiment
import pytest

from deltaw import experiments, results
from deltaw.experiments import __main__ as cli
from deltaw.experiments.engine import harness

NAME = "fake_experiment"


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """The fake experiment, under two names, in place of the book's."""
    fake_experiment.CALLS.clear()
    other = type(fake_experiment)("other", "And another?\n\nMore.")
    other.__dict__.update({key: value for key, value in vars(fake_experiment).items() if not key.startswith("__")})
    for module in (experiments, cli):
        monkeypatch.setattr(module, "NAMES", (NAME, "other"))
    for name, module in ((NAME, fake_experiment), ("other", other)):
        monkeypatch.setitem(sys.modules, f"deltaw.experiments.{name}", module)


def test_list_is_a_line_each(capsys, monkeypatch):
    monkeypatch.setattr(results, "names", lambda: ("other",))
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fake_experiment  Does the harness keep everything?  [6 cells, not recorded]",
        "other            And another?  [6 cells, recorded]",
    ]


def test_run_and_all(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(["run", NAME, NAME, "--quick", *options]) == 0
    assert results.names(tmp_path) == (f"{NAME}-quick",)
    assert cli.main(["all", *options]) == 0
    assert results.names(tmp_path) == (NAME, f"{NAME}-quick", "other")
    assert len(fake_experiment.CALLS) == 2 + 6 + 6
    printed = capsys.readouterr()
    assert printed.err == "" and [line.partition(":")[0] for line in printed.out.splitlines()] == [
        str(tmp_path / f"{name}.parquet") for name in (f"{NAME}-quick", NAME, "other")]


def test_results_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", NAME, "--quick", "--device", "cpu"]) == 0
    assert (tmp_path / "results" / f"{NAME}-quick.parquet").exists()


def test_the_minutes_are_shared_and_leave_no_error(monkeypatch):
    given, clock = [], iter([0.0, 0.0, 90.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(harness, "run", lambda name, **options: given.append(options["minutes"]))
    assert cli.main(["all", "--minutes", "1"]) == 0
    assert given == [1.0, 0.0]


def test_incomplete_is_said_and_is_no_error(tmp_path, capsys):
    assert cli.main(["run", NAME, "--minutes", "0", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "0 of 6 cells" in (printed := capsys.readouterr().out) and "INCOMPLETE, 6 left" in printed


@pytest.mark.parametrize("words, match", [
    (["run", "nope"], "invalid choice: 'nope' (choose from"),
    (["run"], "the following arguments are required: NAME"),
    ([], "the following arguments are required: command"),
    (["all", "--minutes", "-1"], "invalid minutes value: '-1'"),
    (["all", "--minutes", "nan"], "invalid minutes value: 'nan'"),
    (["all", "--device", "gpu"], "error: device 'gpu' is not here; there is cpu"),
])
def test_refused_with_exit_code_2(tmp_path, capsys, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words)
    except SystemExit as left:
        code = left.code
    assert code == 2 and not list(tmp_path.iterdir())
    assert match in capsys.readouterr().err


def test_a_record_of_other_settings(tmp_path, capsys):
    harness.run(fake_experiment, settings=fake_experiment.Settings(n=3), out=tmp_path, device="cpu", progress=False)
    assert cli.main(["run", NAME, "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "settings.n is 3 there and 6 here" in capsys.readouterr().err


def test_an_error_of_the_experiment_is_shown_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_experiment, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", NAME, "--out", str(tmp_path), "--device", "cpu"])


def test_control_c_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_experiment, "measure", interrupted)
    assert cli.main(["run", NAME, "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert "interrupted; run it again to go on" in capsys.readouterr().err


def test_as_a_program():
    command = [sys.executable, "-m", "deltaw.experiments", "run", "nope"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "invalid choice: 'nope'" in ended.stderr and "init_width" in ended.stderr
