"""What is refused when a model is loaded: no causal LM, weights or ids that it lacks, a text beyond its positions."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import worlds
from tests.tiny_models import tiny_model
from triewise.app.assemble import assemble
from triewise.app.folders import open_data
from triewise.decoding import TrieEngine, exact_search
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models import Backbone, check_model, load_backbone, max_positions
from triewise.models.anatomy import resolve_dtype, text_body
from triewise.recipe import Recipe, parse_recipe
from triewise.tokens import Trie

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}


def built(kind: str, model: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A model of a config class with weights that are far from flat."""
    import transformers as tf

    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**(COMMON | changes))
    make = getattr(tf, model)
    lm = (make.from_config(config) if model.startswith("Auto") else make(config)).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return lm


def folder(model: Any, out: Path) -> str:
    """A checkpoint with a tokenizer beside it."""
    model.save_pretrained(out)
    worlds.backbone().tokenizer.save_pretrained(out)
    return str(out)


# --- the future -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_a_model_that_sees_the_future_is_refused_and_its_decoder_is_not(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    name = folder(built(kind, **SHAPE), tmp_path / "m")
    with pytest.raises(UserError, match=r"got \w+, which sees the future: logits move by [\d.]+ when later"):
        load_backbone(name, device="cpu", dtype=dtype)
    with pytest.raises(UserError, match="sees the future"):
        TrieEngine(built(kind, **SHAPE), Trie.from_sequences([[5, 2], [6, 2]]))
    folder(built(kind, **SHAPE, is_decoder=True), tmp_path / "m")
    assert load_backbone(name, device="cpu", dtype=dtype).name == name


def test_a_model_that_reads_short_texts_alone_in_a_dtype_is_one_line(tmp_path: Path) -> None:
    """xLSTM multiplies float32 and bfloat16 where a text is longer than a chunk. It counts its layers twice."""
    sizes = {"hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2}
    name = folder(built("xLSTM", **sizes, chunk_size=16), tmp_path / "m")
    with pytest.raises(UserError, match="reads text alone in torch.bfloat16, .* fails .RuntimeError"):
        load_backbone(name, device="cpu", dtype="bfloat16")
    assert len(load_backbone(name, device="cpu", layers=1).model.backbone.blocks) == 1


def test_the_text_of_a_model_of_images_is_loaded_again(tmp_path: Path) -> None:
    """AutoModelForCausalLM does not know the config that its own model is saved with."""
    text = {
        **COMMON,
        **SHAPE,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
    }
    name = folder(built("Mllama", text_config=text), tmp_path / "m")
    loaded = load_backbone(name, device="cpu")
    assert type(loaded.model).__name__ == "MllamaForCausalLM"
    loaded.save(tmp_path / "again")
    assert load_backbone(str(tmp_path / "again"), device="cpu").model.config.model_type == "mllama_text_model"


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_are_never_written_do_not_hide_the_future(least: float) -> None:
    """Their logits are the least number there is (Chameleon's image tokens), beside which others would be rounding."""
    for decoder in (False, True):
        model = built("Bert", **SHAPE, is_decoder=decoder)
        model.cls.register_forward_hook(lambda _, given, made: made.index_fill(-1, torch.tensor([7]), least))
        with nullcontext() if decoder else pytest.raises(UserError, match="sees the future"):
            check_model(model)


def test_logits_that_are_not_numbers_are_one_line() -> None:
    model = built("Llama", **SHAPE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        UserError, match=r"whose logits are not numbers \(NaN\) in torch.float32; set another"
    ):
        check_model(model)


def test_tables_of_a_vision_tower_are_no_positions_of_a_text() -> None:
    """GIT's body holds both."""
    model = built(
        "Git",
        **SHAPE,
        max_position_embeddings=128,
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32},
    )
    assert max_positions(model) == 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "gemma3", "mixtral", "mamba"])
def test_models_that_see_the_past_pass_as_they_are(kind: str, dtype: torch.dtype) -> None:
    if kind == "mixtral":
        model = built("Mixtral", **SHAPE, num_key_value_heads=2, num_local_experts=4, sliding_window=None)
    elif kind == "mamba":
        model = built("Mamba", hidden_size=32, state_size=8, num_hidden_layers=2)
    else:
        model = tiny_model(kind)
    model = model.to(dtype).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model)
    assert model.training
    assert torch.get_rng_state().equal(state)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


