"""That a wrong number makes each claim of chapter 8 fail, and its helpers on tables of known answers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from deltaw import claims, decision_card
from deltaw.claims import ClaimFailed, comparison, comparison_card, comparison_rates, comparison_tasks

WRONG = [
    (comparison.tuned, {"allowed": 1}), (comparison.room, {"without": "sst2"}), (comparison.half_widths, {"bar": 0.02}),
    (comparison.half_widths_text, {"bar": 0.005}), (comparison.bridge, {"share": 0.001}),
    (comparison.equivalent, {"beyond": ("Init[B]", "PiSSA")}),
    (comparison.dora, {"row": "full"}), (comparison.orthogonal, {"row": "DoRA"}), (comparison.mixer, {"row": "DoRA"}),
    (comparison.mixer_start, {"row": "MoSLoRA, evened"}), (comparison.mixer_evened, {"row": "rsLoRA 8"}),
    (comparison.lora_plus, {"row": "PiSSA"}), (comparison.pissa, {"row": "LoRA+"}), (comparison.init, {"row": "PiSSA"}),
    (comparison.init_variance, {"row": "LoRA 2"}), (comparison.full, {"row": "DoRA"}), (comparison.few, {"least": 0.3}),
    (comparison.head_last, {"other": "VeRA"}), (comparison.pairs, {"apart": 72}),
    (comparison_rates.grid, {"least": 0.001}), (comparison_rates.one_rate, {"rate": 0.00316}),
    (comparison_rates.rate_matters, {"row": "full"}), (comparison_rates.rank_first, {"row": "LoRA 4"}),
    (comparison_rates.dora_rank, {"most": 0.005}), (comparison_rates.dora_rs, {"row": "LoRA 1"}),
    (comparison_rates.rank_one, {"row": "DoRA 16"}), (comparison_rates.rank_full, {"row": "rsLoRA 64"}),
    (comparison_rates.rs_equivalent, {"upto": 64}), (comparison_rates.rs_rates, {"spread": 3.0}),
    (comparison_rates.one_knob, {"right": 1.1}), (comparison_tasks.text, {"same": 27}), (comparison_tasks.digits, {"row": "VeRA"}),
    (comparison_tasks.text_few, {"row": "LoRA-XS"}), (comparison_tasks.text_xs, {"row": "VeRA"}),
    (comparison_tasks.longer, {"turned": 2}), (comparison_tasks.longer_rank, {"row": "DoRA r8"}),
    (comparison_tasks.forgotten, {"rate": 0.01}), (comparison_card.card_gap, {"ends": (0.5, 1.0)}),
    (comparison_card.card_rates, {"ends": (1.6, 1.7)}), (comparison_card.card_choice, {"column": "rate"}),
    (comparison_card.card_cost, {"times": (1.0, 2.0)})]  # fmt: skip


@pytest.mark.parametrize(("check", "wrong"), WRONG, ids=lambda each: getattr(each, "__name__", ""))
def test_a_wrong_statement_fails(check, wrong):
    assert check()
    with pytest.raises(ClaimFailed):
        check(**wrong)


def test_every_claim_is_checked_here():
    known = {one.check for one in claims.all_claims() if one.id.startswith("comparison-")}
    assert known == {check for check, _ in WRONG}


def test_text_fails_if_a_pair_is_told_apart(monkeypatch):
    table = comparison.analysis("every_pair").copy()
    of = (table["task"] == "sst2") & (table["row"] == "DoRA") & (table["reference"] == "LoRA")
    assert of.sum() == 1
    table.loc[of, "verdict"] = "better"
    monkeypatch.setattr(comparison_tasks, "analysis", lambda name: table)
    with pytest.raises(ClaimFailed, match="DoRA"):
        comparison_tasks.text()


def test_longer_fails_if_the_order_is_another(monkeypatch):
    table = comparison_tasks.adapted().copy()
    of = (table["size"] == "10m") & (table["stage"] == "long") & (table["method"] == "DoRA r8")
    assert of.sum() == 1
    table.loc[of, "target"] = 2.4
    monkeypatch.setattr(comparison_tasks, "adapted", lambda: table)
    with pytest.raises(ClaimFailed, match="10m"):
        comparison_tasks.longer()


def test_only_what_was_fixed_before_is_a_new_pair():
    assert comparison.new_pair("DoRA 16", "LoRA 16", "better").difference < 0
    with pytest.raises(ClaimFailed, match="rsLoRA 16"):
        comparison.new_pair("DoRA 16", "rsLoRA 16", "better")


def test_the_two_records_are_one_on_code():
    rows = comparison.all_rows()
    assert len(rows) == 28 and rows.index.is_unique and not {"frozen base"} & set(rows.index)
    assert (rows.loc[comparison.on("code_lm", "reported").index, "report"] == comparison.on("code_lm", "reported").report).all()


def test_the_lowest_point_between_rates(monkeypatch):
    rates = 0.001 * 2 ** (np.arange(-3, 4) / 2)
    best = 0.001 * 2**0.125
    table = pd.DataFrame([
        {"task": "code_lm", "row": "a", "phase": "fine", "rate": rate, "seed": seed, "stopped": "",
         "tune/loss": 2 + np.log(rate / best) ** 2} for rate in rates for seed in range(3)])
    monkeypatch.setattr(comparison_rates, "all_code", lambda: table)
    assert comparison_rates.between_rates()["a"] == pytest.approx(np.log(2**0.125) ** 2)


def test_the_card_of_the_records_has_room_for_what_it_says():
    room, every, against = (comparison.analysis(name) for name in ("headroom", "every_pair", "against_lora"))
    sentences = decision_card.notes(room, every, against, comparison.SIZED, comparison.FEW)
    footer = decision_card.footers(comparison.all_code(), comparison.frozen(), comparison_card.steps())
    figure = decision_card.draw(comparison_card.card(), sentences, footer, "deltaw · records 01234567, 01234567, 01234567")
    figure.canvas.draw()
    texts = figure.axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    heights = sorted({round(text.get_position()[1], 3) for text in texts})
    plt.close(figure)
    assert max(box.x1 for box in boxes) <= 1080 - 30 and min(np.diff(heights)) >= 0.19 and max(heights) < 12.8
    assert min(text.get_fontsize() for text in texts) >= 12
    lines = {text.get_position()[1]: [] for text in texts}
    for text, box in zip(texts, boxes):
        lines[text.get_position()[1]].append((box.x0, box.x1))
    assert all(b[0] - a[1] > 15 for own in lines.values() for a, b in zip(sorted(own), sorted(own)[1:]))
    assert "rsLoRA, rank 64, s = 1$^a$" in [text.get_text() for text in texts]
    sentence = heights[max(i for i, height in enumerate(heights) if height in {round(t.get_position()[1], 3) for t in texts
                                                                              if t.get_fontsize() == 13.5})]
    footers = [height for height in heights if height > sentence]
    assert footers[0] - sentence > 0.3  # what is said of the tasks does not run into what the numbers are of


@pytest.mark.parametrize(("column", "line", "other", "match"), [
    ("scale", 5, "8", "rsLoRA 64"), ("worse", 0, (), "up to 0.25 %"), ("worse", 1, (("LoRA-XS, rank 16", 0.25),), "up to 0.5 %"),
    ("equivalent", 4, ("rsLoRA, rank 16, s = 1 (step 1.1 / 1.3 ×)",), "s = 2"), ("unresolved", 3, ("LoRA, rank 8, s = 1",), "up to 3 %"),
    ("others", 2, 5, "up to 1.5 %"), ("alpha", 5, 8.0, "rsLoRA 64")])  # fmt: skip
def test_the_card_claim_fails_if_a_line_says_another_thing(monkeypatch, column, line, other, match):
    table = comparison_card.card().copy()
    table[column] = [other if i == line else each for i, each in enumerate(table[column])]
    monkeypatch.setattr(comparison_card, "card", lambda: table)
    with pytest.raises(ClaimFailed, match=match):
        comparison_card.card_choice()


def test_the_card_claim_fails_if_the_head_reaches_another_share():
    with pytest.raises(ClaimFailed, match="head only"):
        comparison_card.card_gap(head=0.48)


def test_the_card_says_what_the_records_do():
    room, every, against = (comparison.analysis(name) for name in ("headroom", "every_pair", "against_lora"))
    sentences = decision_card.notes(room, every, against, comparison.SIZED, comparison.FEW)
    assert "Digits: DoRA(MoSLoRA) behind LoRA; DoRA too, but not among all pairs." in sentences
    assert "CoLA: full fine-tuning is not told from the head alone." in sentences
    footer = decision_card.footers(comparison.all_code(), comparison.frozen(), comparison_card.steps())
    assert footer[0].endswith("the output matrix trained alone (4.2 M numbers) reaches 50 %.")
    assert any("DoRA below rank 8" in one for one in footer)
