"""Tokenised samples for decoders: chat templates, label masks, truncation, tokenizer training."""
