"""The steps that a fast tier takes of a schedule."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_core.engine.tiers import FastSteps

RULES = st.builds(
    FastSteps,
    share=st.floats(min_value=0.3, max_value=1.0),
    least=st.integers(min_value=4, max_value=20),
    beginning=st.sampled_from([0.0, 0.1, 0.2]),
)


@given(rule=RULES, steps=st.integers(min_value=1, max_value=300), skipped=st.integers(min_value=0, max_value=300))
def test_steps_are_left_out_between_the_beginning_and_the_end(rule: FastSteps, steps: int, skipped: int) -> None:
    skipped = min(skipped, steps - 1)
    places = rule.places(steps, skipped)
    of_job = steps - skipped
    first = min(of_job, max(1, math.ceil(of_job * rule.beginning)))
    assert places[: skipped + first] == list(range(skipped + first))
    assert places[-1] == steps - 1
    assert len(places) - skipped == min(of_job, max(math.ceil(of_job * rule.share), rule.least))
    lengths = np.diff(places[skipped + first - 1 :])
    assert lengths.min(initial=1) >= 1
    assert np.ptp([*lengths, *lengths[:1]] or [0]) <= 1
    assert places == [*range(skipped), *(skipped + place for place in rule.places(of_job))]


def test_all_steps_are_taken_where_fewer_would_be_too_few() -> None:
    rule = FastSteps(share=0.5, least=8)
    assert rule.places(8) == list(range(8))
    assert rule.places(9) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert rule.places(20, skipped=12) == list(range(20))
