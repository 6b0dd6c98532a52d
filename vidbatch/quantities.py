"""Sizes, durations and rates as people write them in a job file, and their field types."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
                "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_bytes(value: Any) -> int:
    """`64MiB`, `2GB` or a plain number → bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if not match or match[2].lower() not in _UNITS_BYTES:
        raise ValueError(f"{value!r} is not a size such as 64MiB")
    return int(Fraction(match[1]) * _UNITS_BYTES[match[2].lower()])


def parse_duration_s(value: Any) -> float:
    """`15m`, `3d`, `90s` or a number of seconds → seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", str(value))
    if not match:
        raise ValueError(f"{value!r} is not a duration such as 15m or 3d")
    return float(Fraction(match[1]) * _UNITS_S[match[2] or "s"])


def parse_rate(value: Any) -> Fraction:
    """A rate from the text of the YAML file: 2, 0.5, 29.97 or "30000/1001" → Fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise ValueError(f"{value!r} is not a rate such as 2, 0.5 or 30000/1001")
    try:  # repr of a float is the shortest text that reads back: what the user wrote
        return Fraction(repr(value) if isinstance(value, float) else value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value!r} is not a rate such as 2, 0.5 or 30000/1001") from error


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_duration_s)]
Rate = Annotated[Fraction, BeforeValidator(parse_rate)]
