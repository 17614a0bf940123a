"""What matching launches: one kernel, with a program for each image that runs at a time.

For B images of N tokens of width D, and P = N / 2 sources and as many targets, matching takes 2 P^2 D floating-point
operations in the first round and less in each later one, and has to read x and the update once, and to write about 30
bytes a token. For 256 images of DeiT-S (N = 197, D = 384, bfloat16) these are 1.9 GFLOP and 77 MB: 23 us by the memory
of an H100 (3.35 TB/s), 2 us by its matrix unit. The features, as many bytes as x has, are written once and read from
the L2 cache: once by the sources, and once by the targets for each block of SOURCES; and so are their means.
The ranks are N^2 comparisons, of which 8 warps make 256 at once.
"""

from . import matching_kernels as kernels
from .launches import Launch, Plan
from .matching import Match
from .mixing_plan import addressable, strides, whole_rows
from .runtime import Device

# Sources, targets, columns of features at a time, warps and stages, by the size of a feature: what spills no register.
_TILES = {
    80: {2: (128, 64, 32, 8, 3), 4: (32, 32, 32, 8, 2)},
    90: {2: (128, 64, 64, 8, 3), 4: (64, 64, 16, 8, 2)},
    100: {2: (128, 64, 64, 8, 3), 4: (64, 64, 32, 8, 2)},
}


def plan(device: Device, call: Match) -> Plan:
    """What matching launches to fill its results, with memory for what passes between its rounds."""
    results, scratch = call.results(), call.scratch(device)
    x, update = addressable(call.x), addressable(call.update)
    batch, tokens, width = x.shape
    weight, bias, eps = call.norm or (None, None, 0.0)
    features, numbers, indices = scratch
    sources, targets, chunk, warps, stages = _TILES[device.family][x.element_size()]
    arguments = {
        "p_x": x, "p_update": update, "p_weight": weight, "p_bias": bias, "p_sizes": call.sizes,
        **{f"p_{name}": tensor for name, tensor in results._asdict().items()}, "p_features": features,
        "p_numbers": numbers, "p_indices": indices, "batch": batch, "tokens": tokens, "left": call.tokens,
        "prefix": call.num_prefix_tokens, "rounds": call.rounds, "programs": len(features), "width": width,
        **strides("x", x), **strides("u", update), **strides("s", call.sizes), "eps": eps, "SOURCES": sources,
        "TARGETS": targets, "CHUNK": chunk, "STAGES": stages, "TOKENS": 64,
        "PRECISION": "tf32x3" if x.element_size() == 4 else "tf32", "ROOTS": call.root_sizes,
        **whole_rows(width, 4096 if x.element_size() == 2 else 2048, x, update),
    }  # fmt: skip
    return Plan([Launch(kernels.match, len(features), arguments, warps, stages)], results, scratch)
