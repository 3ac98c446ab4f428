"""Who writes texts on demand: a chat model on this machine, or a service that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from triewise.cache import offline
from triewise.errors import UserError, first_line
from triewise.models import load_backbone, max_positions
from triewise.tokens import turns

if TYPE_CHECKING:
    from triewise.settings import WriterSettings

SECONDS = 300.0  # that one answer may take
TRIES = 3
_AGAIN = (408, 429, 500, 502, 503, 504)  # what a service says that may answer later

# From prompts and a seed to the candidates for each.
Writer = Callable[[Sequence[str], int], list[list[str]]]


def writer_of(settings: WriterSettings, titles: Sequence[str] = ()) -> Writer:
    """The writer that settings name; that of the template has no candidates.

    ``titles`` are what the ``tiny`` tokenizer is trained on.

    Raises:
        UserError: The model cannot be had, or connections are forbidden.
    """
    if settings.endpoint is not None:
        return _endpoint(settings, settings.endpoint)
    if settings.model == "template":
        return lambda prompts, _: [[] for _ in prompts]
    return _local(settings, titles)


def _local(settings: WriterSettings, titles: Sequence[str]) -> Writer:
    """A model of transformers, asked in its chat template where it has one. Titles cannot end its turn."""
    from transformers import GenerationConfig

    backbone = load_backbone(settings.model, titles=titles, device=settings.device)
    model, tokenizer, end = backbone.model, backbone.tokenizer, int(backbone.tokenizer.eos_token_id)
    # Nothing of what a model brings along of this may reach the sampling.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_new_tokens=settings.max_tokens,
        num_return_sequences=settings.candidates,
        eos_token_id=end,
        pad_token_id=end,
    )
    positions = max_positions(model)
    room = None if positions is None else max(positions - settings.max_tokens, 1)

    def write(prompts: Sequence[str], seed: int) -> list[list[str]]:
        rows = [ids if room is None else ids[-room:] for ids in turns(tokenizer, prompts)]
        longest = max(map(len, rows))
        ids = torch.tensor([[end] * (longest - len(row)) + row for row in rows], device=model.device)
        real = torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device
        )
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            written = model.generate(input_ids=ids, attention_mask=real)[:, longest:]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [texts[n : n + settings.candidates] for n in range(0, len(texts), settings.candidates)]

    return write


def _endpoint(settings: WriterSettings, url: str) -> Writer:
    """A service; a batch is asked at once."""
    if offline():
        raise UserError(
            f"wanted answers from {url}, but TRIEWISE_OFFLINE=1 forbids connections; unset it, or leave "
            "enhance.writer.endpoint out"
        )
    key = os.environ.get(settings.key_variable)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    asked = {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "n": settings.candidates,
    }

    def ask(prompt: str, seed: int) -> list[str]:
        body = json.dumps(asked | {"seed": seed, "messages": [{"role": "user", "content": prompt}]}).encode()
        answer = _answer(f"{url.rstrip('/')}/chat/completions", body, headers, url)
        try:
            return [str.strip(choice["message"]["content"] or "") for choice in answer["choices"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"wanted choices with a message from {url}, got {str(answer)[:80]!r} ({first_line(error)}); "
                "check enhance.writer.endpoint"
            ) from None

    def write(prompts: Sequence[str], seed: int) -> list[list[str]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: ask(prompt, seed % 2**31), prompts))

    return write


def _answer(place: str, body: bytes, headers: dict[str, str], url: str) -> Any:
    """What a service says, asked again where that may help."""
    for again in range(TRIES):
        try:
            request = urllib.request.Request(place, body, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            lasting = isinstance(error, urllib.error.HTTPError) and error.code not in _AGAIN
            if lasting or again == TRIES - 1:
                raise UserError(
                    f"wanted an answer of the model from {url}, got: {first_line(error)}; check enhance.writer, and "
                    "start again: what was written is kept"
                ) from None
            time.sleep(2.0**again)
    raise AssertionError
