"""What the tests of claims on records have in common."""

import pytest

from deltaw import results


@pytest.fixture
def changed(request, monkeypatch):
    """`changed(table)` puts another table in a record's place, under the true one's manifest. What the claims kept of the true
    one, the test file's `CACHED`, is put out of sight until the test has ended."""
    cached, load = request.module.CACHED, results.load

    def change(table):
        for kept in cached:
            kept.cache_clear()

        def loaded(name):
            table.attrs = load(name).attrs
            return table

        monkeypatch.setattr(results, "load", loaded)

    yield change
    for kept in cached:
        kept.cache_clear()
