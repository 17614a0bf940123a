"""Tables for the terminal."""

from collections.abc import Mapping

from tabulate import tabulate


def compare(rows: Mapping[str, Mapping]) -> str:
    """A table with one model per line: accuracy (``top1`` or ``miou``), GMACs, throughput and tokens per block.

    Throughput is also given as a multiple of the first model's.
    """
    first = next(iter(rows.values()))
    quality, heading = ("miou", "mIoU") if "miou" in first else ("top1", "top-1")
    table: list[tuple[str, ...]] = [("model", heading, "GMACs", "images/s", "speed", "tokens per block")]
    for name, row in rows.items():
        speed = row["images_per_second"]
        cells = (f"{row[quality]:.2f}%", f"{row['gmacs']:.4g}", f"{speed:.0f}")
        table.append((name, *cells, f"{speed / first['images_per_second']:.2f}x", tokens_per_block(row["tokens"])))
    return format_table(table)


def tokens_per_block(tokens: list[int]) -> str:
    """``65 x 6`` where all blocks have the same number, otherwise the number of each."""
    return f"{tokens[0]} x {len(tokens)}" if len(set(tokens)) == 1 else " ".join(map(str, tokens))


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Align rows of cells under the first one, the heading: outer columns flush left, inner ones flush right."""
    aligned = ("left", *("right",) * (len(rows[0]) - 2), "left")
    return tabulate(rows, headers="firstrow", tablefmt="simple", colalign=aligned, disable_numparse=True)
