"""Tables for the terminal."""

from collections.abc import Mapping


def compare(rows: Mapping[str, Mapping]) -> str:
    """Accuracy (``top1`` or ``miou``), tokens per block, GMACs and throughput of models, one a line.

    Throughput stands beside the first model's.
    """
    first = next(iter(rows.values()))
    quality, heading = ("miou", "mIoU") if "miou" in first else ("top1", "top-1")
    table = [("model", heading, "GMACs", "images/s", "speed", "tokens per block")]
    for name, row in rows.items():
        table.append(
            (
                name,
                f"{row[quality]:.2f}%",
                f"{row['gmacs']:.4g}",
                f"{row['images_per_second']:.0f}",
                f"{row['images_per_second'] / first['images_per_second']:.2f}x",
                tokens_per_block(row["tokens"]),
            )
        )
    return format_table(table)


def tokens_per_block(tokens: list[int]) -> str:
    """``65 x 6`` where all are the same, else each."""
    return f"{tokens[0]} x {len(tokens)}" if len(set(tokens)) == 1 else " ".join(map(str, tokens))


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells in columns, the first row as the heading; first and last column flush left, others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
