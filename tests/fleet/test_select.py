"""Selections of disks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.selecting import Facts, selects
from vmconv.errors import UsageError
from vmconv_fleet.catalogue.selection import DISKS, MAX_DEPTH, MAX_LENGTH, parse

DISK: Facts = {
    "id": "4409b271a84a472e",
    "node": ("n02", "4169b0cdc1f83cff816e0d261979ae35"),
    "datastore": "prod",
    "name": "web servers/Web 1.vmdk",
    "format": "vmdk",
    "identity": "",
    "size": 10 << 30,
    "actual-size": 3 << 30,
    "depth": 1,
    "in-use": True,
    "problem": False,
}


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("format=vmdk", True),
        ("format=VMDK", True),
        ("format!=vmdk", False),
        ("format=vmdk and node=n0*", True),
        ("format=vmdk and node=n1*", False),
        ("node=4169b0cdc1f83cff816e0d261979ae35", True),
        ("node=4169*", True),
        ("node!=n02", False),
        ("format=raw or format=vmdk", True),
        ("format=raw or format=qcow2 or datastore=prod", True),
        ("not format=raw", True),
        ("not (format=vmdk and datastore=prod)", False),
        ("not not in-use", True),
        ("in-use", True),
        ("in-use=no", False),
        ("in-use!=no", True),
        ("problem", False),
        ("size>=10G", True),
        ("size>10G", False),
        ("size = 10G", True),
        ("size<10T and actual-size>2G", True),
        ("depth>0", True),
        ("depth!=1", False),
        ("name='web servers/*'", True),
        ('name="web servers/web ?.vmdk"', True),
        ("name=*[12].vmdk", True),
        # "and" binds closer than "or".
        ("format=vmdk or format=raw and datastore=test", True),
        ("(format=vmdk or format=raw) and datastore=test", False),
        ("name=and or format=vmdk", True),
    ],
)
def test_a_disk_is_selected(text: str, selected: bool) -> None:
    assert selects(parse(text), DISK) is selected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the end where a field was expected"),
        ("colour=red", "'colour' at character 1 where a field was expected"),
        ("format=", "the end where a value after format= was expected"),
        ("format==vmdk", "'=' at character 8 where a value after format= was expected"),
        ("format", "format needs a value"),
        ("format<vmdk", "format has no order"),
        ("size>big", "'big' is not a size"),
        ("in-use=perhaps", "it is yes or no"),
        ("(format=vmdk", "the end where ')' was expected"),
        ("format=vmdk)", "')' at character 12 where 'and', 'or' or the end was expected"),
        ("format=vmdk node=n01", "'node' at character 13"),
        ("format=vmdk and", "the end where a field"),
        ("name='open", "is not valid here"),
        ("name=a!b", "is not valid here"),
    ],
)
def test_errors_state_their_position(text: str, said: str) -> None:
    with pytest.raises(UsageError, match="selection") as raised:
        parse(text)
    assert said in str(raised.value)


@pytest.mark.parametrize("text", ["(" * 1000, "not " * 900 + "in-use", "x" * (MAX_LENGTH + 1)])
def test_selections_past_a_limit_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"deeper|characters"):
        parse(text)


def test_nesting_is_possible_up_to_the_limit() -> None:
    depth = MAX_DEPTH - 1
    assert selects(parse("(" * depth + "in-use" + ")" * depth), DISK)


words = st.sampled_from(["and", "or", "not", "(", ")", "=", "!=", ">", "vmdk", "10G", "'a b'", *DISKS.meanings])


@given(st.lists(words, max_size=30))
def test_any_text_is_a_selection_or_a_usage_error(parts: list[str]) -> None:
    try:
        selection = parse(" ".join(parts))
    except UsageError:
        return
    assert selects(selection, DISK) in (True, False)


@given(st.sampled_from(["format=vmdk", "in-use", "size>1G", "depth=0", "node=n9"]), st.sampled_from(["and", "or"]))
def test_not_turns_a_selection_around(term: str, word: str) -> None:
    both = f"{term} {word} problem"
    assert selects(parse(f"not ({both})"), DISK) is not selects(parse(both), DISK)
