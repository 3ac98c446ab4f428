"""What the scripts of D3 and MSL do, one review at a time."""

from __future__ import annotations

import calendar
from collections import Counter

Review = tuple[str, str, int]  # user, item, Unix seconds; in the order of the file
Metadata = list[tuple[str, str | None]]  # item, title
Row = tuple[str, list[str], str, int]  # user, history, target, time of the target


def d3(
    reviews: list[Review], metadata: Metadata, k: int, enough: int, year: int = 2017
) -> tuple[list[list[Row]], dict[str, str], int]:
    """Train, valid and test rows, titles, and the start year that was taken."""
    start, end = (calendar.timegm((y, month, 1, 0, 0, 0)) for y, month in ((year, 10), (2018, 11)))
    refused, title = set(), {}
    cleaned: Metadata = []
    for item, text in metadata:
        if text is None or "<span id" in text:
            refused.add(item)
            cleaned.append((item, text))
            continue
        text = text.replace("&quot;", '"').replace("&amp;", "&").strip(" ").strip('"')
        cleaned.append((item, text))
        if len(text) > 1 and len(text.split(" ")) <= 20:
            title[item] = text
        else:
            refused.add(item)
    left = [
        (user, item, time)
        for user, item, time in reviews
        if start <= time <= end and item in title and item not in refused
    ]
    left = k_core(left, k)
    if len({item for _, item, _ in left}) < enough and year > 1996:
        return d3(reviews, cleaned, k, enough, year - 1)
    return by_time(growing(left)), title, year


def msl(reviews: list[Review], metadata: Metadata, k: int) -> tuple[list[list[Row]], dict[str, str]]:
    """Train, valid and test rows, and titles; all items are drawn."""
    title = {item: text or "" for item, text in metadata}
    left = k_core([review for review in reviews if len(title.get(review[1], "")) > 1], k)
    return by_time(windows(left)), title


def k_core(reviews: list[Review], k: int) -> list[Review]:
    while True:
        users, items = (Counter(review[side] for review in reviews) for side in (0, 1))
        kept = [review for review in reviews if users[review[0]] >= k and items[review[1]] >= k]
        if len(kept) == len(reviews):
            return kept
        reviews = kept


def sequences(reviews: list[Review]) -> dict[str, list[Review]]:
    """Each user's reviews by time, equal times in the order of the file; users as they come up there."""
    of_user: dict[str, list[Review]] = {}
    for review in reviews:
        of_user.setdefault(review[0], []).append(review)
    return {user: sorted(own, key=lambda review: review[2]) for user, own in of_user.items()}


def growing(reviews: list[Review]) -> list[Row]:
    return [_row(own, place) for own in sequences(reviews).values() for place in range(1, len(own))]


def windows(reviews: list[Review]) -> list[Row]:
    return [
        _row(own, place)
        for own in sequences(reviews).values()
        if len(own) > 1
        for place in range(min(10, len(own) - 1), len(own))
    ]


def _row(own: list[Review], place: int) -> Row:
    user, item, time = own[place]
    return user, [review[1] for review in own[max(0, place - 10) : place]], item, time


def by_time(rows: list[Row]) -> list[list[Row]]:
    rows = sorted(rows, key=lambda row: row[3])
    first, second = int(len(rows) * 0.8), int(len(rows) * 0.9)
    return [rows[:first], rows[first:second], rows[second:]]
