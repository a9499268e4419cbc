"""Training data: check, tokenise, group, pack and batch conversations with pictures."""

from cumo_model.data.batches import Collator, collate, collate_packed
from cumo_model.data.conversations import ConversationDataset
from cumo_model.data.pictures import Pictures
from cumo_model.data.records import Problem, check, record_files, scan
from cumo_model.data.sampling import StepSampler, Units, plan_packs
from cumo_model.data.streamed import StreamedConversations

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
