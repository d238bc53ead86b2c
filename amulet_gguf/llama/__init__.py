"""llama.cpp and its files, made safe."""

import os

#: Cores that this process may use, from before llama.cpp: its OpenMP may bind a thread to one of them.
AFFINITY = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
