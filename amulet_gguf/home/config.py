"""The configuration: one TOML file with the default model, the default profile, and all profiles."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from amulet_gguf.errors import ConfigError, SettingError, shown
from amulet_gguf.home.files import locked, read_file, write_atomically
from amulet_gguf.home.paths import config_file
from amulet_gguf.home.text import decoded
from amulet_gguf.llama.loading import LOADING
from amulet_gguf.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

_MAX_BYTES: Final = 2**20
_MAX_TRIES: Final = 50
_PROFILE_KEYS: Final = (*SETTINGS, "preset", *LOADING)
#: Settings that there were; a profile that has one is as good as without.
_RETIRED: Final = ("adapt",)
_TOP_KEYS: Final = ("model", "profile", "profiles")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")

SKELETON: Final = """\
# model = "smollm2"        # used where no command names one
# profile = "work"         # used where no command names one

# [profiles.work]
# prefer = ["concise", "formal:0.5"]
# strength = 4.0
# system = "You help a translator."
# temperature = 0.7
"""


@dataclass(frozen=True)
class Config:
    """What the file says.

    Attributes:
        path: of the file, which may be missing.
        model: name of the default model, or None.
        profile: name of the default profile, or None.
        profiles: values by key, by the profile's name.
        damaged: what is wrong, by the name of a profile that has a mistake.
    """

    path: Path
    model: str | None = None
    profile: str | None = None
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all profiles, damaged ones too."""
        return [*self.profiles, *self.damaged]

    def values(self, name: str) -> Mapping[str, Any]:
        """Return the values of a profile.

        Raises:
            ConfigError: there is no such profile, or it has a mistake.
        """
        if name in self.damaged:
            raise ConfigError(self.damaged[name])
        if name not in self.profiles:
            near = difflib.get_close_matches(name, self.profiles, n=1)
            known = f"did you mean {near[0]!r}?" if near else "see amulet profiles ls"
            raise ConfigError(f"there is no profile {name!r} in {self.path}: {known}")
        return self.profiles[name]

    def settings(self, name: str, start: Settings) -> Settings:
        """Return the settings of a profile; what it does not say is as in `start`.

        Raises:
            ConfigError: there is no such profile.
        """
        values = self.values(name)
        start = Settings.paper() if values.get("preset") == "paper" else start
        return dataclasses.replace(start, **{key: values[key] for key in values if key in SETTINGS})


def load_config() -> Config:
    """Read the configuration; a missing file is an empty one.

    Raises:
        ConfigError: it cannot be read, or has a mistake elsewhere than in a profile.
    """
    path = config_file()
    return parse(read(path), path)


def parse(text: str, path: Path) -> Config:
    """Read a configuration from its text; `path` is for messages.

    Raises:
        ConfigError: it has a mistake elsewhere than in a profile.
    """
    if not text.strip():
        return Config(path)  # without the time that importing a parser takes
    document = _parse_toml(text, path).unwrap()

    def fail(table: str, key: str, what: str) -> ConfigError:
        return ConfigError(f"{path}, line {find_line(text, table, key)}: {what}")

    for key, value in document.items():
        if key not in _TOP_KEYS:
            raise fail("", key, f"unknown key {key!r}{_near(key, _TOP_KEYS)}")
        kind = dict if key == "profiles" else str
        if not isinstance(value, kind):
            expected = "tables [profiles.NAME]" if kind is dict else "a text"
            raise fail("", key, f"{key} must be {expected}, got {shown(value)}")

    def check_profile(name: str, values: Any) -> None:
        table = f"profiles.{name}"
        if not _NAME.fullmatch(name):
            raise fail(table, "", f"{name!r} is not a name for a profile: letters, digits, - and _")
        if not isinstance(values, dict):
            raise fail("profiles", name, f"profiles.{name} must be a table, got {shown(values)}")
        for key in _RETIRED:
            values.pop(key, None)
        for key in values:
            if key not in _PROFILE_KEYS:
                what = f"unknown key {key!r} in [{table}]{_near(key, _PROFILE_KEYS)}"
                raise fail(table, key, what)
            try:
                check(key, values[key])
            except SettingError as error:
                raise fail(table, key, f"{key} in [{table}]: {error}") from None
        try:
            Settings(**{key: values[key] for key in values if key in SETTINGS})
        except SettingError as error:
            raise fail(table, "", f"[{table}]: {error}") from None

    profiles, damaged = document.get("profiles", {}), {}
    for name, values in profiles.items():
        try:
            check_profile(name, values)
        except ConfigError as error:  # noqa: PERF203
            damaged[name] = str(error)
    default = document.get("profile")
    if default is not None and default not in profiles:
        raise fail("", "profile", f"the default profile {default!r} is not among the profiles")
    good = {name: values for name, values in profiles.items() if name not in damaged}
    return Config(path, document.get("model"), default, good, damaged)


def check(key: str, value: Any) -> None:
    """Raise SettingError unless a profile may have this value for this key."""
    if key == "preset":
        if value != "paper":
            raise SettingError(f'preset must be "paper", got {shown(value)}', key)
    elif value is not None:
        (SETTINGS if key in SETTINGS else LOADING)[key].checked(key, value)


