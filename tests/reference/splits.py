"""Splits and k-core as their definitions say it: one user and one row at a time."""

from __future__ import annotations

from collections import Counter

Event = tuple[int, int, int]  # user, item, timestamp
Row = tuple[int, list[int], int, int, list[int]]  # user, history, target, timestamp, all earlier items


def sequences(events: list[Event], item_id: tuple[str, ...]) -> dict[int, list[tuple[int, int]]]:
    """(timestamp, item) of each user in the order (timestamp, raw item id); raw ids are numbers."""
    of_user: dict[int, list[tuple[int, int]]] = {}
    for user in sorted({user for user, _, _ in events}):
        own = [(time, item) for owner, item, time in events if owner == user]
        of_user[user] = sorted(own, key=lambda event: (event[0], int(item_id[event[1]])))
    return of_user


def leave_one_out(events: list[Event], item_id: tuple[str, ...], max_history: int) -> list[list[Row]]:
    train: list[Row] = []
    valid: list[Row] = []
    test: list[Row] = []
    for user, own in sequences(events, item_id).items():
        for place in range(1, len(own)):
            later = len(own) - 1 - place
            part = train if len(own) < 3 else {0: test, 1: valid}.get(later, train)
            part.append(_row(user, own, place, max_history))
    return [train, valid, test]


def time_windows(events: list[Event], item_id: tuple[str, ...], max_history: int) -> list[list[Row]]:
    rows = []
    for user, own in sequences(events, item_id).items():
        if len(own) >= 2:
            for place in range(min(max_history, len(own) - 1), len(own)):
                rows.append(_row(user, own, place, max_history))
    return _by_time(rows)


def time_growing(events: list[Event], item_id: tuple[str, ...], max_history: int) -> list[list[Row]]:
    rows = []
    for user, own in sequences(events, item_id).items():
        for place in range(1, len(own)):
            rows.append(_row(user, own, place, max_history))
    return _by_time(rows)


def k_core(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """Pairs of user and item that remain when users and items with fewer than k go, one at a time."""
    left = list(pairs)
    while True:
        users, items = (Counter(pair[side] for pair in left) for side in (0, 1))
        poor = [user for user in users if users[user] < k]
        if poor:
            left = [pair for pair in left if pair[0] != poor[0]]
            continue
        unwanted = [item for item in items if items[item] < k]
        if not unwanted:
            return left
        left = [pair for pair in left if pair[1] != unwanted[0]]


def _row(user: int, own: list[tuple[int, int]], place: int, max_history: int) -> Row:
    earlier = [item for _, item in own[:place]]
    return (user, earlier[-max_history:], own[place][1], own[place][0], earlier)


def _by_time(rows: list[Row]) -> list[list[Row]]:
    rows = sorted(rows, key=lambda row: row[3])  # stable
    first, second = len(rows) * 8 // 10, len(rows) * 9 // 10
    return [rows[:first], rows[first:second], rows[second:]]
