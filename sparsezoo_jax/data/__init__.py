"""From a corpus to batches: documents, tokenizers, packed records and the Grain pipeline."""
