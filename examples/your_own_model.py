"""Your own language model from Hugging Face, fine-tuned with a low-rank adapter.

Set ``MODEL`` to a folder with a checkpoint or to a name on the hub, such as ``"Qwen/Qwen2.5-0.5B"``. Without one, a
very small untrained Llama with a byte tokenizer is made here, so that the example runs without a network: what it
recommends after 40 steps is close to chance.
"""

import tempfile
from pathlib import Path

import triewise
from shop import QUICK, trained

MODEL = None  # such as "Qwen/Qwen2.5-0.5B"


def untrained_llama(folder: Path) -> Path:
    """A checkpoint as ``save_pretrained`` of transformers writes it, with a tokenizer that has 256 bytes and an end."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        folder
    )
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=257, eos_token_id=256, bos_token_id=None, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


model = MODEL or untrained_llama(Path(tempfile.mkdtemp(prefix="triewise-")))
settings = [
    f"backbone.name={model}",
    "backbone.template=msl",
    "backbone.lora.rank=4",
    "training.supervision=last",
]
run = trained(
    "demo/msl", *QUICK, *settings, "training.steps=40", "training.batch_size=8", "evaluation.users=50"
)
metrics = triewise.evaluate(run).metrics
recommender = triewise.load(run)
origin = recommender.backbone.origin
print(f"an adapter of rank {origin['lora']['rank']} on {origin['name']}")
print(
    f"HR@5 {metrics['HR@5']:.2f} on {metrics['n_users']} users; five of 24 products at random would give 0.21"
)
print(
    "after",
    recommender.catalog.title[0],
    "comes",
    recommender.recommend([[0]], k=1).titles(recommender.catalog)[0],
)
