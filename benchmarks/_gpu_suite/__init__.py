"""The GPU suite: its parts, the processes that they run in, the record that stays, and the table made from it.

In the order to read: `process` (one command under a time limit), `parts` (what there is to run), `suite` (run them,
keep `suite.json`), `figures` and `table` (from a folder of results to one table). `build`, `gpu_tests` with `live`, and
`sanitizer` are the parts that are not benchmarks; they are scripts with the options of `_script.py` like the others.
Everything that `gpu_suite.py` itself imports does without torch: the process that waits must hold no GPU memory, and a
table can be made anywhere.
"""
