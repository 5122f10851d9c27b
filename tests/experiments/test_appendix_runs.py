"""The quick run agrees with the theorem, and the analysis finds in made-up records what was put there."""

import numpy as np
import pandas as pd
import pytest
import torch

from deltaw.claims.two_forms import RULES, is_orthogonal
from deltaw.experiments import appendix_runs as runs
from deltaw.experiments.appendix_runs import ALIKE, APART, CONTROL, EQUAL, FIXED, HEAD, QUICK, TRAINED, Settings
from deltaw.experiments.engine import merged_runs


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("appendix_runs")


def test_the_full_record_is_large_enough():
    full = Settings()
    steps = merged_runs.checkpoints(full.steps)
    assert full.steps >= 500 and len(full.optimizers) == len(RULES) == 12 and len(full.seeds) >= 3
    assert len(steps) >= 20 and steps == sorted(set(steps)) and set(steps) <= set(range(1, 501)) and steps[-1] == 500
    assert set(runs.SHOWN) <= set(steps)
    assert merged_runs.checkpoints(3) == [1, 2, 3]
    assert len(full.optimizers) * (len(full.mixers) + len(full.trained)) == 60  # as the docstring says


@pytest.mark.parametrize("wrong", ({"optimizers": ("Lion",)}, {"mixers": ("round",)}, {"mixers": (), "trained": ("Kaiming",)}))
def test_settings_that_are_not_known_are_refused(wrong):
    with pytest.raises(ValueError, match="must be among"):
        Settings(**wrong)


def test_the_quick_run_is_as_the_theorem_says(record):
    found = runs.verdicts(record).set_index(["optimizer", "kind"])
    assert found["as_predicted"].all() and len(found) == 4
    assert found["verdict"].to_dict() == {("SGD", FIXED): "equal to rounding", ("SGD", TRAINED): "apart",
                                          ("Adam", FIXED): "apart", ("Adam", TRAINED): "apart"}
    assert (found["step 1"] < 1e-12).all() and found.loc[("Adam", FIXED), "step 2"] > 1e-3
    kept = runs.pairs(record)
    assert (kept["size"] > 0).all() and set(kept["step"]) == {1, 2}
    assert kept.loc[(kept["optimizer"] == "SGD") & (kept["kind"] == FIXED), "loss_gap"].max() < 1e-12
    assert record.attrs["manifest"]["data"] == runs.data(QUICK)


def test_the_quick_run_s_rates_are_those_of_the_least_loss(record):
    rates = runs.rates(record)
    best = rates.loc[rates.groupby("optimizer")["loss"].idxmin()].set_index("optimizer")["rate"].to_dict()
    assert rates[rates["chosen"]].set_index("optimizer")["rate"].to_dict() == best and rates["chosen"].sum() == 2
    used = runs.pairs(record).groupby("optimizer")["rate"].unique().map(list).to_dict()
    assert used == {name: [rate] for name, rate in best.items()}


def test_the_analysis_takes_the_quick_record(record):
    assert len(runs.curves(record)) == 2 * 3 * 2 and len(runs.growth(record)) == 3 and len(runs.ends(record)) == 6
    assert len(runs.learning(record)) == 4 and (record["kind"] == HEAD).sum() == 1
    assert runs.learning(record)["head_alone"].notna().all()


# ---------------------------------------------------------------------------------------------------------------------
# Records that are made up

STEPS = (1, 2, 25, 50, 75, 100, 200)
PAIRS = [(mixer, kind) for mixer in ("orthogonal", "Kaiming") for kind in (FIXED, TRAINED, CONTROL)]


