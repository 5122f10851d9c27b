"""A record that says otherwise, or a wrong number, makes a claim about it fail."""

import pytest

from deltaw.claims import ClaimFailed
from deltaw.claims import appendix_record as rec

# The helpers


def test_a_pair_is_looked_up_with_its_control():
    pair = ("Adam", "orthogonal", "fixed")
    assert rec.control(pair) == ("Adam", "orthogonal", "control")
    for precision, seeds in (("float64", 3), ("float32", 2)):
        own, other = (rec.distances(one, precision) for one in (pair, rec.control(pair)))
        assert own.shape == other.shape == (len(own), seeds) and own.index[-1] == 500
        assert (own.loc[500] > 100 * other.loc[500]).all()
        assert own.loc[500].median() == rec.verdicts(precision).loc[pair, "step 500"]


def test_the_tables_have_every_pair():
    for precision in ("float64", "float32"):
        assert len(rec.verdicts(precision)) == 60 and len(rec.ends(precision)) == 60 + 36 and len(rec.growth(precision)) == 18 + 36
    assert list(rec.hypotheses().index) == ["1", "2", "3", "4", "4b"]


# What a claim does when it is wrong

WRONG = [
    pytest.param(rec.theorem, (17,), id="theorem-one-less"),
    pytest.param(rec.parting, (("SGD, decay",),), id="parting-not-adamw"),
    pytest.param(rec.parting, (("SGD, decay", "Adam"),), id="parting-adam"),
    pytest.param(rec.rounding_grows, (0.1,), id="growth-a-narrower-band"),
    pytest.param(rec.in_float32, (60,), id="float32-as-predicted"),
    pytest.param(rec.controls_moved, (0.01,), id="control-nearer"),
    pytest.param(rec.sign_descent, ("Adam",), id="sign-adam"),
    pytest.param(rec.predictions, (-0.001,), id="predictions-fewer-than-the-control"),
    pytest.param(rec.outcome, (16,), id="outcome-at-most-sixteen"),
    pytest.param(rec.learns, (0.1,), id="learns-more"),
    pytest.param(rec.rates, ((),), id="rates-all-inside"),
    pytest.param(rec.rates, (("Muon", "SGD"),), id="rates-another-at-its-edge"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


# What a claim does when the record is another, by the fixture `changed`

CACHED = (rec.record, rec.hypotheses, rec._analysed)


def where(precision, *pair):
    table = rec.record()
    return (table["precision"] == precision) & (table[rec.PAIR] == list(pair)).all(axis=1)


def test_one_pair_of_sixty_is_found(changed):
    """Adam sees a signed permutation, in one seed and at one checkpoint."""
    table, at = rec.record().copy(), where("float64", "Adam", "signed permutation", "fixed")
    table.loc[at & (table["seed"] == 1) & (table["step"] == 300), "distance"] = 1e-9
    changed(table)
    with pytest.raises(ClaimFailed, match="59 of 60"):
        rec.theorem()


def test_a_pair_that_parts_later_is_found(changed):
    table, at = rec.record().copy(), where("float64", "Adam", "orthogonal", "fixed")
    table.loc[at & (table["step"] == 2), "distance"] = 1e-16
    changed(table)
    with pytest.raises(ClaimFailed, match="41 of 42"):
        rec.parting()


def test_rounding_that_grows_faster_is_found(changed):
    table, at = rec.record().copy(), where("float64", "Muon", "orthogonal", "fixed")
    table.loc[at, "distance"] *= 10 ** (table.loc[at, "step"].astype(float) / 100)
    changed(table)
    with pytest.raises(ClaimFailed, match="17 of 18"):
        rec.rounding_grows()


def test_better_controls_are_found(changed):
    """As if float32's controls were as small, in units of its rounding, as float64's: then the verdicts would be the same."""
    table = rec.record().copy()
    small, large = ((table["kind"] == "control") & (table["precision"] == each) for each in ("float64", "float32"))
    keys = ["seed", "optimizer", "mixer", "step"]
    other = table[small].set_index(keys)["distance"] * 2**29
    table.loc[large, "distance"] = other.reindex(table[large].set_index(keys).index).to_numpy()
    changed(table)
    for check in (rec.in_float32, rec.sign_descent):
        with pytest.raises(ClaimFailed):
            check()


def test_other_predictions_are_found(changed):
    table, at = rec.record().copy(), where("float32", "Muon", "orthogonal", "fixed")
    table.loc[at & (table["step"] == 500), "differ"] = 6
    double = where("float64", "Muon", "orthogonal", "fixed")
    table.loc[double & (table["step"] == 500), "differ"] = 1
    changed(table)
    for check in (rec.predictions, rec.sign_descent, rec.outcome):
        with pytest.raises(ClaimFailed):
            check()


def test_a_run_that_does_not_learn_is_found(changed):
    table, at = rec.record().copy(), where("float64", "Muon", "Kaiming", "trained")
    table.loc[at & (table["step"] == 500) & (table["seed"] == 2), "score"] = 0.8
    changed(table)
    with pytest.raises(ClaimFailed, match="1 do not"):
        rec.learns()
