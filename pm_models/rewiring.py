"""timm's own forwards, run with a part of the module replaced: none of them is copied."""

from torch import nn


class Rewired:
    """A module as one of its class's methods sees it, with other attributes: everything else is the module's.

    ``Block.forward(Rewired(block, attn=function), x)`` runs timm's forward with ``function`` in the place of
    ``block.attn``; the block itself does not change.
    """

    def __init__(self, module: nn.Module, **replaced: object) -> None:
        self._module = module
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)
