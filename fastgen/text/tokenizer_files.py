"""TokenizerFiles: what lies in a folder that a tokenizer can be read from.

None of it is trusted: files must lie in the folder, JSON is strict, and nothing in them is run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from fastgen.checkpoints.files import checked_file, holds, read_json, read_text
from fastgen.errors import CheckpointError, shown

T = TypeVar("T")

JSON_FILE = "tokenizer.json"
CONFIG_FILE, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
# Files that hold a vocabulary, whether or not they can be read here.
_VOCABULARIES = (
    *(JSON_FILE, "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tokenizer.model", "tekken.json", "tiktoken.model"),
)
# All that a tokenizer may be read from.
TOKENIZER_FILES = (
    *_VOCABULARIES,
    *(CONFIG_FILE, _TEMPLATE_FILE, "special_tokens_map.json", "added_tokens.json"),
)
# Settings that transformers hands to a tokenizer in place of what its files hold.
_REPLACING = ("init_inputs", "merges", "vocab")


class TokenizerFiles:
    """The tokenizer's files in one folder.

    Attributes:
        folder: where they lie.
        vocabularies: the names of those that hold a vocabulary.
        settings: tokenizer_config.json; empty if there is none.
        class_name: the class that tokenizer_config.json names, else config.json, without the
            ending "Fast"; None if neither does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vocabularies = [name for name in _VOCABULARIES if holds(folder, name)]
        self.settings = self.json_object(CONFIG_FILE) if self.vocabularies else {}
        self.class_name = self._class_name() if self.vocabularies else None
        self._check_settings()

    def holds(self, *names: str) -> bool:
        """Whether all of these are there."""
        return all(holds(self.folder, name) for name in names)

    def path(self, name: str) -> Path:
        """Of a file that is there, and lies in the folder; raises CheckpointError."""
        return checked_file(self.folder, name)

    def json_object(self, name: str) -> dict[str, Any]:
        """The object in a file of JSON; empty if there is no such file."""
        if not holds(self.folder, name):
            return {}
        value = read_json(self.folder, name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.folder / name}: must hold a JSON object")
        return value

    def switch(self, name: str, default: bool) -> bool:
        """A setting that is true or false.

        Raises:
            CheckpointError: it is anything else, null too.
        """
        value = self.settings.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.folder}/{CONFIG_FILE}: {name} must be true or false, not {shown(value)}"
            )
        return value

    def chat_template(self) -> str | None:
        """The Jinja source for chats: chat_template.jinja, else what tokenizer_config.json has.

        Of several with names it is the one that is named "default", as in transformers'
        `get_chat_template()`. The folder additional_chat_templates/ is not read.
        """
        if self.holds(_TEMPLATE_FILE):
            return read_text(self.folder, _TEMPLATE_FILE)
        value = self.settings.get("chat_template")
        if isinstance(value, list):  # [{"name": ..., "template": ...}, ...]
            listed = [one if isinstance(one, dict) else {} for one in value]
            value = {one.get("name"): one.get("template") for one in listed}
        if value is None:
            return None
        named = value if isinstance(value, dict) else {"default": value}
        if not all(isinstance(text, str) for item in named.items() for text in item):
            raise CheckpointError(
                f"{self.folder}/{CONFIG_FILE}: chat_template must be a string or a list of "
                f'{{"name": ..., "template": ...}}, not {shown(self.settings["chat_template"])}'
            )
        return named.get("default")

    @cached_property
    def stored_json(self) -> dict[str, Any]:
        """tokenizer.json, as it stands; empty if there is none, or it holds no object."""
        value = read_json(self.folder, JSON_FILE) if self.holds(JSON_FILE) else {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def stored(self) -> tokenizers.Tokenizer:
        """tokenizer.json, as the library opens it."""
        path = self.path(JSON_FILE)
        self._check_merges()
        return usable(path, lambda: tokenizers.Tokenizer.from_file(str(path)))

    def _class_name(self) -> str | None:
        for file in (CONFIG_FILE, "config.json"):
            name = self.json_object(file).get("tokenizer_class")
            if isinstance(name, str):
                return name.removesuffix("Fast")
            if name is not None:
                raise CheckpointError(
                    f"{self.folder / file}: tokenizer_class must be a name, not {shown(name)}"
                )
        return None

    def _check_settings(self) -> None:
        found = [key for key in _REPLACING if self.settings.get(key)]
        if set(self.settings.get("fast_tokenizer_files") or ()) > {JSON_FILE}:
            found.append("fast_tokenizer_files")
        if found:
            raise CheckpointError(f"{self.folder}/{CONFIG_FILE}: {found[0]} is not supported")

    def _check_merges(self) -> None:
        """What a merge cuts off must be there: elsewhere the library may cut within a character,
        and abort the process. The file is strict JSON, so that the library sees what is checked.
        """
        model = self.stored_json.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            return
        prefix = model.get("continuing_subword_prefix") or ""
        for merge in model["merges"] if prefix else ():
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if not (isinstance(parts, list) and parts and str(parts[-1]).startswith(str(prefix))):
                raise CheckpointError(
                    f"{self.folder}/tokenizer.json: not a usable tokenizer: merge {shown(merge)} "
                    f"does not have the continuing_subword_prefix {shown(prefix)}"
                )


def usable(where: Path | str, build: Callable[[], T]) -> T:
    """What `build` makes; CheckpointError, with `where`, if the library cannot make it."""
    try:
        return build()
    except CheckpointError:
        raise
    except BaseException as error:  # bare Exception for what it cannot parse, or a Rust panic
        if not is_librarys(error):
            raise
        raise CheckpointError(f"{where}: not a usable tokenizer: {error}") from error


def is_librarys(error: BaseException) -> bool:
    """Not Ctrl-C and the like: a bare Exception, or a Rust panic, which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
