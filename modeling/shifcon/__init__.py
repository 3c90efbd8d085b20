"""ShifCon: language vectors, shift, contrastive loss, and distances between languages."""
