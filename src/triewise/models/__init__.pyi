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
    n_inputs as n_inputs,
    own_mask as own_mask,
    resolve_device as resolve_device,
    training_dtype as training_dtype,
    whole_rows as whole_rows,
)
from .backbones import (
    load_backbone as load_backbone,
    load_tokenizer as load_tokenizer,
    with_adapter as with_adapter,
)
from .checks import check_model as check_model, max_positions as max_positions, odd_length as odd_length
from .depth import Reached as Reached, freeze_first as freeze_first, layers_of as layers_of
from .encoders import PAD as PAD, SequentialModel as SequentialModel
from .head import (
    LOGIT_BLOCK as LOGIT_BLOCK,
    Head as Head,
    hand_head as hand_head,
    head_rows as head_rows,
    is_precise as is_precise,
)
from .hub import download as download, upload as upload
from .in_context import (
    Bank as Bank,
    ExampleModel as ExampleModel,
    InContext as InContext,
    sequential_model as sequential_model,
)
from .item_slots import (
    Histories as Histories,
    ItemSlots as ItemSlots,
    SlotIds as SlotIds,
    attach as attach,
    slots_of as slots_of,
)
from .lengths import (
    as_if_alone as as_if_alone,
    rope_switch as rope_switch,
    shortest_window as shortest_window,
    take_turns as take_turns,
)
from .loading import BASE_FACTS as BASE_FACTS, Backbone as Backbone
from .merging import twin as twin
from .new_tokens import add_tokens as add_tokens
from .probe import (
    Measured as Measured,
    place_limit as place_limit,
    refusal as refusal,
)
from .text_encoders import TitleEncoder as TitleEncoder, title_encoder as title_encoder
from .weights import load_trained as load_trained, save_trained as save_trained

__all__ = [
    "Backbone",
    "load_backbone",
    "load_tokenizer",
]
