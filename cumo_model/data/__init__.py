"""Training data: check, tokenise, group, pack and batch conversations with pictures."""

from typing import TYPE_CHECKING

from cumo_model.names import attributes

if TYPE_CHECKING:
    from cumo_model.data.batches import Collator, collate, collate_packed
    from cumo_model.data.conversations import ConversationDataset
    from cumo_model.data.patterns import record_files
    from cumo_model.data.pictures import Pictures
    from cumo_model.data.records import Problem, check, scan
    from cumo_model.data.sampling import StepSampler, Units, plan_packs
    from cumo_model.data.streamed import StreamedConversations

_MODULES = {
    "cumo_model.data.batches": "Collator collate collate_packed",
    "cumo_model.data.conversations": "ConversationDataset",
    "cumo_model.data.patterns": "record_files",
    "cumo_model.data.pictures": "Pictures",
    "cumo_model.data.records": "Problem check scan",
    "cumo_model.data.sampling": "StepSampler Units plan_packs",
    "cumo_model.data.streamed": "StreamedConversations",
}
__getattr__, __dir__ = attributes(__name__, _MODULES)

__all__ = [
    "Collator",
    "ConversationDataset",
    "Pictures",
    "Problem",
    "StepSampler",
    "StreamedConversations",
    "Units",
    "check",
    "collate",
    "collate_packed",
    "plan_packs",
    "record_files",
    "scan",
]
