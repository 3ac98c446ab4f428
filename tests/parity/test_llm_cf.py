"""LLM-CF as its authors' code has it: the decoder, what the examples add to a user's state, and both losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity.golden import close, piece
from triewise.models import Bank, ExampleModel, InContext
from triewise.models.in_context import Decoder
from triewise.settings import EncoderSettings, SequentialSettings
from triewise.training import item_loss
from triewise.training.item_tasks import Task, sampled_softmax

N_ITEMS, WIDTH = 9, 8  # their item 0 is padding
# Their names of weights, and ours.
OF_BLOCKS = {
    "attention.wq": "q",
    "attention.wk": "k",
    "attention.wv": "v",
    "attention.wo": "out",
    "feed_forward.w1": "gate",
    "feed_forward.w2": "down",
    "feed_forward.w3": "up",
    "attention_norm": "before",
    "ffn_norm": "between",
}
OF_SASREC = {
    "attention_layernorms.0": "query_norm.0",
    "attention_layers.0.out_proj": "attention.0.out",
    "forward_layernorms.0": "norm.0",
    "forward_layers.0.conv1": "feed_forward.0.0",
    "forward_layers.0.conv2": "feed_forward.0.3",
    "last_layernorm": "last_norm",
}
OF_MODULE = {
    "bge_emb_mapping.mlp_layers.1": "of_text",
    "cot_emb_reconstruct_mapping.mlp_layers.1": "again",
    "history_mlp.mlp_layers.1": "first",
}


def fill(module: nn.Module, name: str, value: torch.Tensor) -> None:
    with torch.no_grad():
        tensor = module.state_dict()[name]
        tensor.copy_(value.reshape(tensor.shape))


def fill_decoder(decoder: Decoder, given: dict[str, Any], prefix: str = "") -> Decoder:
    for n in range(2):
        for theirs, ours in OF_BLOCKS.items():
            fill(decoder, f"blocks.{n}.{ours}.weight", given[f"{prefix}layers.{n}.{theirs}.weight"])
    fill(decoder, "norm.weight", given[f"{prefix}norm.weight"])
    return decoder


def test_the_decoder() -> None:
    given, wanted = piece("llm_cf", "decoder")
    decoder = fill_decoder(Decoder(WIDTH, 2, 2).double(), given)
    close(decoder(given["x"], torch.ones(2, 12, dtype=torch.bool)), wanted["states"])
    assert Decoder(64, 1, 2).blocks[0].gate.out_features == 96  # type: ignore[union-attr]


def test_the_sampled_softmax_and_its_gradient() -> None:
    given, wanted = piece("llm_cf", "sampled_softmax")
    table, user, target = given["item_table"], given["user"].requires_grad_(), given["target"]
    negatives = given["negatives"]
    own = (user * table[target]).sum(1)
    loss = sampled_softmax(own, user @ table[negatives].T, target[:, None] == negatives).mean()
    close(loss, wanted["loss"])
    loss.backward()  # type: ignore[no-untyped-call]
    assert user.grad is not None
    close(user.grad, wanted["gradient_of_user"])


@pytest.fixture
def theirs() -> tuple[dict[str, Any], dict[str, Any], ExampleModel, torch.Tensor]:
    """Inputs, outputs, our model with their weights and eight examples, and which of those each row has."""
    given, wanted = piece("llm_cf", "context_feature")
    examples = given["examples"]
    flat = {key: torch.tensor([row for e in examples for row in e[key]]) for key in examples[0]}
    texts, chains = given["text_table"][1:], given["cot_table_before_scaling"][flat["cot"]]
    given["examples"] = flat
    bank = Bank(texts, flat["history"], flat["item"] - 1, flat["label"], chains)
    settings = EncoderSettings(encoder="sasrec", width=WIDTH, blocks=1, heads=2, scaled=True)
    module = InContext(bank, WIDTH).double()
    model = ExampleModel(settings, N_ITEMS, 5, 0, module).double().eval()
    module.texts[1:-1] = texts
    module.chains[:] = nn.functional.normalize(chains, dim=1)
    module.keys[:] = module.read(module.ids)
    fill_decoder(module.decoder, given, "context_transformer.")
    for theirs, ours in OF_MODULE.items():
        for part in ("weight", "bias"):
            fill(module, f"{ours}.{part}", given[f"{theirs}.{part}"])
    fill(module, "labels.weight", given["label_table"])
    for theirs, ours in OF_SASREC.items():
        for part in ("weight", "bias"):
            fill(model.body, f"{ours}.{part}", given[f"{theirs}.{part}"])
    for part in ("weight", "bias"):
        for ours, value in zip("qkv", given[f"attention_layers.0.in_proj_{part}"].chunk(3), strict=True):
            fill(model.body, f"attention.0.{ours}.{part}", value)
    fill(model.body, "positions.position.weight", given["pos_emb.weight"])
    items = given["emb_tab_dict.item_id_emb_tab.weight"]
    fill(model, "items.weight", torch.cat([torch.zeros(1, WIDTH), items[1:], items[:1]]))
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 1e-8
    return given, wanted, model, torch.arange(8).view(4, 2).T


def test_what_examples_add_and_the_loss(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their users have vectors of their own; their item 0, which the row asks for, is our mask."""
    given, wanted, model, found = theirs
    ids, users = torch.tensor(given["row"]["history"]), given["emb_tab_dict.user_id_emb_tab.weight"]
    of_rows = torch.cat(
        [given["examples"]["user"].view(4, 2).T, torch.tensor(given["row"]["user"])[:, None]], 1
    )
    read: list[torch.Tensor] = []
    model.in_context.decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    states = model.plain_states(ids)
    close(states, wanted["sasrec_state"])
    after, apart = model.in_context(model, states, ids, found, users[of_rows])
    close(read[0], wanted["tokens"])
    close((after - states) / 0.1, wanted["feature"])
    close(after, wanted["user_vector"])
    close(apart.mean(), wanted["reconstruction"])

    negatives = given["negatives"]
    sequential = SequentialSettings(encoder="sasrec", loss="sampled", negatives=len(negatives))
    drawn: Any = SimpleNamespace(choice=lambda *_, **__: negatives.long().numpy() - 1)
    target = np.array(given["row"]["item"]) - 1
    task = Task(ids.numpy(), np.zeros(2, np.int64), target, np.ones(2, np.float32), np.arange(2))
    loss = item_loss(model, sequential, np.ones(N_ITEMS, np.int64))(after, task, drawn)
    close(loss.mean(), wanted["sampled_softmax"])
    close(loss.mean() + given["reconstruct_weight"] * apart.mean(), wanted["loss"])
