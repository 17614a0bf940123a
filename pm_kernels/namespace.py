"""Where the operators are registered: under the package's name, so that copies with other names can be loaded too."""

import torch

NAMESPACE = __package__.replace(".", "_")
OPERATORS = getattr(torch.ops, NAMESPACE)
