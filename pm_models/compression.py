"""How a model is compressed, as one value: the plan and the options of :func:`pm_models.compress`."""

from dataclasses import dataclass, fields

from .plan import CompressionPlan

TRAIN_MATRICES = ("support", "dense", None)
MERGE_SITES = ("block", "attention")
SHORTCUTS = ("pruned", "all")


@dataclass(frozen=True)
class Compression:
    """A plan, and how it is carried out; see :func:`pm_models.compress` for every option.

    Raises:
        TypeError: ``plan`` is no plan.
        ValueError: an option is none of its choices.
    """

    plan: CompressionPlan
    train_matrices: str | None = "support"
    size_bias: bool = False
    merge_site: str = "block"
    shortcut: str = "pruned"

    def __post_init__(self) -> None:
        if not isinstance(self.plan, CompressionPlan):
            raise TypeError(f"plan must be a CompressionPlan, got {type(self.plan).__name__}")
        for name, choices in (
            ("train_matrices", TRAIN_MATRICES),
            ("merge_site", MERGE_SITES),
            ("shortcut", SHORTCUTS),
        ):
            value = getattr(self, name)
            if value not in choices:
                *others, last = map(repr, choices)
                raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")

    def to_dict(self) -> dict[str, object]:
        """The arguments of :func:`pm_models.compress`, as JSON has them."""
        return {name: getattr(self, name) for name in OPTIONS} | {"plan": self.plan.to_dict()}


OPTIONS = tuple(field.name for field in fields(Compression))