def made_up(change=lambda row: row):
    """Controls that grow from 1e-15 (1e-7) by 1 decade per 100 steps; all pairs are as the theorem says."""
    rows, random = [], np.random.default_rng(0)
    for precision, eps in (("float64", 1e-15), ("float32", 1e-7)):
        for seed in (0, 1):
            cell = {"part": "runs", "precision": precision, "seed": seed}
            for optimizer in ("SGD", "AdamW"):
                for mixer, kind in PAIRS:
                    equal = kind == CONTROL or (kind, mixer, optimizer) == (FIXED, "orthogonal", "SGD")
                    for step in STEPS:
                        small = eps * 10 ** (step / 100) * (1 if kind == CONTROL else random.uniform(0.5, 2))
                        at_once = kind == TRAINED and optimizer == "AdamW"
                        row = {"optimizer": optimizer, "mixer": mixer, "kind": kind, "predicted": equal, "step": step,
                               "distance": small if equal or (step == 1 and not at_once) else 0.3, "loss": 2 - step / 200}
                        if step == STEPS[-1]:
                            row |= {"score": 0.9, "other_score": 0.8, "differ": 1 if equal else 40, "examples": 400, "clipped": 0.0}
                        rows.append(change(cell | row))
            rows.append({**cell, "kind": HEAD, "step": STEPS[-1], "loss": 1.2, "score": 0.6, "examples": 400})
    return pd.DataFrame(rows)


def only(mixer, kind, optimizer, change, **where):
    """Change these rows of a made-up record."""
    where |= {"mixer": mixer, "kind": kind, "optimizer": optimizer}
    return made_up(lambda row: row | change(row) if all(row[key] == value for key, value in where.items()) else row)


def verdict(table, mixer, kind, optimizer, precision="float64"):
    found = runs.verdicts(table).set_index(["precision", "mixer", "kind", "optimizer"])
    return found.loc[(precision, mixer, kind, optimizer)]


def test_what_is_as_predicted():
    table = made_up()
    found = runs.verdicts(table)
    assert found["as_predicted"].all() and len(found) == 2 * 2 * 4 and (found["verdict"] == "apart").sum() == 2 * (2 * 4 - 1)
    parted = found[found["verdict"] == "apart"].set_index(["precision", "mixer", "kind", "optimizer"])["parted"]
    assert all(step == (1 if key[2:] == (TRAINED, "AdamW") else 2) for key, step in parted.items())
    assert runs.hypotheses(table).set_index("hypothesis")[["as_said", "of", "holds"]].to_numpy().tolist() == [
        [8, 8, True], [7, 7, True], [1, 1, True], [8, 8, True], [1, 1, True]]


@pytest.mark.parametrize("times, expected", ((0.9 * EQUAL, "equal to rounding"), (2 * EQUAL, "between"), (2 * APART, "apart")))
def test_the_verdict_is_by_times_the_control(times, expected):
    table = only("orthogonal", FIXED, "SGD", lambda row: {"distance": times * 1e-15 * 10 ** (row["step"] / 100)})
    own = verdict(table, "orthogonal", FIXED, "SGD")
    assert own["verdict"] == expected and own["largest"] == pytest.approx(times)
    one_seed = only("orthogonal", FIXED, "SGD", lambda row: {"distance": times * 1e-13}, seed=0, step=200)
    assert verdict(one_seed, "orthogonal", FIXED, "SGD")["verdict"] == ("between" if times > EQUAL else expected)


def test_the_control_is_the_largest_so_far():
    burst = only("orthogonal", CONTROL, "SGD", lambda row: {"distance": 1e-9}, seed=1, step=50)
    after = burst.copy()
    at = (after["kind"] == FIXED) & (after["mixer"] == "orthogonal") & (after["optimizer"] == "SGD") & (after["step"] >= 75)
    after.loc[at, "distance"] = 1e-8
    assert verdict(after, "orthogonal", FIXED, "SGD")["verdict"] == "equal to rounding"
    after.loc[at | (at.shift(-1, fill_value=False)), "distance"] = 1e-6
    assert verdict(after, "orthogonal", FIXED, "SGD")["verdict"] != "equal to rounding"


def test_a_run_that_was_lost_is_stopped():
    table = only("Kaiming", TRAINED, "AdamW", lambda row: {"distance": np.nan}, seed=1, step=200)
    own = verdict(table, "Kaiming", TRAINED, "AdamW")
    assert own["verdict"] == "stopped" and not own["as_predicted"]
    assert not runs.hypotheses(table)["holds"][0]


