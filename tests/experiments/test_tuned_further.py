"""What is run, beside `tuned_comparison`, at QUICK's size; and the analysis of two records whose answers are known."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import deltaw as dw
from deltaw.adapters import Layer, inits
from deltaw.experiments import tuned_comparison as compared
from deltaw.experiments import tuned_further as further
from deltaw.experiments.engine.subjects import subject
from deltaw.experiments.engine.trained import Size
from deltaw.experiments.tuned_comparison import CODE, FULL, HEAD, LORA
from deltaw.experiments.tuned_further import BASE, EVENED, OVER_N, QUICK, TRAINED, Settings

ROWS = [LORA, "LoRA 1", "LoRA 2", "rsLoRA 8", OVER_N, TRAINED, EVENED, "DoRA", "DoRA 16"]


# ---------------------------------------------------------------------------------------------------------------------
# What is run


def test_the_budget_is_the_main_records():
    ours, theirs = Settings(), compared.Settings()
    for field in dataclasses.fields(compared.Tuned):
        assert getattr(ours.of(CODE), field.name) == getattr(theirs.of(CODE), field.name), field.name
    assert ours.higher in theirs.ranks
    assert further.data(QUICK).items() <= compared.data(compared.QUICK).items()


def test_the_rows_are_what_they_are_called():
    assert [cell["group"] for cell in further.cells(Settings())] == ["base", "factors", "magnitudes"]
    rows = {row.name: row for group in further.groups(Settings()).values() for row in group}
    main = {row.name: row for group in compared.groups(compared.Settings()).values() for row in group}
    assert list(rows) == ROWS and [name for name in rows if name in main] == list(further.AGAIN)
    for name in further.AGAIN:
        assert rows[name].spec(0) == main[name].spec(0) and rows[name].scale == main[name].scale
    assert rows["DoRA 16"].spec(0).inner == main["LoRA 16"].spec(0) and rows["DoRA 16"].scale == main["LoRA 16"].scale
    model = dw.tasks.digits(base_steps=1).model()
    layers = {name: dw.attach(copy.deepcopy(model), row.spec(0)).hidden1.adapters["default"] for name, row in rows.items()}
    scales = {"LoRA 1": 8, "LoRA 2": 4, "rsLoRA 8": 8**0.5, EVENED: 3**-0.5, TRAINED: 1, OVER_N: 1}
    assert {name: layers[name].scale for name in scales} == pytest.approx(scales)
    assert (rows["LoRA 1"].scale, rows["rsLoRA 8"].scale) == ("s = 8 (α = 8)", "s = 2.828 (α = 8)")
    assert {name for name, each in layers.items() if "M" in dict(each.named_parameters())} == {TRAINED}
    assert all(row.recipe == {} for row in rows.values())


def test_rows_of_a_cell_go_through_the_model_together():
    model = dw.tasks.digits(base_steps=1).model()
    sizes = [{Size.of(model, row.spec(0), ()).group for row in rows} for rows in further.groups(Settings()).values()]
    assert sizes == [{(16, False)}, {(16, True)}]


def test_the_evened_mixer_is_an_orthogonal_one_divided_by_root_three():
    """Run by run: the scale 1/√3 before Q, and Q/√3 at the scale 1."""
    task = dw.tasks.digits(base_steps=30)
    q = inits.haar(4, 4, torch.Generator().manual_seed(0), Layer("layer", torch.empty(4, 4)))  # (r, r)
    even = next(row for row in further.groups(Settings(rank=4, higher=8))["factors"] if row.name == EVENED).spec(0)
    specs = [dataclasses.replace(even, mixer=q), dw.MoSLoRA(4, mixer=q / 3**0.5, train_mixer=False),
             dw.MoSLoRA(4, mixer=q, train_mixer=False)]
    bank = dw.Bank(task.model(), [(spec, dw.Recipe(steps=20, learning_rate=1e-2)) for spec in specs])
    ours, theirs, orthogonal = (history.loss for history in bank.fit(task, device="cpu", progress=False))
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] != pytest.approx(orthogonal[-1], rel=1e-3)


def test_init_b_over_n_has_the_variance_of_the_transposed_a():
    layer = Layer("layer", torch.zeros(600, 200))
    a, b = further.init_b_over_n(layer, 4, 1.0, torch.Generator().manual_seed(3))  # (4, 200), (600, 4)
    usual = inits.init_b(layer, 4, 1.0, torch.Generator().manual_seed(3))[1]
    assert not a.any() and torch.allclose(b * (600 / 4) ** 0.5, usual)
    assert b.square().mean().item() == pytest.approx(1 / (3 * 600), rel=0.05)


@pytest.fixture(scope="module")
def records(quick):
    return quick("tuned_further"), quick("tuned_comparison")


def test_the_quick_record_and_its_base(records):
    table, _ = records
    assert list(table["row"].unique()) == [BASE, LORA, "LoRA 1", "rsLoRA 2", OVER_N, TRAINED, EVENED, "DoRA", "DoRA 4"]
    base = further.base_loss(table).iloc[0]
    what = subject(CODE, QUICK)
    expected = dw.evaluate(what.task.model(), what.task)
    assert [base[name] for name in ("tune", "report", "python")] == pytest.approx(
        [expected[f"{name}/loss"] for name in ("tune", "report", "python")], abs=1e-5)
    assert table["row"].eq(BASE).sum() == 1 and 0 < base["half_width"] < 1
    assert set(further.reported(table)["row"]) == set(table["row"]) - {BASE}


def test_the_bridge_holds_on_a_cpu(records):
    found = further.bridge(*records)
    assert found["row"].tolist() == [LORA, "DoRA"] and found["rate"].equals(found["rate_main"])
    assert found["tune_apart"].max() < 1e-4 and found["report_apart"].max() < 1e-4
    assert len(further.against_lora(*records)) == 6 and len(further.pairs(*records)) == 8


def test_records_of_another_budget_are_not_joined(records):
    table, main = records
    other = main.copy()
    manifest = main.attrs["manifest"]
    other.attrs["manifest"] = {**manifest, "settings": manifest["settings"] | {"code_steps": 3}}
    with pytest.raises(ValueError, match="of their settings code_steps differ"):
        further.pairs(table, other)
    other.attrs["manifest"] = {**manifest, "data": manifest["data"] | {"code_lm cpp": "0"}}
    with pytest.raises(ValueError, match="of their data code_lm cpp differ"):
        further.against_lora(table, other)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis


RATES = tuple(float(f"{1e-3 * 2**k:.3g}") for k in range(6))
OURS = {LORA: 2.4, "LoRA 1": 2.52, "LoRA 2": 2.47, "rsLoRA 8": 2.4, OVER_N: 2.45, TRAINED: 2.395, EVENED: 2.401, "DoRA": 2.38,
        "DoRA 16": 2.35}
MAIN = {HEAD: 2.8, FULL: 2.3, LORA: 2.4, "LoRA 16": 2.37, "rsLoRA 16": 2.365, "DoRA": 2.38, "DVoRA": 2.58, "Init[B]": 2.5,
        "MoSLoRA, trained": 2.43, "MoSLoRA, orthogonal": 2.396}


def record(losses, best=8e-3, first=0):
    """Each row is 0.02 worse for each doubling off the best rate; blocks are hard for all rows alike."""
    random, rows = np.random.default_rng(first), []
    for row, loss in losses.items():
        common = {"task": CODE, "group": "one", "row": row, "scale": "s = 1", "parameters": 10, "with_head": 10, "stopped": ""}
        for rate in RATES:
            off = loss + 0.02 * abs(np.log2(rate / best))
            rows += [common | {"phase": "coarse", "rate": rate, "seed": 100 + seed, "tune/loss": off, "report/loss": off}
                     for seed in range(3)]
        for seed in range(10):
            blocks = loss + np.linspace(-0.5, 0.5, 32) + random.normal(0, 0.004, 32)
            rows.append(common | {"phase": "report", "rate": best, "seed": seed, "tune/loss": loss, "report/loss": blocks.mean(),
                                  "report/blocks": " ".join(map(str, blocks))})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def tables():
    blocks = " ".join(map(str, 3 + np.linspace(-0.5, 0.5, 32)))
    base = {"task": CODE, "group": "base", "row": BASE, "phase": "base", "rate": 0.0, "seed": 0, "scale": "ΔW = 0",
            "parameters": 0, "with_head": 0, "stopped": "", "tune/loss": 3.1, "report/loss": 3.0, "python/loss": 2.0,
            "report/blocks": blocks}
    other_task = record({LORA: 2.4}).assign(task="sst2")  # is not looked at
    return pd.concat([pd.DataFrame([base]), record(OURS)], ignore_index=True), pd.concat([record(MAIN, first=1), other_task])


def test_verdicts_of_the_two_families(tables):
    found = further.against_lora(*tables).set_index("row")
    assert found["verdict"].to_dict() == {
        "LoRA 1": "worse", "LoRA 2": "worse", "rsLoRA 8": "equivalent", OVER_N: "worse", TRAINED: "equivalent",
        EVENED: "equivalent", "DoRA 16": "better"}
    pairs = further.pairs(*tables).set_index(["row", "reference"])
    assert pairs["verdict"].to_dict() == {
        ("LoRA 1", "DVoRA"): "better", ("DoRA 16", "LoRA 16"): "better", ("DoRA 16", "rsLoRA 16"): "better",
        (TRAINED, "MoSLoRA, orthogonal"): "equivalent", (TRAINED, "MoSLoRA, trained"): "better",
        (EVENED, "MoSLoRA, orthogonal"): "equivalent", (EVENED, "MoSLoRA, trained"): "better", (OVER_N, "Init[B]"): "better"}
    assert pairs.loc[("LoRA 1", "DVoRA"), "difference"] == pytest.approx(-0.06, abs=2e-3)
    cannot = tables[1].copy()
    same = {name: ((cannot["row"] == name) & (cannot["phase"] == "report") & (cannot["task"] == CODE)) for name in (HEAD, FULL)}
    columns = ["report/blocks", "report/loss"]
    cannot.loc[same[HEAD], columns] = cannot.loc[same[FULL], columns].to_numpy()
    assert set(further.against_lora(tables[0], cannot)["verdict"]) == {"cannot rank"}


def test_the_leads_of_dora_at_two_ranks(tables):
    table, main = tables
    found, = further.lead_by_rank(table, main).itertuples()
    assert (found.row, found.reference, found.verdict) == ("DoRA 16 − LoRA 16", "DoRA − LoRA", "equivalent")
    assert found.difference == pytest.approx(0, abs=2e-3) and found.low < found.difference < found.high
    more = pd.concat([table[table["row"] != "DoRA 16"], record({"DoRA 16": 2.3}, first=2)])
    found, = further.lead_by_rank(more, main).itertuples()
    assert found.verdict == "better" and found.difference == pytest.approx(-0.05, abs=2e-3)


def test_the_bridge_and_the_base(tables):
    table, main = tables
    found = further.bridge(table, main).set_index("row")
    assert found["tune_apart"].max() == 0 and (found["report_apart"] < 5e-3).all() and (found["report_apart"] > 0).all()
    moved = pd.concat([record({LORA: 2.41}, best=4e-3), table[table["row"] == "DoRA"]])
    found = further.bridge(moved, main).set_index("row")
    assert (found.loc[LORA, "rate"], found.loc[LORA, "rate_main"]) == (4e-3, 8e-3) and np.isnan(found.loc[LORA, "report_apart"])
    assert found.loc[LORA, "tune_apart"] == pytest.approx(0.03) and found.loc[LORA, "report"] == pytest.approx(2.41, abs=2e-3)
    assert further.base_loss(table)[["tune", "report", "python"]].iloc[0].tolist() == [3.1, 3.0, 2.0]
    assert further.reported(table).set_index("row")["report"].to_dict() == pytest.approx(OURS, abs=2e-3)
