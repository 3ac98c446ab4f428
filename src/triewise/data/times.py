"""One rule for the times of every reader: which unit a column is in, and what of it cannot be a time.

A column of numbers is in the unit in which most of its values lie between 1995 and 2100: seconds, milliseconds,
microseconds, nanoseconds, or a calendar date written as a number (20201231, 202012312359, 20201231235959). No number
is between these years in two of them. A value that is so in another unit only is taken for that. Where no value is,
the size of the largest decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.arrays import Bool, Int32, Int64

Numbers = NDArray[np.int64] | NDArray[np.float64]
FIRST, END = 788_918_400, 4_102_444_800  # Unix seconds of 1995 and of 2100
LARGEST = 10**11  # Unix seconds: the year 5138
NANOSECONDS = 10**9

# A time without a zone is UTC. The first form that reads the first cell is that of the column.
DATES = (
    "%+",
    "%Y-%m-%d",
    *(f"%Y-%m-%d{t}%H:%M:%S%.f{zone}" for zone in ("", "%#z") for t in " T"),
    *(f"%Y-%m-%d{t}%H:%M{zone}" for zone in ("", "%#z") for t in " T"),
    "%Y/%m/%d",
    *(f"%Y/%m/%d %H:%M{seconds}" for seconds in (":%S%.f", "")),
    "%d.%m.%Y",
    "%m %d, %Y",
    "%b %d, %Y",
)


@dataclass(frozen=True)
class Times:
    """A column of times; R of them.

    Attributes:
        second: Unix seconds, int64 (R,).
        nanosecond: Of that second, int32 (R,); None where all are whole seconds.
        bad: Whether a value is no time of the years 1970 to 5138, bool (R,).
        units: How many values were in another unit than seconds, by its name.
        fractions: How many had a fraction of a second that was written as one.
    """

    second: Int64
    nanosecond: Int32 | None
    bad: Bool
    units: dict[str, int]
    fractions: int


def _divided(scale: int) -> Callable[[Numbers], tuple[Int64, Int64, Bool]]:
    """Seconds, nanoseconds, and whether it is a time, of numbers of which ``scale`` are a second."""

    def read(value: Numbers) -> tuple[Int64, Int64, Bool]:
        if value.dtype == np.int64:
            good = np.ones(len(value), dtype=bool)
            if scale == 1:
                return value.astype(np.int64, copy=False), np.zeros((), dtype=np.int64), good
            second, rest = np.divmod(value, scale)
            return second, rest * (NANOSECONDS // scale), good
        good = np.isfinite(value) & (np.abs(value) < 9e18)
        whole = np.where(good, value, 0.0)
        second = np.floor(whole / scale)
        micro = np.rint((whole / scale - second) * 1e6).astype(
            np.int64
        )  # digits beyond are noise of the float
        return second.astype(np.int64) + micro // 10**6, micro % 10**6 * 1000, good

    return read


def _calendar(time_of_day: int) -> Callable[[Numbers], tuple[Int64, Int64, Bool]]:
    """The same of dates that are written as numbers, with so many digits for the time of day."""

    def read(value: Numbers) -> tuple[Int64, Int64, Bool]:
        if value.dtype == np.int64:
            number, good = value.astype(np.int64), value > 0
        else:
            good = np.isfinite(value) & (value > 0) & (value < 1e15) & (value == np.floor(value))
            number = np.where(good, value, 0).astype(np.int64)
        date, clock = np.divmod(number, 10**time_of_day)
        clock *= 10 ** (6 - time_of_day)
        year, month, day = date // 10_000, date // 100 % 100, date % 100
        hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
        good = good & (year >= 1) & (year < 9999) & (month >= 1) & (month <= 12) & (day >= 1)
        good &= (hour < 24) & (minute < 60) & (second < 60)
        months = np.where(good, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
        days = months.astype("datetime64[D]") + np.where(good, day - 1, 0)
        good &= days.astype("datetime64[M]") == months
        midnight = days.astype(np.int64) * 86_400
        return midnight + hour * 3600 + minute * 60 + second, np.zeros_like(number), good

    return read


_UNITS: dict[str, Callable[[Numbers], tuple[Int64, Int64, Bool]]] = {
    "seconds": _divided(1),
    "milliseconds": _divided(10**3),
    "microseconds": _divided(10**6),
    "nanoseconds": _divided(10**9),
    "calendar_dates": _calendar(0),
    "calendar_minutes": _calendar(4),
    "calendar_seconds": _calendar(6),
}


def from_numbers(value: Numbers) -> Times:
    """Times of a column of numbers, int64 or float64 (R,); NaN where a cell holds none."""
    names = list(_UNITS)
    n_plausible = []
    for name in names:
        n_plausible.append(int(_plausible(*_UNITS[name](value)).sum()))
        if sum(n_plausible) == len(value):
            break
    unit = names[int(np.argmax(n_plausible))]
    if not any(n_plausible) and len(value):
        largest = np.abs(value[np.isfinite(value)], dtype=np.float64).max(initial=0)
        unit = names[sum(largest > LARGEST * 10**power for power in (0, 3, 6))]
    second, nano, good = _UNITS[unit](value)
    units = {}
    own = np.full(len(value), unit == "seconds")
    n_good, odd = int(good.sum()), ~_plausible(second, nano, good)
    if odd.any() and any(n_plausible):
        for other in names:
            if other == unit:
                continue
            read = _UNITS[other](value)
            hit = odd & _plausible(*read)
            if hit.any():
                second, nano, good = (
                    np.where(hit, b, a) for a, b in zip((second, nano, good), read, strict=True)
                )
                odd, own, n_good = odd & ~hit, own & ~hit, n_good - int(hit.sum())
                units[other] = int(hit.sum())
    units[unit] = n_good
    units.pop("seconds", None)
    fractions = int((own & (nano > 0)).sum())
    bad = ~(good & (second >= 0) & (second <= LARGEST))
    return Times(second, nano.astype(np.int32) if nano.any() else None, bad, units, fractions)


def _plausible(second: Int64, nano: Int64, good: Bool) -> Bool:
    return good & (second >= FIRST) & (second < END)


def from_dates(value: pl.Series, per_second: int) -> Times:
    """Times of a column of dates, int64 (R,) with so many to a second since 1970; null where a cell holds none."""
    second, rest = np.divmod(value.fill_null(0).to_numpy(), per_second)
    bad = value.is_null().to_numpy() | (second < 0)
    n_fractions = int((rest[~bad] > 0).sum())
    nano = (rest * (NANOSECONDS // per_second)).astype(np.int32) if n_fractions else None
    return Times(second, nano, bad, {}, n_fractions)


def read_dates(text: pl.Expr, form: str) -> pl.Expr:
    """Microseconds since 1970 of text in one of :data:`DATES`; null where it is not."""
    return text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC").dt.timestamp("us")


def seconds_of(text: str) -> int:
    """Unix seconds of a date, a month, a year or a number that a user gives.

    Raises:
        UserError: If it is neither.
    """
    months = {4: "-01-01", 7: "-01"}.get(len(text.strip()), "")  # 2020 and 2020-06
    value = pl.Series([text.strip() + months])
    number = value.cast(pl.Float64, strict=False)
    forms = (value.to_frame("x").select(read_dates(pl.col("x"), form)).item() for form in DATES)
    if number[0] is not None:
        times = from_numbers(number.to_numpy())
    else:
        times = from_dates(
            pl.Series([next((n for n in forms if n is not None), None)], dtype=pl.Int64), 10**6
        )
    if times.bad[0]:
        raise UserError(f"wanted a date such as 2020-12-31 or Unix seconds, got {text!r}; correct it")
    return int(times.second[0])
