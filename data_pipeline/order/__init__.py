"""The order of training samples: language mixture, shuffling, pairing, and the plan of each step."""
