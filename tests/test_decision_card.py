"""The decision card, on a table of known answers."""

import struct

import numpy as np
import pandas as pd
import pytest

from deltaw import claims, decision_card
from deltaw.results import Manifest

SETTINGS = {"rank": 8, "xs": 16, "vera": 256, "code_steps": 125}
ROWS = {"head only": (0, 3.0), "VeRA": (5, 2.6), "twin": (5, 2.601), "LoRA": (50, 2.2), "LoRA 4": (25, 2.4), "full": (1000, 2.0)}


@pytest.fixture
def record():
    random, found = np.random.default_rng(0), []
    order = random.normal(0, 0.01, 10)  # seeds move all rows alike
    for row, (parameters, loss) in ROWS.items():
        known = {"task": "code_lm", "row": row, "parameters": parameters, "with_head": parameters or 4_194_304, "scale": "s", "stopped": ""}
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
    assert card["equivalent"].tolist() == [("twin, rank 8",), (), ()] and card["unresolved"].tolist() == [(), (), ()]
    assert card["lowest"].between(0.0013, 0.0015).all() and card["highest"].between(0.0027, 0.0029).all()
    assert (card["unit"] == 0.002).all() and set(card["whose"]) == {"LoRA 8's"}
    over = decision_card.budgets(record, (0.01, 0.03, 1.0), base=3.5)["gap"].tolist()
    assert over == pytest.approx([0.6, 1.1 / 1.5, 1.0], abs=2e-3)
    times = pd.DataFrame({"one": [1.2, 1.3, 1.5], "other": [2.2, 2.3, 2.5]}, ["VeRA", "twin", "full"])
    card = decision_card.budgets(record, (0.01, 0.03, 1.0), times)
    assert card["time"].tolist() == [(1.2, 2.2), (), (1.5, 2.5)] and card["equivalent"][0] == ("twin, rank 8 (step 1.3 / 2.3 ×)",)


def test_footers_say_what_zero_is_and_what_was_not_tried(record):
    first, second, third = decision_card.footers(record)
    assert first == "Bars: 100 % is full fine-tuning; 0 % is the output matrix trained alone (4.2 M numbers), not the untrained base."
    assert second == "Ranks run: LoRA 4, 8; every other row at one only." and "125 updates" in third
    assert decision_card.footers(record, 3.5)[0].endswith("0 % is the untrained base.")
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


def test_notes_name_what_is_behind_and_what_cannot_rank():
    room = pd.DataFrame({"task": ["code_lm", "cola", "sst2", "digits"], "can_rank": [True, False, True, True]})
    every = pd.DataFrame({"task": ["sst2"], "row": ["b"], "reference": ["a"], "verdict": ["worse"]})
    lora = pd.DataFrame({"task": ["sst2", "sst2", "digits"], "row": ["c", "d", "b"], "verdict": ["worse", "equivalent", "worse"]})
    found = decision_card.notes(room, every, lora, ("a", "b"), ("c", "d"))
    assert found == ["SST-2: of LoRA and 1 variants of its size 1 pairs are told apart.", "c: behind LoRA on SST-2.",
                     "d: equivalent to LoRA on SST-2.", "Digits, a small network: b behind LoRA.",
                     "CoLA cannot rank: too little is learnt."]


def test_the_marks_are_claims():
    assert {one for ids in decision_card.CLAIMS.values() for one in ids} <= {one.id for one in claims.all_claims()}
