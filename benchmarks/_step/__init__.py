"""Parts of `step.py`: models and batch, the plain update, FLOPs, the GEMM rate, measures, worker processes, plot."""
