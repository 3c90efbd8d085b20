"""ShifCon: the shift, language vectors, contrastive loss, subspaces."""
