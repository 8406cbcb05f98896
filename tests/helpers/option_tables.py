"""The tables of options in docs/sampling.md, made from the table in fastgen.sampling.options."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.sampling.options import FILTERS, PROCESSORS, Option


def as_tables() -> tuple[str, str]:
    """What changes logits, and what may be drawn: Markdown, as it stands on the page."""
    return _table("what it does", PROCESSORS), _table("what it keeps", FILTERS)


def _table(does: str, options: Sequence[Option]) -> str:
    lines = [f"| option | default | {does} |", "|---|---|---|"]
    for option in options:
        form = f"`{option.form or option.name}`"
        lines.append(f"| {form} | {_default(option)} | {option.meaning} |")
    return "\n".join(lines)


def _default(option: Option) -> str:
    if option.default == ():
        return "`{}`" if "{" in option.form else "`()`"
    return "None" if option.default is None else f"{option.default:g}"
