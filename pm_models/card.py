"""The model card that stands beside a saved model."""

from collections.abc import Mapping
from pathlib import Path

from .measure import count_gmacs
from .report import compare, tokens_per_block
from .segmenter import Model, Segmenter, encoder_of
from .vision_transformer import Compressed

_LIBRARY = "library_name: pm-vit"
_PAPER = "[Prune and Merge](https://arxiv.org/abs/2503.23455)"


def model_card(model: Model, architecture: str, results: Mapping[str, Mapping]) -> str:
    """Markdown with a head that model hubs read: plan, rates, GMACs, and results where there are any.

    Args:
        model: what is saved.
        architecture: the name that it is made under.
        results: rows as :func:`pm_models.report.compare` takes them; may be empty.
    """
    encoder = encoder_of(model)
    task = "image-segmentation" if isinstance(model, Segmenter) else "image-classification"
    tags = [task, "timm", *(["token-compression", "prune-and-merge"] if isinstance(encoder, Compressed) else [])]
    size = (encoder.patch_embed.proj.in_channels, *encoder.patch_embed.img_size)
    facts = {"Images": f"{size[1]} x {size[2]} pixels, {size[0]} channels", "Classes": str(model.num_classes)}
    if isinstance(model, Segmenter):
        facts["Decoder"] = str(model.options["decoder"]).replace("_", " ")
    facts["GMACs per image"] = f"{count_gmacs(model, size):.4g}"
    if isinstance(encoder, Compressed):
        facts |= _compression(model, size)
    lines = [
        "---", f"pipeline_tag: {task}", _LIBRARY, "tags:", *(f"- {tag}" for tag in tags), "---", "",
        f"# {architecture}", "",
        *([f"Its tokens are compressed by {_PAPER}.", ""] if isinstance(encoder, Compressed) else []),
        "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()), "",
        "```python", "from pm_models import load_pretrained", "", 'model = load_pretrained("this folder")', "```", "",
    ]  # fmt: skip
    if results:
        lines += ["## Results", "", "```", compare(results), "```", ""]
    return "\n".join(lines)


def replaces_card(path: Path) -> bool:
    """Whether a card may be written there: not where a person wrote another text."""
    return not path.is_file() or _LIBRARY in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _compression(model: Model, size: tuple[int, int, int]) -> dict[str, str]:
    encoder = encoder_of(model)
    plan = encoder.plan
    stages = [(stage, stage.last - stage.first + 1) for stage in plan.stages]
    blocks = max(sum(count for _, count in stages), 1)
    kept = sum(stage.merged_patches * count for stage, count in stages) / blocks / plan.num_patches
    pruned = sum(stage.pruned_patches * count for stage, count in stages) / blocks / plan.num_patches
    options = {name: value for name, value in encoder.compression.to_dict().items() if name != "plan"}
    return {
        "GMACs before compression": f"{count_gmacs(model.uncompressed(), size):.4g}",
        "Tokens before compression": str(plan.num_tokens),
        "Tokens per block": tokens_per_block(list(plan.tokens)),
        "Patches in compressed blocks": f"{kept:.1%} kept, {pruned:.1%} pruned, {1 - kept - pruned:.1%} merged",
        "Options": ", ".join(f"{name}={value!r}" for name, value in options.items()),
    }
