"""Text in, blocks of token ids out: corpora, tokenizers, packing, prepared shards and resumable batches."""
