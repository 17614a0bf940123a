"""The model card that is saved with a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compression import OPTIONS, Compression
from .measure import count_gmacs
from .models import compression_of, encoder_of, input_size, uncompressed
from .plan import CompressionPlan
from .tables import compare, tokens_per_block

_LIBRARY = "library_name: pm-vit"
_CARD = """\
---
pipeline_tag: {task}
{library}
tags:
{tags}
---

# {architecture}
{method}
| | |
|---|---|
{facts}

```python
from pm_models import load_pretrained

model = load_pretrained("this folder")
```
{results}"""
_METHOD = "\nIts tokens are compressed by [Prune and Merge](https://arxiv.org/abs/2503.23455).\n"
_ADAPTIVE = "\nBefore some of its blocks, the tokens that are most alike in each image merge into their means.\n"


def model_card(model: Any, architecture: str, results: Mapping[str, Mapping]) -> str:
    """Markdown with a header that model hubs read: plan, rates, GMACs, and results if there are any.

    Args:
        model: the saved model.
        architecture: its name in timm's registry.
        results: rows as :func:`pm_models.tables.compare` takes them; may be empty.
    """
    compression, size = compression_of(model), input_size(model)
    tags = ["timm", *([] if compression is None else ["token-compression"])]
    facts = {"Images": f"{size[1]} x {size[2]} pixels, {size[0]} channels", "Classes": str(model.num_classes)}
    if encoder_of(model) is model:
        task = "image-classification"
    else:
        task = "image-segmentation"
        facts["Decoder"] = str(model.options["decoder"]).replace("_", " ")
    facts["GMACs per image"] = f"{count_gmacs(model, size):.4g}"
    method = ""
    if compression is not None:
        method = _ADAPTIVE if compression.adaptive else _METHOD
        tags.append("token-merging" if compression.adaptive else "prune-and-merge")
        facts["GMACs before compression"] = f"{count_gmacs(uncompressed(model), size):.4g}"
        facts |= _facts(compression)
    return _CARD.format(
        task=task,
        library=_LIBRARY,
        tags="\n".join(f"- {tag}" for tag in (task, *tags)),
        architecture=architecture,
        method=method,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        results=f"\n## Results\n\n```\n{compare(results)}\n```\n" if results else "",
    )


def replaces_card(path: Path) -> bool:
    """Whether a card may be written to this path: not over a text that a person wrote."""
    return not path.is_file() or _LIBRARY in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _facts(compression: Compression) -> dict[str, str]:
    plan = compression.plan
    facts = {"Tokens before compression": str(plan.num_tokens), "Tokens per block": tokens_per_block(list(plan.tokens))}
    if not isinstance(plan, CompressionPlan):
        return facts
    stages = [(stage, stage.last - stage.first + 1) for stage in plan.stages]
    blocks = max(sum(count for _, count in stages), 1)
    kept = sum(stage.merged_patches * count for stage, count in stages) / blocks / plan.num_patches
    pruned = sum(stage.pruned_patches * count for stage, count in stages) / blocks / plan.num_patches
    return facts | {
        "Patches in compressed blocks": f"{kept:.1%} kept, {pruned:.1%} pruned, {1 - kept - pruned:.1%} merged",
        "Options": ", ".join(f"{name}={getattr(compression, name)!r}" for name in OPTIONS if name != "plan"),
    }
