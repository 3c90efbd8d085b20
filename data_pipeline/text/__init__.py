"""From a record to a tokenised sample, for decoders: chat templates, label masks, tokenizers."""