def test_the_growth_is_that_which_was_put_there():
    found = runs.growth(made_up()).set_index(["precision", "optimizer", "mixer", "kind"])
    assert found.xs(CONTROL, level="kind")["decades"].to_numpy() == pytest.approx(1)
    assert found.loc[("float64", "SGD", "orthogonal", FIXED), "decades"] == pytest.approx(1, abs=0.4)
    assert len(found) == 2 * (2 * 2 + 1)
    faster = only("orthogonal", FIXED, "SGD", lambda row: {"distance": 1e-15 * 10 ** (0.02 * row["step"])})
    own = runs.growth(faster).set_index(["precision", "optimizer", "mixer", "kind"]).loc[("float64", "SGD", "orthogonal", FIXED)]
    assert own["decades"] == pytest.approx(2) and own["difference"] == pytest.approx(1) and own["difference"] > ALIKE
    assert not runs.hypotheses(faster)["holds"][2]
    full = only("orthogonal", FIXED, "SGD", lambda row: {"distance": 0.5})
    assert runs.growth(full)["decades"].isna().sum() == 2  # nothing below GROWING to fit


def test_what_learns_is_above_the_head_alone_in_every_seed():
    assert runs.learning(made_up())["learns"].all()
    worse = only("Kaiming", FIXED, "SGD", lambda row: {"other_score": 0.6}, seed=1, step=200)
    found = runs.learning(worse).set_index(["optimizer", "mixer", "kind"])
    assert not found.loc[("SGD", "Kaiming", FIXED), "learns"].any() and found["learns"].sum() == 14
    assert found["first_loss"].to_numpy() == pytest.approx(2 - 1 / 200) and found["loss"].to_numpy() == pytest.approx(1)
    rising = only("Kaiming", FIXED, "SGD", lambda row: {"loss": 3}, seed=1, step=200)
    assert runs.learning(rising)["learns"].sum() == 14


def test_predictions_that_differ_more_than_the_control_s():
    found = runs.ends(made_up()).set_index(["precision", "optimizer", "mixer", "kind"])
    assert found.loc[("float32", "SGD", "Kaiming", FIXED), ["differ", "control"]].tolist() == [40, 1]
    more = only("orthogonal", FIXED, "SGD", lambda row: {"differ": 6}, step=200)
    assert not runs.hypotheses(more)["holds"][4]
    few = only("orthogonal", FIXED, "SGD", lambda row: {"differ": 5}, step=200)
    assert runs.hypotheses(few)["holds"][4]


def test_a_rate_at_the_end_of_its_grid_is_flagged():
    grid = [{"part": "rates", "optimizer": name, "rate": rate, "loss": loss, "chosen": chosen}
            for name, losses in (("SGD", (3, 1, 2)), ("Adam", (3, 2, 1)))
            for rate, loss, chosen in zip((0.1, 0.2, 0.4), losses, np.array(losses) == 1)]
    found = runs.rates(pd.concat([pd.DataFrame(grid), made_up()]))
    assert len(found) == 6 and found[found["at_edge"]]["optimizer"].tolist() == ["Adam"] and found["chosen"].sum() == 2


def test_the_runs_begin_alike(record):
    start = merged_runs.Start(QUICK, seed=3)
    slots = {each.name: each.numbers for each in start.slots({"SGD": 0.1, "Muon": 0.1}, torch.float64)}
    for layer, q in start.mixers["orthogonal"].items():
        a, m, b = (f"{layer}.adapters.default.{factor}" for factor in "AMB")
        fixed, control, merged, trained = (slots["Muon", "orthogonal", kind] for kind in (FIXED, CONTROL, "merged", TRAINED))
        assert is_orthogonal(q) and torch.equal(fixed[m], q) and torch.equal(trained[m], q)
        assert torch.equal(merged[a], q @ fixed[a]) and torch.equal(merged[m], torch.eye(QUICK.rank).double())
        eps = torch.finfo(torch.float64).eps
        shift = (control[a] / fixed[a] - 1).abs() / eps
        assert ((shift > 2) & (shift < 6)).all() and torch.equal(control[m], q)
        assert not any(numbers[b].any() for numbers in slots.values()) and not slots[HEAD,][a].any()
    assert not torch.equal(start.a[layer], merged_runs.Start(QUICK, seed=4).a[layer])