def test_buffers_that_a_forward_casts_come_back_as_they_were() -> None:
    """CTRL casts its table of positions to the precision of its weights, whenever it runs."""
    model = built("CTRL", **TABLES["CTRL"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    before = model.transformer.pos_encoding.clone()
    check_model(model)
    assert model.transformer.pos_encoding.equal(before)
    model(input_ids=torch.tensor([[5, 6]]))
    assert model.transformer.pos_encoding.dtype == torch.bfloat16


def test_a_table_that_does_not_follow_its_model_is_one_line() -> None:
    """A tensor that is no buffer stays where and what it was when the model moves."""
    model = built("GPT2", **TABLES["GPT2"])
    table = torch.ones(24, 32)
    model.transformer.wpe.forward = lambda places: table[places] @ torch.eye(32, dtype=model.dtype)
    check_model(model)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    moved.transformer.wpe.forward = lambda places: table[places] @ torch.eye(32, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"text alone in torch.bfloat16, got GPT2\w+, which fails \(Runtime"):
        check_model(moved)


def test_a_model_that_does_not_run_in_this_precision_is_one_line() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"text alone in torch.bfloat16, got Llama\w+, which fails \(Runtime"):
        check_model(model)


# --- weights and kinds ------------------------------------------------------------------------------------------------


def test_weights_that_would_be_random_are_named(tmp_path: Path) -> None:
    untied = built("Llama", **SHAPE, tie_word_embeddings=False)
    headless = folder(untied.model, tmp_path / "base")
    with pytest.raises(UserError, match=r"base' without lm_head.weight; they would be random: choose"):
        load_backbone(headless, device="cpu")
    tied = folder(built("Llama", **SHAPE, tie_word_embeddings=True).model, tmp_path / "tied")
    assert load_backbone(tied, device="cpu").model is not None
    narrow = Path(folder(untied, tmp_path / "narrow"), "config.json")
    write_json(narrow, read_json(narrow) | {"intermediate_size": 32})
    with pytest.raises(
        UserError, match=r"with another shape of model.layers.0.mlp.down_proj.weight, .* more"
    ):
        load_backbone(str(narrow.parent), device="cpu")


def test_encoders_and_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    bart = folder(built("Bart", "BartForConditionalGeneration", **BART), tmp_path / "bart")
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    for name in (
        bart,
        folder(built("T5", "T5ForConditionalGeneration", **t5), tmp_path / "t5"),
    ):
        with pytest.raises(UserError, match=r"got '.*', an encoder-decoder \((bart|t5)\); choose a decoder"):
            load_backbone(name, device="cpu")
    vit = folder(built("ViT", "ViTModel", **SHAPE), tmp_path / "vit")
    with pytest.raises(UserError, match=r"which transformers does not know as one \(vit\); choose a decoder"):
        load_backbone(vit, device="cpu")
    # A config that says decoder over files that hold an encoder too: only their names tell.
    config = Path(bart, "config.json")
    write_json(config, read_json(config) | {"is_encoder_decoder": False, "is_decoder": True})
    with pytest.raises(UserError, match=r"without lm_head.weight|with weights of an encoder"):
        load_backbone(bart, device="cpu")
    decoder = folder(built("Bart", "BartForCausalLM", **BART), tmp_path / "decoder")
    assert max_positions(load_backbone(decoder, device="cpu").model) == 64


def test_an_encoder_beside_a_whole_decoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = folder(built("Llama", **SHAPE), tmp_path / "m")
    file = Path(name, "model.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"vision_tower.encoder.layer.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert load_backbone(name, device="cpu").name == name
    save_file(tensors | {"model.encoder.layer.weight": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"with weights of an encoder \(model.encoder.layer.weight\)"):
        load_backbone(name, device="cpu")


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "compressed-tensors"])
def test_weights_packed_by_others_are_refused(method: str, tmp_path: Path) -> None:
    name = folder(tiny_model("llama", vocabulary=320), tmp_path / "m")
    config = Path(name, "config.json")
    write_json(config, read_json(config) | {"quantization_config": {"quant_method": method, "bits": 4}})
    with pytest.raises(UserError, match=rf"or packed by bitsandbytes, got '.*' packed by {method}; choose"):
        load_backbone(name, device="cpu")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path: Path) -> None:
    saved = worlds.backbone()
    n = len(saved.tokenizer)
    tokenizer = copy.deepcopy(saved.tokenizer)
    tokenizer.add_tokens(["<genre>"])
    Backbone(saved.model, tokenizer, "m", {}).save(tmp_path / "m")
    with pytest.raises(
        UserError, match=rf"ids below {n}, the rows .* up to {n}; use .*embeddings\({n + 1}\)"
    ):
        load_backbone(str(tmp_path / "m"), device="cpu")


