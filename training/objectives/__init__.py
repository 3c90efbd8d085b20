"""What a step optimises: config sections, losses of decoders and encoders, how terms are weighted, held-out losses."""
