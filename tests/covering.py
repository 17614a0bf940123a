"""Parameters that cover by pairs: a quick run tries every two values together, ``pytest -m fuzz`` all of them."""

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch

REST = (pytest.mark.fuzz, pytest.mark.exhaustive)
_LETTERS = {"batch": "B", "heads": "H", "tokens": "N", "merged": "M", "rows": "M", "width": "d", "family": "sm"}


def pairs(more: Mapping[str, Sequence] | None = None, /, **factors: Sequence) -> tuple[list[str], list]:
    """Arguments of ``pytest.mark.parametrize``: few cases, in which any two values of two factors meet.

    The other cases of the product are for ``-m fuzz``, and with them those of the values in ``more`` of a factor.
    """
    product = list(itertools.product(*factors.values()))
    met = {case: set(itertools.combinations(enumerate(case), 2)) for case in product}
    missing, few = set().union(*met.values()), []
    while missing:
        case = max(product, key=lambda case: len(met[case] & missing))  # the first of them, the same every time
        missing.difference_update(met[case])
        few.append(case)
    every = itertools.product(*([*values, *(more or {}).get(name, ())] for name, values in factors.items()))
    rest = [case for case in every if case not in few]
    return list(factors), [
        pytest.param(*case, id="-".join(filter(None, map(_label, factors, case))), marks=marks)
        for cases, marks in ((few, ()), (rest, REST))
        for case in cases
    ]


def _label(name: str, value: object) -> str:
    """Such as N197 for 197 tokens; an option by its name where it is on."""
    if isinstance(value, bool) or value is None:
        return name if value else ""
    if isinstance(value, tuple):  # a named one
        return "-".join(filter(None, map(_label, value._fields, value)))
    if isinstance(value, int):
        return f"{_LETTERS.get(name, name)}{value}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
