from .adapters import (
    describe_lora as describe_lora,
    freeze_unused as freeze_unused,
    unfreeze_lora as unfreeze_lora,
)
from .anatomy import (
    body as body,
    cache_of as cache_of,
    causal_lm as causal_lm,
    compute_again as compute_again,
    computes_again as computes_again,
    head_weight as head_weight,
    own_mask as own_mask,
    resolve_device as resolve_device,
    training_dtype as training_dtype,
)
from .backbones import load_backbone as load_backbone, load_tokenizer as load_tokenizer
from .checks import check_model as check_model, max_positions as max_positions
from .encoders import PAD as PAD, SequentialModel as SequentialModel
from .head import (
    LOGIT_BLOCK as LOGIT_BLOCK,
    Head as Head,
    hand_head as hand_head,
    head_rows as head_rows,
    is_precise as is_precise,
)
from .hub import download as download, upload as upload
from .loading import BASE_FACTS as BASE_FACTS, Backbone as Backbone
from .probe import (
    Measured as Measured,
    refusal as refusal,
    relative as relative,
)
from .weights import load_trained as load_trained, save_trained as save_trained

__all__ = [
    "Backbone",
    "load_backbone",
    "load_tokenizer",
]
