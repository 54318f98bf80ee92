"""Functions that stand in for those of other trainers: one module each, named after the trainer.

A trainer keeps its loss, sampler and loop, and gets its log-probabilities from here: the head on the masked rows only,
memory that does not grow with the number of maskings, masks that replay. Every module says which function of which file
it replaces, what it computes, and where it departs from the original. No module imports the trainer it serves.
"""
