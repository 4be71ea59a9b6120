"""Compiles the train step and the sampler for accelerators that are not there: memory, work and time per chip."""