def set_model(name: str | None) -> None:
    """Make a model the default one; None: no longer any."""
    _edit(lambda text: _with_key(text, "model", name))


def set_default_profile(name: str | None) -> None:
    """Make a profile the default one; None: no longer any.

    Raises:
        ConfigError: there is no such profile.
    """
    if name is not None:
        load_config().values(name)
    _edit(lambda text: _with_key(text, "profile", name))


def set_profile(name: str, values: Mapping[str, Any]) -> None:
    """Add a profile, or replace all of it.

    Raises:
        ConfigError: a name or value is not possible.
    """
    import tomlkit

    if not _NAME.fullmatch(name) or name == "none":
        raise ConfigError(f"{name!r} is not a name for a profile: letters, digits, - and _")

    def change(text: str) -> str:
        document: Any = tomlkit.parse(text)
        table = tomlkit.table()
        table.update(values)
        profiles = document.setdefault("profiles", tomlkit.table(is_super_table=True))
        profiles[name] = table
        return tomlkit.dumps(document)

    _edit(change)


def set_profile_key(name: str, key: str, value: Any) -> None:
    """Set one value of a profile, which is added if there is none; the rest of it stays.

    Raises:
        ConfigError: a name or value is not possible.
    """
    import tomlkit

    def change(text: str) -> str:
        document: Any = tomlkit.parse(text)
        profiles = document.setdefault("profiles", tomlkit.table(is_super_table=True))
        profiles.setdefault(name, tomlkit.table())[key] = value
        return tomlkit.dumps(document)

    _edit(change)


def remove_profile(name: str) -> None:
    """Remove a profile; if it was the default, there is none then.

    Raises:
        ConfigError: there is no such profile.
    """
    import tomlkit

    found = load_config()
    if name not in found.damaged:
        found.values(name)

    def change(text: str) -> str:
        document: Any = tomlkit.parse(text)
        document["profiles"].remove(name)
        if document.get("profile") == name:
            document.remove("profile")
        return tomlkit.dumps(document)

    _edit(change)


def write(text: str) -> None:
    """Replace the whole file by a text that is valid.

    Raises:
        ConfigError: it has a mistake, or cannot be written; the file is then as before.
    """
    path = config_file()
    _check_edit(parse(text, path), Config(path))
    with _locked(path):
        write_atomically(path, text)


def write_draft(path: Path, text: str) -> None:
    """Keep a text that cannot be the configuration.

    Raises:
        ConfigError: it cannot be written.
    """
    with _locked(config_file()):
        write_atomically(path, text)


def find_line(text: str, table: str, key: str) -> int:
    """Return the line, from 1, of a key in a table of a TOML text; that of the table if it is not found.

    TOML libraries do not tell it: it is a line that names the key and makes it appear in what is read.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    lines = text.splitlines()
    steps = [*filter(None, table.split(".")), *filter(None, [key])]
    while steps:
        named = [i for i, line in enumerate(lines) if steps[-1] in line]
        for i in named[:_MAX_TRIES]:
            for end in range(i + 1, len(lines) + 1):
                try:
                    found: Any = tomlkit.parse("\n".join(lines[:end])).unwrap()
                except TOMLKitError:
                    continue  # a value of several lines
                with contextlib.suppress(KeyError, TypeError):
                    for step in steps:
                        found = found[step]
                    return i + 1
                break
        steps.pop()
    return 1


def read(path: Path) -> str:
    """Return the text of a configuration; a missing file is an empty one.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return decoded(read_file(path, _MAX_BYTES))
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(f"{path} is not text in UTF-8: save it as such") from None


def _parse_toml(text: str, path: Path) -> TOMLDocument:
    import tomlkit
    from tomlkit.exceptions import ParseError, TOMLKitError

    try:
        return tomlkit.parse(text)
    except ParseError as error:
        what = re.sub(r" at line \d+ col \d+$", "", str(error))
        raise ConfigError(f"{path}, line {error.line}: {what}") from None
    except (TOMLKitError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split()) or 'it is not TOML'}") from None


def _near(key: str, keys: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, keys, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(keys)}"


def _with_key(text: str, key: str, value: str | None) -> str:
    """Return the text with a key of the top set, or without it."""
    import tomlkit

    document: Any = tomlkit.parse(text)
    if value is None:
        document.pop(key, None)
    elif key in document:
        document[key] = value
    else:  # before the first table: behind one, it would be the table's
        return f"{key} = {tomlkit.item(value).as_string()}\n{text}"
    return tomlkit.dumps(document)


def _edit(change: Callable[[str], str]) -> None:
    """Change the file, keeping other processes from it meanwhile."""
    path = config_file()
    with _locked(path):
        text = read(path)
        before = parse(text, path)  # an edit must not touch a file that has a mistake already
        text = change(text)
        _check_edit(parse(text, path), before)
        write_atomically(path, text)


def _check_edit(after: Config, before: Config) -> None:
    """Raise ConfigError where a profile has become damaged."""
    for name in after.damaged:
        if name not in before.damaged:
            after.values(name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        with locked(path):
            yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
