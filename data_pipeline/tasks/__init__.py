"""Labelled texts for encoders: classification, tagging, question answering and masked language modelling."""
