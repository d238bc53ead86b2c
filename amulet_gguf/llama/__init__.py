"""llama.cpp and its files, made safe."""

from amulet_gguf.system.platforms import usable_cores

#: Cores that this process may use, from before llama.cpp: its OpenMP may bind a thread to one of them.
AFFINITY = usable_cores()
