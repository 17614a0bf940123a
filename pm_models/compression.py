"""How a model is compressed, as one value: the plan and the options of :func:`pm_models.compress`."""

import os
from dataclasses import MISSING, dataclass, fields

from .adaptive_plan import AdaptivePlan
from .plan import CompressionPlan, reading_plan

TRAIN_MATRICES = ("support", "dense", None)
MERGE_SITES = ("block", "attention")
SHORTCUTS = ("pruned", "all")


@dataclass(frozen=True)
class Compression:
    """A plan and the options it is carried out with; :func:`pm_models.compress` explains them.

    Raises:
        TypeError: ``plan`` is not a plan.
        ValueError: an option has none of its permitted values.
    """

    plan: CompressionPlan | AdaptivePlan
    train_matrices: str | None = "support"
    size_bias: bool = False
    merge_site: str = "block"
    shortcut: str = "pruned"

    def __post_init__(self) -> None:
        if not isinstance(self.plan, CompressionPlan | AdaptivePlan):
            kind = type(self.plan).__name__
            raise TypeError(f"plan must be a CompressionPlan or an AdaptivePlan, got {kind}")
        for name, choices in (
            ("train_matrices", TRAIN_MATRICES),
            ("merge_site", MERGE_SITES),
            ("shortcut", SHORTCUTS),
        ):
            value = getattr(self, name)
            if value not in choices:
                *others, last = map(repr, choices)
                raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
        for field in fields(self) if self.adaptive else ():
            if field.default is not MISSING and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} must be {field.default!r} with an AdaptivePlan, which has no matrices and always "
                    f"weighs tokens by their sizes, got {getattr(self, field.name)!r}"
                )

    @property
    def adaptive(self) -> bool:
        """Whether tokens merge by what is in each image rather than by static matrices."""
        return isinstance(self.plan, AdaptivePlan)

    def to_dict(self) -> dict[str, object]:
        """The arguments of :func:`pm_models.compress` as JSON values."""
        return {name: getattr(self, name) for name in OPTIONS} | {"plan": self.plan.to_dict()}


OPTIONS = tuple(field.name for field in fields(Compression))


def plan_from(source: CompressionPlan | AdaptivePlan | dict | str | os.PathLike) -> CompressionPlan | AdaptivePlan:
    """A plan of either kind: as given, or from its ``to_dict`` or the file that it was saved to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the dict or the file does not hold a plan; the message names the file and the field.
    """
    if isinstance(source, str | os.PathLike):
        with reading_plan(source) as values:
            return plan_from(values if isinstance(values, dict) else {})
    if isinstance(source, dict):
        return (AdaptivePlan if AdaptivePlan.describes(source) else CompressionPlan).from_dict(source)
    return source
