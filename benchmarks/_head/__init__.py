"""Parts of `benchmarks/head.py`, in the order they are used.

problem   the inputs of one case: hidden states, head, masked rows in segments, advantages
truth     what is right (fp64) and how far plain torch is from it: the yardstick of every variant
variants  bare GEMMs and bgpo_kernels; the catalogue of everything that is compared
peers     plain torch and other libraries
case      check, measure and time the variants of one case
report    targets and the printed table, from a row's JSON
plot      bars, from the JSON file
"""
