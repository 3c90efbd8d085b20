"""Objectives: their config sections, losses of decoders and encoders, weights of loss terms, held-out losses."""
