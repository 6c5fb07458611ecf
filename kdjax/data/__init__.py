"""From rows in files to static batches: formats, chat templates, packing and the resumable stream."""

from kdjax.data.batch import Batch, Document, HostBatch, Placed, bucket, collate
from kdjax.data.prompts import EndlessPrompts, Fault, Prompt, Prompts, response_text
from kdjax.data.source import BatchSource, Statistics
from kdjax.data.stream import DataStream, eval_batches
from kdjax.data.template import Encoder
from kdjax.data.vocabulary import VocabularyMatch, compare_vocabularies, load_tokenizer, valid_ids

__all__ = [
    "Batch",
    "BatchSource",
    "DataStream",
    "Document",
    "Encoder",
    "EndlessPrompts",
    "Fault",
    "HostBatch",
    "Placed",
    "Prompt",
    "Prompts",
    "Statistics",
    "VocabularyMatch",
    "bucket",
    "collate",
    "compare_vocabularies",
    "eval_batches",
    "load_tokenizer",
    "response_text",
    "valid_ids",
]
