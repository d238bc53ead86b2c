"""The commands of `amulet chat`."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from amulet_gguf.cli.options import IDLE_AVOID
from amulet_gguf.conversation import sessions
from amulet_gguf.declaration import SEVERAL, find
from amulet_gguf.errors import AmuletError, SettingError
from amulet_gguf.home.text import shortened
from amulet_gguf.preferences import PRESETS, Preference, as_preferences, parse_preferences
from amulet_gguf.settings import SETTINGS, describe

if TYPE_CHECKING:
    from amulet_gguf.cli.talk import Chat

_SHOWN_ELSEWHERE: Final = ("prefer", "avoid", "strength", "system")


@dataclass(frozen=True)
class Command:
    """A command: how it is typed, what it does, and its completions."""

    usage: str
    help: str
    run: Callable[[Chat, str], None]
    words: Callable[[], Iterable[str]] = tuple


def run(chat: Chat, line: str) -> None:
    """Run a line that begins with "/".

    Raises:
        AmuletError: it is no command, or it cannot do what was asked.
        EOFError: to leave.
    """
    name, _, rest = line[1:].partition(" ")
    name = ALIASES.get(name, name)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise SettingError(f"there is no command /{name}: {hint}")
    command.run(chat, rest.strip())


def _change(chat: Chat, **changes: Any) -> None:
    chat.conversation.settings = dataclasses.replace(chat.conversation.settings, **changes)


def _preferences(text: str) -> Sequence[Preference]:
    from amulet_gguf.cli.options import preference

    return as_preferences([preference(text)]) if text.startswith("@") else parse_preferences(text)


def _prefer(chat: Chat, text: str) -> None:
    settings = chat.conversation.settings
    if text.lower() == "none":
        _change(chat, prefer=())
    elif text.startswith("+"):
        _change(chat, prefer=(*settings.prefer, *_preferences(text[1:].strip())))
    elif text:
        _change(chat, prefer=_preferences(text))
    chat.tell(describe(chat.conversation.settings))


def _avoid(chat: Chat, text: str) -> None:
    if text:
        _change(chat, avoid=None if text.lower() == "none" else text)
    settings = chat.conversation.settings
    chat.tell(describe(settings))
    resolved = chat.conversation.amulet.planner.resolve(settings)
    if settings.avoid and settings.prefer and (resolved.strength or 0) <= 1:
        chat.tell(f"{IDLE_AVOID}: try /strength 3")


def _strength(chat: Chat, text: str) -> None:
    if text:
        _change(chat, strength=SETTINGS["strength"].parse("strength", text))
    settings = chat.conversation.settings
    if settings.prefer or settings.avoid:
        chat.tell(describe(settings))
    else:
        strength = "auto" if settings.strength is None else f"{settings.strength:g}"
        chat.tell(f"strength {strength}, once something is preferred")


def _ab(chat: Chat, text: str) -> None:
    from amulet_gguf.cli.pair import told
    from amulet_gguf.taste.taste import open_taste

    conversation = chat.conversation
    if text.lower() == "off":
        taste, chat.taste, chat.pair = chat.taste, None, None
        if taste is not None and taste.preferences():
            _change(chat, prefer=taste.preferences())
        chat.tell(describe(conversation.settings))
        return
    chat.pair = None
    chat.taste = open_taste(text or "mine", conversation.settings.prefer)
    chat.tell(f"answers come in pairs, {chat.taste.name} learns from what you choose; /ab off ends it")
    if chat.taste.choices:
        chat.tell(told(chat.taste))


def _better(chat: Chat, text: str) -> None:
    if text.upper() not in ("A", "B", "="):
        raise SettingError("/better A, /better B, or /better = for neither")
    chat.choose(text.upper())


def _set(chat: Chat, text: str) -> None:
    name, _, value = text.partition(" ")
    if not name:
        _show(chat, "")
        return
    setting = find(name, SETTINGS)
    value = value.strip()
    if name == "prefer":
        _prefer(chat, value)
        return
    if not value:
        raise SettingError(f"name a value: /set {name} VALUE")
    if setting.kind in SEVERAL and value.lower() != "none" and value[:1] not in "[{":
        parsed: Any = _split(value)
    else:
        parsed = setting.parse(name, value)
    _change(chat, **{name: parsed})
    chat.tell(f"{name} = {getattr(chat.conversation.settings, name)!r}")


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"the quotes do not match in {text!r} ({error})") from None


def _show(chat: Chat, _text: str) -> None:
    settings = chat.conversation.settings
    chat.tell(f"model: {chat.conversation.amulet.model.path}")
    chat.tell(f"session: {chat.name}")
    chat.tell(f"preferences: {describe(settings)}")
    for number, preference in enumerate(settings.prefer, 1):
        chat.tell(f"  {number}. {preference.text} (weight {preference.weight:g})")
    chat.tell(f"system: {settings.system or 'as the model has it'}")
    others = [f"{name} {getattr(settings, name)}" for name in SETTINGS if name not in _SHOWN_ELSEWHERE]
    chat.tell(", ".join(others))
    chat.tell(f"{chat.turns}, {chat.n_tokens:,} of {chat.conversation.amulet.engine.n_ctx:,} tokens")


def _system(chat: Chat, text: str) -> None:
    if text:
        _change(chat, system=None if text.lower() == "none" else text)
    chat.tell(f"system: {chat.conversation.settings.system or 'as the model has it'}")


def _regen(chat: Chat, _text: str) -> None:
    conversation, pair = chat.conversation, chat.pair
    messages = list(conversation.messages)
    draft = messages[-1]["content"] if messages else None
    if pair is not None:
        chat.pair = None
        said: str | None = pair.messages[-1]["content"]
        conversation.messages[:] = map(dict, pair.messages[:-1])
    else:
        said = conversation.undo()
    if said is None:
        raise SettingError("there is no answer to write again")
    is_answered = False
    try:
        is_answered = chat.answer(said, draft)
    finally:
        if not is_answered or chat.pair is not None:  # what was there is better than nothing
            conversation.messages[:] = messages


def _undo(chat: Chat, _text: str) -> None:
    said: str | None
    if chat.pair is not None:
        said, chat.pair = chat.pair.messages[-1]["content"], None
    else:
        said = chat.conversation.undo()
    if said is None:
        raise SettingError("there is no turn to take back")
    chat.autosave()
    chat.tell(f"taken back: {shortened(said)}")


def _save(chat: Chat, text: str) -> None:
    name, *more = _split(text) or [chat.name]
    if more not in ([], ["cache"], ["memory"]):  # its name before
        raise SettingError("/save NAME, or /save NAME cache to resume a long conversation at once")
    if name != chat.name and sessions.session_path(name).exists():
        raise SettingError(f"there is a session {name!r} already: choose another name, or remove it")
    chat.tell(f"saved: {chat.save_as(name)}")
    if more:
        cached = chat.conversation.save_cache()
        if cached is None:
            raise SettingError("nothing of the conversation is cached yet")
        model = chat.conversation.amulet.model
        path = sessions.save_cache(name, model.path, *cached, model.cache_type)
        chat.tell(f"saved: {path} ({path.stat().st_size / 1e6:,.0f} MB)")


def _load(chat: Chat, text: str) -> None:
    if not text:
        raise SettingError("/load NAME; saved are: " + (", ".join(sessions.names()) or "none"))
    chat.resume(text)


def _clear(chat: Chat, _text: str) -> None:
    chat.pair = None
    chat.conversation.clear()
    chat.name = sessions.new_name()
    chat.tell("a new conversation; the one before is saved")


def _drop(chat: Chat, text: str) -> None:
    if text and not (text.isdecimal() and len(text) < 9 and int(text) > 0):
        raise SettingError(f"/drop N: N must be a number of turns, got {text[:40]!r}")
    before = chat.name
    chat.forget(int(text or 1))
    chat.tell(f"{chat.turns} left; {before} has all of them")


def _help(chat: Chat, _text: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        chat.tell(f"{command.usage:<{width}}  {command.help}")
    chat.tell(
        "Alt-Enter begins a new line. While an answer is written, Ctrl-C stops it, and Ctrl-Up "
        "and Ctrl-Down change the strength. Ctrl-D leaves. //TEXT says /TEXT."
    )


def _exit(_chat: Chat, _text: str) -> None:
    raise EOFError


def _setting_names() -> Sequence[str]:
    return list(SETTINGS)


def _session_names() -> Sequence[str]:
    try:
        return sessions.names()
    except AmuletError:
        return []


COMMANDS: Final[dict[str, Command]] = {
    "prefer": Command(
        "/prefer [+] TEXT[:WEIGHT] …",
        "what answers should be: presets, or sentences with ; between; + adds, none clears",
        _prefer,
        lambda: [*PRESETS, "none"],
    ),
    "avoid": Command("/avoid TEXT", "what answers should not be; none clears", _avoid),
    "strength": Command(
        "/strength N", "0: without the preference, 1: as prompting, more: beyond", _strength
    ),
    "compare": Command(
        "/compare [TEXT]",
        "four ways to answer TEXT, or the last message",
        lambda chat, text: chat.compare(text),
    ),
    "ab": Command(
        "/ab [NAME]", "answers in pairs, to learn what you prefer; off ends it", _ab, lambda: ["off"]
    ),
    "better": Command(
        "/better A|B|=", "go on with that answer of the pair", _better, lambda: ["A", "B", "="]
    ),
    "why": Command(
        "/why", "what the preferences changed in the last answer", lambda chat, _: chat.why()
    ),
    "thoughts": Command(
        "/thoughts", "what the model thought before its last answer", lambda chat, _: chat.thoughts()
    ),
    "system": Command("/system [TEXT]", "show or set the system prompt; none removes it", _system),
    "set": Command(
        "/set NAME VALUE", "change a setting: temperature, max_tokens, …", _set, _setting_names
    ),
    "show": Command("/show", "model, preferences and settings", _show),
    "regen": Command("/again", "write the last answer again, as /regen does", _regen),
    "undo": Command("/undo", "take the last turn back", _undo),
    "save": Command(
        "/save [NAME [cache]]", "save under a name; cache: to resume at once", _save, _session_names
    ),
    "load": Command("/load NAME", "go on with a saved conversation", _load, _session_names),
    "drop": Command("/drop [N]", "forget the oldest turns, when the context is full", _drop),
    "clear": Command("/clear", "begin a new conversation", _clear),
    "help": Command("/help", "this list", _help),
    "exit": Command("/exit", "leave", _exit),
}


def complete(typed: str) -> list[str]:
    """Return the words that can stand for the last one typed: commands, or what may follow one."""
    name, *words = typed.split(" ")
    if not typed.startswith("/"):
        return []
    if not words:
        return [f"/{command}" for command in COMMANDS if f"/{command}".startswith(name)]
    command = COMMANDS.get(ALIASES.get(name[1:], name[1:]))
    return [word for word in command.words() if word.startswith(words[-1])] if command else []


ALIASES: Final = {
    "quit": "exit",
    "bye": "exit",
    "q": "exit",
    "?": "help",
    "retry": "regen",
    "again": "regen",
}
