"""DLLM2Rec as its authors' code has it: the input of the student, its scores, and what it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.golden import close, piece
from tests.parity.test_dros import Scores, task_of
from triewise.models import SequentialModel
from triewise.settings import DistilSettings, EncoderSettings, SequentialSettings
from triewise.training import distilled, item_loss
from triewise.training.distil import teacher_weights
from triewise.training.item_tasks import dros, propensities

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


@pytest.mark.parametrize("name", ["distillation_without_dros", "distillation_with_dros", "no_distillation"])
def test_losses_weights_and_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As coded, and as meant where that is another number; their weights by place are float32."""
    given, wanted = piece("dllm2rec", name)
    scores, counts = given["scores"].requires_grad_(), given["counts"].numpy()
    settings = DistilSettings(
        kind="dllm2rec",
        teacher="teacher",
        top=given["K"],
        lam=given["lam"],
        negative="coded",
        dros_rows="crossed",
        **{key: given[key] for key in ("gamma_position", "gamma_confidence", "gamma_consistency")},
    )
    base = SequentialSettings(
        encoder="sasrec", loss="bce", dros_alpha=given["alpha"], dros_beta0=given["beta0"]
    )
    teacher = (given["teacher"].numpy().astype(np.int32), given["distance"].numpy())
    task, model = task_of(given, monkeypatch), Scores(len(counts))
    rng = np.random.default_rng()

    def total(settings: DistilSettings, base: SequentialSettings) -> torch.Tensor:
        added = distilled(*teacher, settings, base, counts) if settings.lam else None
        loss = item_loss(model, base, counts, added)  # type: ignore[arg-type]
        return loss(scores, task, rng).mean()

    found = total(settings, base)
    close(found, wanted["loss_all"])
    found.backward()
    assert scores.grad is not None
    close(scores.grad, wanted["gradient_of_scores"])
    without = base.model_copy(update={"dros_alpha": 0.0}), settings.model_copy(update={"lam": 0.0})
    close(total(without[1], without[0]), wanted["loss_recommendation"])
    if "dros_of_target" in wanted:
        p = torch.from_numpy(propensities(counts))
        close(dros(scores, given["target"], p, given["beta0"]), wanted["dros_of_target"])
    if not settings.lam:
        return
    close((found - total(without[1], base)) / settings.lam, wanted["loss_distillation"])
    check_weights(scores, given, wanted, settings)
    if "loss_all_if_rows_were_paired" in wanted:
        paired = total(settings.model_copy(update={"dros_rows": "paired"}), base)
        close(paired, wanted["loss_all_if_rows_were_paired"])
        apart = (paired - total(without[1], base)) / settings.lam
        close(apart, wanted["loss_distillation_if_rows_were_paired"])
    described = total(settings.model_copy(update={"negative": "described"}), base)
    negative = scores.gather(1, given["negative"][:, None])
    meant = -(1 - negative.sigmoid()).log() + (1 - negative).sigmoid().log()  # weights sum to 1
    close(described - found, settings.lam * meant.mean())


def check_weights(
    scores: Any, given: dict[str, Any], wanted: dict[str, Any], settings: DistilSettings
) -> None:
    """Each kind of weight alone, where it is divided by its sum, and all together."""
    items, distance = given["teacher"], given["distance"]
    close(teacher_weights(scores, items, distance, settings), wanted["weight"])
    kinds = ("position", "confidence", "consistency")
    for kind in kinds:
        only = settings.model_copy(update={f"gamma_{other}": float(other == kind) for other in kinds})
        alone = wanted[f"weight_{kind}"]
        close(teacher_weights(scores, items, distance, only), alone / alone.sum(1, keepdim=True))
    assert scores.topk(given["K"], 1).indices.tolist() == wanted["student_first_K"].tolist()
