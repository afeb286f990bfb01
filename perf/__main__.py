"""Asks every question, and stores the answers under perf/results/."""

import torch

from perf import bench, compiled_call, eager_call

torch.set_num_threads(1)
torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))  # imports the compiler
for question in (eager_call, compiled_call):
    name = question.__name__.rpartition(".")[2]
    print(f"{name}: {question.__doc__.splitlines()[0]}")
    print(f"-> {bench.store(name, question.main())}")
