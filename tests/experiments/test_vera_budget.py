"""The quick run, its counts, and pairs chosen by them."""

import numpy as np
import pytest
import torch

from deltaw.adapters import LoRA, VeRA
from deltaw.experiments import vera_budget
from deltaw.experiments.engine.trained import Size
from deltaw.experiments.vera_budget import HEAD, QUICK, Settings


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("vera_budget")


def test_the_full_record_is_large_enough():
    full = Settings()
    ranks = {family: [row.spec(0).rank for row in vera_budget.rows(family, full)] for family in ("LoRA", "VeRA")}
    assert ranks == {"LoRA": [1, 2, 4, 8, 16], "VeRA": [64, 128, 256, 512, 1024]}
    assert len(full.tune_seeds) == 3 and len(full.report_seeds) == 10 and full.fine == 5
    assert [cell["family"] for cell in vera_budget.cells(full)] == ["none", "LoRA", "VeRA"]


def test_a_seed_draws_vera_s_projection_too():
    (row,) = vera_budget.rows("VeRA", QUICK)
    assert row.spec(3) == VeRA(16, 0.1, projection_seed=3) and row.scale == "d = 0.1 at the start"
    head, = vera_budget.rows("none", QUICK)
    assert head.name == HEAD


def test_counts_are_the_papers_formulas():
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 4))
    assert Size.of(model, LoRA(2), ()).parameters == 2 * (6 + 10) + 2 * (10 + 4)
    assert Size.of(model, VeRA(32), ()).parameters == (10 + 32) + (4 + 32)  # b and d of each layer, not A and B


def test_the_quick_run_has_every_row_tuned_and_reported(record):
    assert list(record["row"].unique()) == [HEAD, "LoRA 1", "LoRA 2", "VeRA 16"]
    assert record.groupby("row")["phase"].agg(set).map({"coarse", "fine", "report"}.__eq__).all()
    reported = record[record["phase"] == "report"].groupby("row")
    assert (reported["seed"].agg(tuple).map(QUICK.report_seeds.__eq__)).all() and (reported["rate"].nunique() == 1).all()
    assert np.isfinite(record.select_dtypes("number")).all(axis=None)
    assert (record["report/predicted"].notna() == (record["phase"] == "report")).all()
    assert record.attrs["manifest"]["data"] == vera_budget.data(QUICK)


def test_rows_and_pairs_with_their_parameters(record):
    counts = vera_budget.budget(record).set_index("row")["parameters"].to_dict()
    assert counts == {HEAD: 0, "LoRA 1": 41472, "LoRA 2": 82944, "VeRA 16": 36 * 16 + 20736}
    found = vera_budget.pairs(record)
    assert found[["row", "reference"]].apply(tuple, axis=1).tolist() == [("VeRA 16", "LoRA 1"), ("VeRA 16", "LoRA 2")]
    assert found["parameters"].tolist() == [21312] * 2 and found["parameters_reference"].tolist() == [41472, 82944]
    assert vera_budget.nearest(record)[["row", "reference"]].to_numpy().tolist() == [["VeRA 16", "LoRA 1"]]
    both = vera_budget.pairs_over_examples(record)
    assert both["difference"].to_numpy() == pytest.approx(found["difference"].to_numpy())
    assert len(vera_budget.curves(record)) == len(record[record["phase"] != "report"])  # one seed


def test_where_there_is_little_room_rows_cannot_be_ranked(record):
    assert not vera_budget.headroom(record)["can_rank"].any()  # after four steps
    better = record.copy()
    better["report/accuracy"] = better["seed"] / 1000 + (better["row"] != HEAD) * 0.2
    assert vera_budget.headroom(better)["can_rank"].all()
