"""Times of the operators on this machine: `python -m drwkv.kernels.bench`; `--help` lists its options.

What is timed is in `cases.py`, how in `measure.py`, the yardstick loop in `loop.py`; what must hold in `gates.py`;
what comes out in `report.py` (tables, sections of BENCHMARKS.md) and `plot.py` (the picture). Correctness is not
looked at here: `tests/kernels` does that. One block of the model is measured in `drwkv/models/bench_block.py`.
"""
