"""The tables of `docs/peers.md`, made of `peers.json`: `python measurements/peers_page.py` renews them without measuring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TEXTS = ("set", "model", "ours", "less", "worst class")  # columns to the left
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def renew_page(page: Path, results: dict[str, Any]) -> None:
    """Put the tables of the results between the two marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    tables = "\n\n".join(write_tables(results))
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}")


def write_tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of the page: faces as they lie in the sets, scenes, paired differences, size and speed."""
    models: dict[str, dict[str, Any]] = results["models"]
    sets = sorted({name for model in models.values() for name, known in model.items() if isinstance(known, dict)})
    yield "## Faces as they lie in the sets"
    heads: tuple[str, ...] = ("accuracy", "macro-F1", "worst class", "ECE")
    yield write_table(("set", "model", *heads), _rows(models, sets, "crops"))
    yield "## Scenes, each model finding the faces itself"
    heads = ("scenes", "found", "right of all", "right of those found", "macro-F1", "worst class", "ECE")
    yield write_table(("set", "model", *heads), _rows(models, sets, "scenes"))
    yield "## Ours less theirs"
    heads = ("ours", "less", "set", "faces", "accuracy", "macro-F1")
    for where, title in (("crops", "as they lie in the sets"), ("scenes", "in scenes, faces that both find")):
        yield f"Faces {title}:"
        rows = [
            (
                one["model"],
                one["peer"],
                one["set"],
                f"{one['faces']:,}",
                _interval(one["accuracy"]),
                _interval(one["macro_f1"]),
            )
            for one in results["differences"]
            if one["where"] == where
        ]
        yield write_table(heads, rows)
    yield "## Size and speed"
    heads = ("model", "network, MB", "tower, MB", "as fetched, MB", "faces/s", "scenes/s")
    yield write_table(heads, [(name, *_costs(model, sets)) for name, model in models.items()])


def _rows(models: dict[str, dict[str, Any]], sets: Sequence[str], where: str) -> Iterator[Sequence[str]]:
    for name in sets:
        for model, known in models.items():
            if scores := known.get(name, {}).get(where):
                shares = (f"{scores[one]:.1f}" for one in ("found", "right_of_all"))
                found = (f"{scores['faces']}", *shares) if where == "scenes" else ()
                worst = f"{scores['worst']:.1f} {scores['worst_class']}"
                yield (
                    name,
                    model,
                    *found,
                    *(f"{scores[one]:.1f}" for one in ("accuracy", "macro_f1")),
                    worst,
                    f"{scores['ece']:.1f}",
                )


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")


def _costs(model: dict[str, Any], sets: Sequence[str]) -> Iterator[str]:
    for size in ("network_mb", "tower_mb", "fetched_mb"):
        yield f"{model[size]:.2f}" if size in model else "–"
    for where in ("crops", "scenes"):
        scores = [model[name][where] for name in sets if where in model.get(name, {})]
        rates = sorted({f"{one['faces_per_second']:.0f}" for one in scores}, key=float)
        yield " – ".join(rates[:1] + rates[1:][-1:]) or "–"


def write_table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown, numbers to the right."""
    lines = [heads, ["--" if head in TEXTS else "--:" for head in heads], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    here = Path(__file__).parent
    renew_page(here.parent / "docs" / "peers.md", json.loads((here / "peers.json").read_text()))
