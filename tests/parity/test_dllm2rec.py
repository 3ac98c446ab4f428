"""DLLM2Rec as its authors' code has it: the input of the student, its scores, and what it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.golden import close, piece
from triewise.models import SequentialModel
from triewise.settings import EncoderSettings

SHAPE: dict[str, Any] = {
    "width": 8,
    "blocks": 1,
    "heads": 1,
    "dropout": 0.5,
    "head": "linear",
    "norm": "inner",
}
# Their names of weights, and ours.
NAMES = {
    "positional_embeddings.weight": "body.positions.position.weight",
    **{
        f"mh_attn.linear_{n}.{part}": f"body.attention.0.{n}.{part}"
        for n in "qkv"
        for part in ("weight", "bias")
    },
    **{
        f"{theirs}.{part}": f"body.{ours}.{part}"
        for theirs, ours in {
            "ln_1": "query_norm.0",
            "ln_2": "norm.0",
            "ln_3": "last_norm",
            "feed_forward.w_1": "feed_forward.0.0",
            "feed_forward.w_2": "feed_forward.0.3",
            "feed_forward.layer_norm": "inner_norm.0",
        }.items()
        for part in ("weight", "bias")
    },
    "s_fc.weight": "head.weight",
    "s_fc.bias": "bias",
    "fc_4096_64.weight": "offset.linear.weight",
    "fc_4096_64.bias": "offset.linear.bias",
}


def student(given: dict[str, Any], encoder: Any, z: torch.Tensor | None, weight: float) -> SequentialModel:
    """Our model with their weights, which number items from 0 and pad with item N."""
    n_items = 12
    settings = EncoderSettings(encoder=encoder, **SHAPE)
    model = SequentialModel(settings, n_items, 5, 0, z, weight).double()
    tensors = model.state_dict()
    with torch.no_grad():
        tensors["items.weight"][1:-1] = given["item_embeddings.weight"][:n_items]
        for theirs, value in given.items():
            ours = NAMES.get(theirs, f"body.{theirs}")
            if ours in tensors:
                tensors[ours].copy_(value.reshape(tensors[ours].shape))
    return model.eval()


@pytest.mark.parametrize(
    ("encoder", "name"), [("sasrec", "embedding_offset"), ("gru4rec", "embedding_offset_gru")]
)
def test_scores_with_and_without_the_offset(encoder: str, name: str) -> None:
    given, wanted = piece("dllm2rec", name)
    of_items, _ = piece("dllm2rec", "embedding_offset")
    seq, z = of_items["seq"], of_items["z"]
    ids = torch.where(seq == 12, 0, seq + 1)
    for vectors, key in ((z.float(), "scores"), (None, "scores_without_offset")):
        model = student(given, encoder, vectors, of_items["ed_weight"])
        if vectors is not None:
            assert model.offset is not None
            model.offset.vectors[1:-1] = z
        close(model.last_scores(ids), wanted[key])
        if "input_before_position" in wanted and vectors is not None:
            real = (ids != 0)[..., None]
            close(model.inputs(ids) * real, wanted["input_before_position"] * real)
