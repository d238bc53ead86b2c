"""llama.cpp and its files, made safe."""
