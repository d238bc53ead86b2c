"""llama.cpp's libraries, which are loaded by their paths."""

from PyInstaller.utils.hooks import collect_dynamic_libs

binaries = [each for each in collect_dynamic_libs("llama_cpp") if "mtmd" not in each[0]]  # for pictures
excludedimports = ["transformers"]  # for tokenizers that are not in the file of the model
