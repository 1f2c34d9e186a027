"""Versions of dictionaries: every write is noticed, whatever is read is not."""

from __future__ import annotations

import sys
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.tensors.kernels.readings import Contents, contents_of

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python keeps no versions of dictionaries there")

KEYS = st.sampled_from("abcd")
WRITES = {
    "set": lambda d, key: d.__setitem__(key, object()),
    "update": lambda d, key: d.update({key: object()}),
    "merge": lambda d, key: d.__ior__({key: object()}),
    "pop": lambda d, key: d.pop(key, None),
    "default": lambda d, key: d.setdefault(key, object()),
    "last": lambda d, key: d.popitem() if d else None,
    "clear": lambda d, key: d.clear(),
}
READS = (len, list, str, lambda d: d.get("a"), lambda d: [*d.items()], dict, lambda d: d == {"a": 1})


def _confirmed(dicts):
    contents = Contents(dicts)
    assert not contents.same()  # nobody has looked yet
    contents.confirm()
    return contents


@pytest.mark.property
@given(
    st.lists(st.dictionaries(KEYS, st.integers()), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(sorted(WRITES)), KEYS), max_size=12),
)
def test_a_dictionary_that_holds_something_else_is_noticed(dicts, writes):
    contents = _confirmed(dicts)
    for which, name, key in writes:
        written = dicts[which % len(dicts)]
        before = dict(written)
        WRITES[name](written, key)
        if written != before or [*written] != [*before]:
            assert not contents.same()
            assert not contents.same()  # until somebody has looked
            contents.confirm()
        contents.same()
        contents.confirm()
        assert contents.same()


@pytest.mark.property
@given(st.lists(st.dictionaries(KEYS, st.integers()), min_size=1, max_size=9))
def test_reading_changes_nothing(dicts):
    contents = _confirmed(dicts)
    for read in READS:
        for one in dicts:
            read(one)
        assert contents.same()


@pytest.mark.parametrize("dicts", [[], [OrderedDict(a=1)], [{}, OrderedDict()], [[1]]])
def test_what_is_no_plain_dictionary_has_no_version(dicts):
    assert contents_of(dicts) is None
