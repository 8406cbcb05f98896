"""The tables in docs/serving.md say what the code does: errors, statuses and limits."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastgen import errors
from fastgen.engine.request_limits import RequestLimits
from fastgen.errors import EngineError
from fastgen.frontends.engine_thread import QueueConfig
from fastgen.server.command import add_options
from fastgen.server.errors import ANSWERS, TYPES, ApiError, api_error
from fastgen.server.limits import ServerLimits

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def table(*header: str) -> list[list[str]]:
    """The cells of the table with this header, without the marks of code."""
    _, found, below = PAGE.partition(f"\n| {' | '.join(header)} |\n")
    assert found, header
    rows = re.match(r"\|[-|]+\|\n((?:\|.*\|\n)+)", below)
    assert rows
    cells = [[cell.strip(" `") for cell in row[1:-1].split("|")] for row in rows[1].splitlines()]
    assert all(len(row) == len(header) and all(row[2:]) for row in cells), "something is not told"
    return cells


def test_every_status_and_code_is_told_once() -> None:
    told = [
        (int(row[0]), row[1] or None) for row in table("status", "code", "meaning", "what to do")
    ]
    assert len(told) == len(set(told)) and set(told) == set(TYPES)


def test_every_answer_to_an_error_has_a_type() -> None:
    for kind in ANSWERS:
        answer = api_error(kind("why"))
        assert (answer.status, answer.code) == (ANSWERS[kind].status, ANSWERS[kind].code)
        assert answer.kind == TYPES[answer.status, answer.code]
    assert EngineError in ANSWERS, "the last resort"


def test_a_class_stands_before_those_that_it_derives_from() -> None:
    """The first that fits is taken."""
    kinds = list(ANSWERS)
    for at, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[at + 1 :])


def test_what_no_check_raised_is_no_callers_fault() -> None:
    for error in (ValueError("/secret"), TypeError("/secret"), OSError("/secret"), KeyError()):
        answer = api_error(error)
        assert (answer.status, answer.code) == (500, "internal_error")
        assert "secret" not in answer.message


def test_a_wrong_option_is_named_as_this_protocol_does() -> None:
    wrong = errors.OptionError("max_new_tokens must be 1", "max_new_tokens", "must be 1")
    assert api_error(wrong) == ApiError(400, "max_tokens: must be 1", "max_tokens")
    same = errors.OptionTypeError("top_p must be a number", "top_p", "must be a number")
    assert api_error(same) == ApiError(400, "top_p must be a number", "top_p")
    assert api_error(errors.OptionError("too many")) == ApiError(400, "too many")
    assert api_error(errors.OptionTypeError("unknown option", "\ud800")).param is None


def test_every_kind_of_engine_error_is_told() -> None:
    told = {(row[0], row[1]) for row in table("class", "code", "meaning")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert told == {
        (kind.__name__, kind.code)
        for kind in kinds
        if issubclass(kind, EngineError) and kind is not EngineError
    }


def test_every_limit_is_told_with_its_default_and_is_an_option() -> None:
    told = {row[0]: row[1].replace(",", "") for row in table("option", "default", "what it bounds")}
    queue = QueueConfig()
    wanted: dict[str, Any] = vars(ServerLimits()) | {
        field.name: getattr(queue, field.name)
        for field in fields(QueueConfig)
        if field.name != "fair_lock"
    }
    wanted |= {f"limit_{name}": bound for name, bound in vars(RequestLimits.for_serving()).items()}
    assert told == {
        f"--{name.replace('_', '-')}": "none"
        if bound is None
        else f"{bound:g}"
        if bound < 1e5
        else str(bound)
        for name, bound in wanted.items()
    }
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = vars(parser.parse_args([]))
    assert {name: options[name] for name in wanted} == wanted
