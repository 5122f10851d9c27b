"""The decision card, on a table of known answers."""

import struct

import numpy as np
import pandas as pd
import pytest

from deltaw import claims, decision_card
from deltaw.results import Manifest

SETTINGS = {"rank": 8, "xs": 16, "vera": 256, "code_steps": 125}
SCALES = {"VeRA": "d = 0.1 at the start", "twin": "s = 2.828 (α = 8)", "LoRA": "s = 1 (α = 8)", "LoRA 4": "s = 4 (α = 8)"}
ROWS = {"head only": (0, 3.0), "VeRA": (5, 2.6), "twin": (5, 2.601), "LoRA": (50, 2.2), "LoRA 4": (25, 2.4), "full": (1000, 2.0)}


@pytest.fixture
def record():
    random, found = np.random.default_rng(0), []
    order = random.normal(0, 0.01, 10)  # seeds move all rows alike
    for row, (parameters, loss) in ROWS.items():
        known = {"task": "code_lm", "row": row, "parameters": parameters, "with_head": parameters or 4_194_304, "stopped": "",
                 "scale": SCALES.get(row, "none")}
        found += [known | {"phase": "coarse", "rate": rate, "seed": 100, "tune/loss": loss + off}
                  for rate, off in ((0.001, 0.02), (0.002, 0.0), (0.004, 0.02))]
        for seed in range(10):
            blocks = loss + order[seed] + np.linspace(-0.5, 0.5, 32) + random.normal(0, 0.001, 32)
            found.append(known | {"phase": "report", "rate": 0.002, "seed": seed, "report/loss": blocks.mean(),
                                  "report/blocks": " ".join(map(str, blocks))})
    table = pd.DataFrame(found)
    table.attrs["manifest"] = Manifest(settings=SETTINGS)
    return table


def test_each_budget_gets_its_lowest_row(record):
    card = decision_card.budgets(record, (0.01, 0.03, 1.0))
    assert card["row"].tolist() == ["VeRA", "LoRA 4", "full"] and card["budget"].tolist() == ["up to 1 %", "up to 3 %", "up to 100 %"]
    assert card["gap"].tolist() == pytest.approx([0.4, 0.6, 1.0], abs=2e-3)
    assert card["label"].tolist() == ["VeRA, rank 256", "LoRA, rank 4", "full fine-tuning"]
    assert card["equivalent"].tolist() == [("twin, rank 8, s = 2.8",), (), ()] and card["unresolved"].tolist() == [(), (), ()]
    assert card["lowest"].between(0.0013, 0.0015).all() and card["highest"].between(0.0027, 0.0029).all()
    assert (card["unit"] == 0.002).all() and set(card["whose"]) == {"LoRA 8's"}
    over = decision_card.budgets(record, (0.01, 0.03, 1.0), base=3.5)["gap"].tolist()
    assert over == pytest.approx([0.6, 1.1 / 1.5, 1.0], abs=2e-3)
    times = pd.DataFrame({"one": [1.2, 1.3, 1.5], "other": [2.2, 2.3, 2.5]}, ["VeRA", "twin", "full"])
    card = decision_card.budgets(record, (0.01, 0.03, 1.0), times)
    assert card["time"].tolist() == [(1.2, 2.2), (), (1.5, 2.5)] and card["equivalent"][0] == (
        "twin, rank 8, s = 2.8 (step 1.3 / 2.3 ×)",)


def test_each_line_has_its_scale_and_whom_it_beats(record):
    card = decision_card.budgets(record, (0.01, 0.03, 0.06, 1.0))
    assert card["scale"].tolist() == ["", "4", "1", ""] and card["others"].tolist() == [1, 2, 3, 4]
    assert card["worse"].tolist() == [
        (), (("VeRA, rank 256", 0.2), ("twin, rank 8", 0.2)), (("VeRA, rank 256", 0.1), ("twin, rank 8", 0.1), ("LoRA, rank 4", 0.5)),
        (("VeRA, rank 256", 0.005), ("twin, rank 8", 0.005), ("LoRA, rank 8", 0.05), ("LoRA, rank 4", 0.025))]
    assert card["alpha"].isna().tolist() == [True, False, True, True] and card["alpha"][1] == 16  # s = 4 at rank 4
    figure = decision_card.draw(card, [])
    said = [text.get_text() for text in figure.axes[0].texts]
    decision_card.png(figure)
    assert {"VeRA, rank 256$^a$", "LoRA, rank 4, s = 4$^a$", "equivalent: twin, rank 8, s = 2.8$^a$", "worse: all 4 others run$^a$",
            "s as in LoRA with α = 16 · worse: VeRA, rank 256 (0.20 × its numbers), twin, rank 8 (0.20 × its numbers)$^a$",
            "worse: all 3 others run$^a$"} <= set(said)


def test_not_all_are_worse_if_one_was_stopped(record):
    rows = decision_card.budgets(record, (1.0,)).assign(others=6)
    figure = decision_card.draw(rows, [])
    assert "worse: 4 of 6 others run$^a$" in [text.get_text() for text in figure.axes[0].texts]
    decision_card.png(figure)


