"""Parts of `memory_vs_mc.py`: options, data, sweep (a fresh `point` process per method and n_mc), report, plot."""