# --- precision --------------------------------------------------------------------------------------------------------


def test_rotary_frequencies_stay_as_they_are(tmp_path: Path) -> None:
    saved = worlds.backbone()
    saved.save(tmp_path / "m")
    exact = dict(saved.model.named_buffers())
    for name in ("tiny", str(tmp_path / "m")):
        model = load_backbone(
            name, titles=worlds.TITLES, device="cpu", dtype="bfloat16", tiny=worlds.TINY
        ).model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert all(b.dtype == torch.float32 and b.equal(exact[n]) for n, b in model.named_buffers())
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_emulated_bfloat16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_dtype("auto", cuda) == torch.float32  # a T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype("auto", cuda) == torch.bfloat16


# --- positions --------------------------------------------------------------------------------------------------------

TABLES = {
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24},
    "GPTNeo": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}
    | {"max_position_embeddings": 24},
    "GPTJ": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24, "rotary_dim": 4},
    "GPTBigCode": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24},
    "OPT": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    | {"max_position_embeddings": 24, "word_embed_proj_dim": 32},
    "BioGpt": SHAPE | {"max_position_embeddings": 24},
    "CTRL": {"n_embd": 32, "dff": 64, "n_layer": 1, "n_head": 4, "n_positions": 24},
    "Mpt": {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 24},
    "Roberta": SHAPE | {"max_position_embeddings": 25, "is_decoder": True},
    "OpenAIGPT": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24},
}


@pytest.mark.parametrize("kind", TABLES)
def test_positions_end_where_the_model_fails(kind: str) -> None:
    model = built(kind, **TABLES[kind])
    assert max_positions(model) == 24
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        model(input_ids=ids[:, :24], use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("kind", ["Llama", "XGLM", "Bloom", "ModernBertDecoder"])
def test_positions_that_are_computed_never_end(kind: str) -> None:
    changes = {
        "XGLM": {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4},
        "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    }.get(kind, SHAPE)
    model = built(kind, **changes, **({} if kind == "Bloom" else {"max_position_embeddings": 24}))
    assert max_positions(model) is None
    assert text_body(model) is not model.get_output_embeddings()
    with torch.no_grad():
        model(input_ids=torch.arange(5, 45)[None], use_cache=False)


def recipe(out: Path, name: str, **backbone: Any) -> Recipe:
    raw = out / "raw"
    if not raw.exists():
        worlds.write_msl_folder(raw, n_users=6)
    values = {
        "name": "positions",
        "data": {"source": f"msl:{raw}", "folder": str(out / "data"), "max_history": 4},
        "backbone": {"name": name, "device": "cpu", "template": "plain", **backbone},
        "training": {"steps": 1},
    }
    return parse_recipe(values, "test")


def test_a_prompt_leaves_room_for_the_longest_title(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2 = TABLES["GPT2"] | {"n_positions": 96}
    name = folder(built("GPT2", **gpt2), tmp_path / "m")
    made = recipe(tmp_path, name)
    parts = assemble(made, open_data(made))
    longest = int(parts.prompts.title_tokens.lengths.max())
    assert parts.prompts.max_tokens == 96 - longest
    assert f"backbone.max_tokens is {96 - longest}: " in capsys.readouterr().err
    assert parts.prompts.settings["max_tokens"] == 96 - longest, "a saved run knows it"
    made = recipe(tmp_path, name, max_tokens=96)
    with pytest.raises(UserError, match=rf"within the 96 positions of .* = 96 .* at most {96 - longest}, or"):
        assemble(made, open_data(made))
    made = recipe(tmp_path, name, max_tokens=96 - longest)
    parts = assemble(made, open_data(made))
    engine = TrieEngine(parts.backbone.model, parts.trie)
    room = 96 + 1 - longest  # nothing follows the last token of a title
    assert exact_search(engine, [[5] * room], k=3).items.shape == (1, 3)
    with pytest.raises(UserError, match="within the model's 96 positions, got 97 tokens; lower max_tokens"):
        exact_search(engine, [[5] * (room + 1)], k=3)
    assert json.loads(Path(name, "config.json").read_text())["n_positions"] == 96
