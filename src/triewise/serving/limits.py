"""What a service takes on, apart from what it is made of: no extra is needed to say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a service takes on.

    Attributes:
        max_batch: Users that are decoded together.
        wait_ms: Milliseconds that the first of a batch waits for others.
        queue: Users that may wait; more get 429.
        timeout: Seconds until a request gets 503.
        max_body: Bytes.
        max_k: Titles of one history.
        max_histories: Of one request.
    """

    max_batch: int = 32
    wait_ms: float = 2.0
    queue: int = 256
    timeout: float = 30.0
    max_body: int = 1 << 20
    max_k: int = 1000
    max_histories: int = 100
