"""Mistakes made on purpose: the simulator, or the test that is named, has to find each of them."""

from __future__ import annotations

import pytest

from fleet import mutations_merged  # noqa: F401 - registers its own
from fleet.mutations import Mutation, found_by
from fleet.mutations_kept import MUTATIONS


def test_there_are_enough_mistakes() -> None:
    assert len({mistake.name for mistake in MUTATIONS}) == len(MUTATIONS) >= 12


@pytest.mark.parametrize("mistake", MUTATIONS, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found(mistake: Mutation, capsys: pytest.CaptureFixture[str]) -> None:
    how = found_by(mistake)
    assert how is not None, mistake.name
    with capsys.disabled():
        print(f"\n{mistake.name}: {how[:160]}", end="")
