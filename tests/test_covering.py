"""Coverage by pairs: what a quick run tries, and that ``-m fuzz`` tries the rest."""

import itertools

from covering import pairs


def test_any_two_values_meet_and_no_case_is_lost():
    factors = {"tokens": (1, 2, 3), "width": (16, 32), "gate": (False, True), "kind": ("sparse", "dense")}
    names, cases = pairs({"width": (96,)}, **factors)
    few = [case.values for case in cases if not case.marks]
    assert names == list(factors)
    assert len(few) == 6
    for first, second in itertools.combinations(range(4), 2):
        values = list(factors.values())
        assert {(case[first], case[second]) for case in few} == set(itertools.product(values[first], values[second]))
    every = set(itertools.product((1, 2, 3), (16, 32, 96), (False, True), ("sparse", "dense")))
    assert {case.values for case in cases} == every
    assert len(cases) == len(every)
    assert {mark.name for case in cases if case.marks for mark in case.marks} == {"fuzz", "exhaustive"}
    assert [case.id for case in cases[:2]] == ["N1-d16-sparse", "N1-d32-gate-dense"]
    assert [case.id for case in pairs(**factors)[1]] == [case.id for case in pairs(**factors)[1]]
