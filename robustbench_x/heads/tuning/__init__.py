"""Tuned victims: a copy of the public encoder, fine-tuned on the downstream task, under a linear classifier."""
