"""Corpora, tokenizers, packing and batches.

`open_tokenizer` -> `prepare` -> `prepared_batches` (or `streaming_batches` without preparing).
Importing this is cheap: TFDS, Grain, PyArrow and the tokenizer libraries are imported by the functions that need them.
"""

from sparsezoo_jax.data.batches import Batch, BatchIterator, State, merge_states
from sparsezoo_jax.data.chat import chat_prompt, copy_template
from sparsezoo_jax.data.config import Component, DataConfig, cache_directory, local_cache
from sparsezoo_jax.data.corpora import open_documents
from sparsezoo_jax.data.corpus import CORPORA, Corpus, register_corpus
from sparsezoo_jax.data.documents import Document, Documents
from sparsezoo_jax.data.manifest import PreparedSplit, load_prepared
from sparsezoo_jax.data.mixtures import (
    Prepared,
    PreparedComponent,
    PreparedMixture,
    components_of,
    open_tokenizer,
    prepare,
    weighted,
)
from sparsezoo_jax.data.pipeline import PreparedBatches, evaluation_batches, prepared_batches
from sparsezoo_jax.data.preparation import prepare_split
from sparsezoo_jax.data.special_tokens import stop_ids
from sparsezoo_jax.data.statistics import BigramEntropy, UnigramEntropy, bigram_entropy, unigram_entropy
from sparsezoo_jax.data.streaming import StreamingBatches, streaming_batches
from sparsezoo_jax.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    continuation,
    find_tokenizer,
    load_tokenizer,
    pieces,
    register_tokenizer,
)
from sparsezoo_jax.data.trained_tokenizers import build_tokenizer, train_bpe

__all__ = [
    "CORPORA",
    "Batch",
    "BatchIterator",
    "BigramEntropy",
    "Component",
    "Corpus",
    "DataConfig",
    "Document",
    "Documents",
    "HFTokenizer",
    "Prepared",
    "PreparedBatches",
    "PreparedComponent",
    "PreparedMixture",
    "PreparedSplit",
    "SentencePieceTokenizer",
    "State",
    "StreamDecoder",
    "StreamingBatches",
    "Tokenizer",
    "UnigramEntropy",
    "bigram_entropy",
    "build_tokenizer",
    "cache_directory",
    "chat_prompt",
    "components_of",
    "continuation",
    "copy_template",
    "evaluation_batches",
    "find_tokenizer",
    "load_prepared",
    "load_tokenizer",
    "local_cache",
    "merge_states",
    "open_documents",
    "open_tokenizer",
    "pieces",
    "prepare",
    "prepare_split",
    "prepared_batches",
    "register_corpus",
    "register_tokenizer",
    "stop_ids",
    "streaming_batches",
    "train_bpe",
    "unigram_entropy",
    "weighted",
]