@pytest.mark.parametrize(("said", "scale", "rank", "alpha"), [
    ("s = 1 (α = 8)", "1", 64, 64), ("s = 1 (α = 8)", "1", 8, None), ("s = 2.828 (α = 8)", "2.8", 8, 22.624),
    ("s = 0.03125 (α = 8)", "0.031", 256, None), ("s = 1/√3 (α = 8/√3)", "1/√3", 8, None),
    ("every entry of ΔW", "", 8, None), ("d = 0.1 at the start", "", 256, None)])  # fmt: skip
def test_the_scale_that_a_record_has(said, scale, rank, alpha):
    found = decision_card.plain_alpha(said, rank)
    assert decision_card.scale(said) == scale and (np.isnan(found) if alpha is None else found == pytest.approx(alpha))


def test_footers_say_what_zero_is_and_what_was_not_tried(record):
    assert not any("Not run" in one for one in decision_card.footers(record))
    more = [record[record["row"] == "LoRA"].assign(row=row) for row in ("LoRA 64", "DoRA", "DoRA 16")]
    settings, record = record.attrs, pd.concat([record, *more])
    record.attrs = settings
    bars, rule, ranks, lacking, rates = decision_card.footers(record)
    assert bars == "Bars: 100 % is full fine-tuning; 0 % is the output matrix trained alone (4.2 M numbers), not the untrained base."
    assert rule == "Rule and budgets chosen after the record was seen." and "125 updates. Do not copy them: tune yours." in rates
    assert ranks == "Ranks run: LoRA 4, 8, 64; DoRA 8, 16; every other row at one only."
    assert lacking == "Not run: DoRA below rank 8 or above rank 16."
    assert rates.endswith("is for going from one row to another.")
    bars = decision_card.footers(record, 4.0)[0]
    assert bars.endswith("0 % is the untrained base; the output matrix trained alone (4.2 M numbers) reaches 50 %.")
    cost = pd.DataFrame({"one layer": [1.2], "another": [1.3]}, ["VeRA"])
    assert decision_card.footers(record, cost=cost)[-1].endswith("on one layer / another.")
    with_full = pd.concat([cost, pd.DataFrame({"one layer": [1.5], "another": [0.9]}, ["full"])])
    assert decision_card.footers(record, cost=with_full)[-1].endswith("Full fine-tuning's: 1.5 / 0.9 ×.")


def test_what_the_card_cannot_do_without(record):
    with pytest.raises(ValueError, match="within a budget of 0.10%"):
        decision_card.budgets(record, (0.001, 1.0))
    for row in ("full", "LoRA"):
        rest = record[record["row"] != row]
        rest.attrs = record.attrs
        with pytest.raises(ValueError, match=f"lacks .'{row}'"):
            decision_card.budgets(rest)


def test_the_picture_has_its_size_whatever_is_written(record):
    card = decision_card.budgets(record, (0.01, 0.03, 0.05, 0.1, 0.5, 1.0), pd.DataFrame({"one": [1.2]}, ["VeRA"]))
    data = decision_card.png(decision_card.draw(card, ["A sentence. " * 12] * 2, decision_card.footers(record), "a source"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1080, 1920)


ROOM = pd.DataFrame({"task": ["code_lm", "cola", "sst2", "digits"], "can_rank": [True, False, True, True],
                     "low": [1.0, -0.1, 1.0, 1.0], "high": [2.0, 0.1, 2.0, 2.0]})


def of_digits(alone: str) -> list[str]:
    """What is said if b is behind LoRA in the smaller family, and among all pairs `alone`, with c behind in both or not run."""
    every = pd.DataFrame({"task": "digits", "row": ["b", "c"], "reference": "LoRA", "verdict": [alone, "worse"]})
    lora = pd.DataFrame({"task": "digits", "row": ["b", "c"], "verdict": "worse"})
    return [decision_card.notes(ROOM[ROOM["task"] == "digits"], every, lora, ("LoRA", *rows), ())[1] for rows in ("b", "bc")]


def test_notes_name_what_is_behind_and_what_cannot_rank():
    every = pd.DataFrame({"task": ["sst2", "digits"], "row": "b", "reference": ["a", "LoRA"], "verdict": "worse"})
    lora = pd.DataFrame({"task": ["sst2", "sst2", "digits"], "row": ["c", "d", "b"], "verdict": ["worse", "equivalent", "worse"]})
    found = decision_card.notes(ROOM, every, lora, ("a", "b"), ("c", "d"))
    assert found == ["SST-2: LoRA and 1 of its size: pairs told apart: 1.", "c: behind LoRA on SST-2.",
                     "d: equivalent to LoRA on SST-2.", "Digits: b behind LoRA.",
                     "CoLA: full fine-tuning is not told from the head alone."]
    for ends, how in (((0.001, 0.015), "too little ahead of"), ((-0.2, -0.1), "behind")):
        room = ROOM.copy()
        room.loc[room["task"] == "cola", ["low", "high"]] = ends
        said = decision_card.notes(room, every, lora, ("a", "b"), ("c", "d"))[-1]
        assert said == f"CoLA: full fine-tuning is {how} the head alone."


def test_what_holds_in_one_family_only_is_said_so():
    assert of_digits("worse") == ["Digits: b behind LoRA.", "Digits: b, c behind LoRA."]
    assert of_digits("not separable") == ["Digits: b behind LoRA, but not among all pairs.",
                                          "Digits: c behind LoRA; b too, but not among all pairs."]


def test_the_marks_are_claims():
    assert {one for ids in decision_card.CLAIMS.values() for one in ids} <= {one.id for one in claims.all_claims()}
