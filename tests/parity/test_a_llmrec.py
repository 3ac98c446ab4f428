"""A-LLMRec against numbers of its authors' code (ghdtjr/A-LLMRec @e216bbc, float64 on a CPU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.hybrid_values import Piece, fill, piece
from tests.parity.test_llara import batch_of, dense_targets
from triewise.models import ItemSlots
from triewise.models.item_slots import projection
from triewise.training.alignment import AutoEncoder, alignment_losses

METHOD = "a_llmrec"


def auto_encoder(values: Piece, of: str) -> AutoEncoder:
    tensors = [values[f"{of}_{name}"] for name in ("w1", "b1", "w2", "b2")]
    made: Any = fill(AutoEncoder(tensors[0].shape[1], 128), *tensors)
    return made


def test_alignment_and_its_gradients() -> None:
    values = piece(METHOD, "stage1")
    items, texts = auto_encoder(values, "item"), auto_encoder(values, "text")
    e = [values[name].requires_grad_(False) for name in ("e_pos", "e_neg")]
    s = [values[name].requires_grad_() for name in ("s_pos", "s_neg")]
    found = alignment_losses((items, texts), values["u"], (e[0], e[1]), (s[0], s[1]))
    values.close(found.total, "total")
    values.close(found.recommendation, "recommendation")
    values.close(found.matching, "matching")
    values.close(found.items, "item_reconstruction")
    values.close(found.texts, "text_reconstruction")
    for sign, vectors in (("pos", e[0]), ("neg", e[1])):
        values.close((values["u"] * items(vectors)[1]).mean(1), f"logit_{sign}")
    (z, again), (q, s_again) = items(e[0]), texts(s[0])
    values.close(z[:, :5], "z_pos_first5")
    values.close(q[:, :5], "q_pos_first5")
    values.close(again, "e_pos_again")
    values.close(s_again, "s_pos_again")

    found.total.backward()
    theirs = values.outputs["gradient_of_total"]
    ours: dict[str, Any] = {"s_pos": s[0].grad, "s_neg": s[1].grad}
    for of, module in (("item", items), ("text", texts)):
        ours[f"{of}_w1_sum"] = module.down.weight.grad.sum()  # type: ignore[union-attr]
        ours[f"{of}_w2_sum"] = module.up.weight.grad.sum()  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        expected = torch.tensor(theirs[name], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def projected(values: Piece, of: str, activation: nn.Module) -> nn.Module:
    names = ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")
    tensors = [values[f"{of}_{name}"] for name in names]
    return fill(projection(tensors[0].shape[1], len(tensors[0]), activation), *tensors)


def test_projections_of_users_and_items() -> None:
    values = piece(METHOD, "stage2_projections")
    codes = auto_encoder(values, "item")(values["e"])[0]
    values.close(codes[:, :5], "z_first5")
    values.close(projected(values, "user", nn.LeakyReLU())(values["u"]), "user_token")
    values.close(projected(values, "item_proj", nn.GELU())(codes), "item_token")


def test_prompt_and_answer_are_one_row_behind_the_user() -> None:
    """Ours never has an answer's first token (their tokenizer's start), and pads with 0 that nothing reads."""
    values = piece(METHOD, "prompt_and_answer")
    user = 23  # any id: their user token has none
    prompts, titles = (
        [
            [i for i, real in zip(*row, strict=True) if real]
            for row in zip(ids.tolist(), mask.tolist(), strict=True)
        ]
        for ids, mask in ((values[n], values[f"{n}_mask"]) for n in ("prompt", "answer"))
    )
    batch = batch_of([[user, *prompt] for prompt in prompts], [title[1:] for title in titles])
    mask = torch.tensor(values.outputs["mask_with_user_token"]).bool()
    values.close(mask[:, 1:].int(), "mask", 0)
    assert batch.n_tokens == mask.sum()
    expected = torch.tensor(values.outputs["ids"])
    assert (batch.input_ids[:, 0] == user).all()
    assert torch.equal(torch.from_numpy(batch.input_ids[:, 1:])[mask[:, 1:]], expected[mask[:, 1:]])
    assert [len(prompt) for prompt in prompts] == values.outputs["prompt_length"]
    values.close(dense_targets(batch), "targets_with_user_token", 0)


def test_item_tokens_are_written_over_their_places() -> None:
    values = piece(METHOD, "prompt_mix")
    ids: Tensor = torch.tensor(piece(METHOD, "prompt_and_answer").outputs["ids"])
    vectors, places = [], []
    for row in range(len(ids)):
        for marker, of in ((21, "history"), (22, "candidates")):
            found = values[f"{of}_of_row_{row}"]
            at = (ids[row] == marker).nonzero()[:, 0].tolist()
            vectors += list(found[: len(at)])
            places += [(row, column) for column in at]
    words = nn.Embedding.from_pretrained(values["token_table"])
    slots = ItemSlots(words, "llara", torch.stack(vectors), "").double()
    slots.table, slots.item = torch.stack(vectors), nn.Sequential(nn.Identity())
    for n, (row, column) in enumerate(places):
        ids[row, column] = slots.ids.item(n)
    values.close(slots(ids), "inputs_embeds")
