"""The registry, and every claim of the book."""

import pytest

from deltaw import claims


@pytest.mark.parametrize("one", claims.all_claims(), ids=lambda one: one.id)
def test_every_claim_is_borne_out(one):
    evidence = one.check()
    assert isinstance(evidence, dict) and evidence


def test_the_table_has_them_all():
    table = claims.table()
    assert list(table.id) == [one.id for one in claims.all_claims()]
    assert set(table.scope) <= set(claims.SCOPES)
    for chapter in claims.CHAPTERS.values():
        assert len(claims.table(chapter)) == (table.chapter == chapter).sum()
    with pytest.raises(ValueError, match="not 'no such chapter'"):
        claims.table("no such chapter")


def test_the_listing_is_the_table_for_a_reader():
    rules = claims.listing("07_moslora_appendix", verdict="holds if")
    assert 0 < len(rules.chosen) < len(claims.listing("07_moslora_appendix").chosen)
    html = rules._repr_html_()
    for one in rules.chosen:
        assert f'href="07_moslora_appendix.html#claim-{one.id}"' in html and one.verdict in html
        assert one.says in repr(rules)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(id="Not An Id"), "not 'Not An Id'"),
        (dict(id="appendix-eq2"), "'appendix-eq2' already"),
        (dict(verdict="maybe"), "not 'maybe'"),
        (dict(scope="felt"), "not 'felt'"),
    ],
)
def test_a_claim_is_checked_when_made(changes, match):
    claims.all_claims()
    good = dict(id="new", says="…", source="this book", verdict="holds", scope="proved")
    with pytest.raises(ValueError, match=match):
        claims.claim(**good | changes)


def test_an_unknown_claim():
    with pytest.raises(KeyError, match="appendix-eq2"):
        claims.get("nope")
