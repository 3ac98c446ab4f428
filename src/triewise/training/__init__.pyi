from .alignment import kept_alignment as kept_alignment
from .cautions import training_warnings as training_warnings
from .checkpoints import (
    BEST as BEST,
    LOG as LOG,
    best_weights as best_weights,
    link as link,
    read_log as read_log,
    read_state as read_state,
    resumable as resumable,
    resume_point as resume_point,
)
from .contrast import Contrast as Contrast
from .curriculum import Curriculum as Curriculum
from .distil import (
    TEACHER as TEACHER,
    VECTORS as VECTORS,
    Teacher as Teacher,
    TeacherFile as TeacherFile,
    distilled as distilled,
    part_path as part_path,
    write_part as write_part,
)
from .examples import Examples as Examples, along_titles as along_titles
from .flow import Flow as Flow, history_prior as history_prior
from .item_fit import fit as fit
from .item_tasks import ItemLoss as ItemLoss, Sequences as Sequences, Task as Task, item_loss as item_loss
from .losses import (
    edge_logits as edge_logits,
    lml_parts as lml_parts,
    trie_nll as trie_nll,
    vocabulary_nll as vocabulary_nll,
)
from .meter import measure_parts as measure_parts
from .objective import (
    Learned as Learned,
    MicroBatches as MicroBatches,
    Objective as Objective,
    TitleLoss as TitleLoss,
)
from .preferences import Preferences as Preferences, kept_reference as kept_reference
from .soft_targets import SoftTargets as SoftTargets
from .soft_trees import TreeTargets as TreeTargets
from .state import (
    BY_ITSELF as BY_ITSELF,
    MAY_CHANGE as MAY_CHANGE,
    Stop as Stop,
    TrainResult as TrainResult,
    Watch as Watch,
)
from .temperature import AdaptiveTemperature as AdaptiveTemperature
from .token_losses import Apao as Apao, Bear as Bear, FrontGreater as FrontGreater
from .trainer import packs as packs, train as train
from .windows import (
    Windows as Windows,
    draw_rejected as draw_rejected,
    make_windows as make_windows,
    target_counts as target_counts,
)

__all__ = ["AdaptiveTemperature", "Objective", "train", "trie_nll", "vocabulary_nll"]
