"""The tokens that stand beside a vocabulary, read from every file that may name them.

As transformers reads them (PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__),
in its order:

1. tokenizer_config.json: the roles (`bos_token` to `mask_token`), `extra_special_tokens` (of old:
   `additional_special_tokens`), every other `..._token`, and `added_tokens_decoder`, by id.
2. Without an `added_tokens_decoder`: special_tokens_map.json over these, then added_tokens.json,
   then the `added_tokens` of tokenizer.json.
3. What the tokenizer's class says of a role that no file names.

Tokens with an id come first, by id; then roles, other names and extra ones that are not there yet:
one in the vocabulary keeps its id, another gets the next free one.

What transformers raises for is refused: a token must be a string, or an object of an AddedToken's
fields where the file may write it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from fastgen.errors import CheckpointError, shown
from fastgen.text.tokenizer_files import CONFIG_FILE, JSON_FILE, TokenizerFiles

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_NAMED = "model_specific_special_tokens"  # transformers' own name for tokens with other names
_BY_ID, _MAP_FILE, _ADDED_FILE = (
    "added_tokens_decoder",
    "special_tokens_map.json",
    "added_tokens.json",
)

Token = str | AddedToken


class SpecialTokens(NamedTuple):
    """Tokens with ids; tokens by role or other name; tokens that are merely special."""

    added: dict[int, AddedToken]
    named: dict[str, Token]
    extra: list[Token]

    @property
    def roles(self) -> dict[str, str]:
        """Texts of the tokens that have a role, by role."""
        return {role: str(self.named[role]) for role in ROLES if role in self.named}


def special_tokens(files: TokenizerFiles, defaults: Mapping[str, Any]) -> SpecialTokens:
    """What the files list. `defaults`: the class's own tokens by role, for roles not named.

    Raises:
        CheckpointError: a file holds something else than tokens; names the file and the key.
    """
    return _Settings(files).tokens(defaults)


def add_special_tokens(tokenizer: tokenizers.Tokenizer, tokens: SpecialTokens) -> None:
    """Add them to what `tokenizer` has.

    Raises:
        ValueError: a token cannot have the id that it is listed with.
    """
    present = tokenizer.get_added_tokens_decoder().values()
    forms, contents = {repr(token) for token in present}, {token.content for token in present}
    new: list[Token] = [t for _, t in sorted(tokens.added.items()) if repr(t) not in forms]
    contents |= {str(token) for token in new}
    for token in (*tokens.named.values(), *tokens.extra):
        if str(token) not in contents and token not in new:
            new.append(token)
    roles = {str(token) for token in tokens.named.values()}
    tokenizer.add_tokens([_flagged(token, roles) for token in new])
    for token_id, token in tokens.added.items():
        if tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(f"added token {token.content!r} cannot have id {token_id}")


def _flagged(token: Token, roles: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if str(token) in roles:
        token.special = True
    return token


class _Settings:
    """The settings of tokenizer_config.json, then those of special_tokens_map.json over them.

    `_source` is the file in which a key was found last, `_written` the key as that file has it.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._files, self._values = files, dict(files.settings)
        if files.holds(JSON_FILE):
            for name in ("add_bos_token", "add_eos_token"):
                self._values.pop(name, None)  # only a vocabulary's files leave this open
        self._source = dict.fromkeys(self._values, CONFIG_FILE)
        self._written: dict[str, str] = {}

    def tokens(self, defaults: Mapping[str, Any]) -> SpecialTokens:
        self._take_names()
        if _BY_ID in self._values:
            added = self._by_id()
        else:
            self._merge_map()
            added = self._listed_elsewhere()
        named = self._roles(added, defaults) | self._other_names()
        return SpecialTokens(added, named, self._extra())

    def _take_names(self) -> None:
        """Collect other `..._token` settings that are strings, and extra tokens with names."""
        values = self._values
        if _EXTRA_BEFORE in values and not values.get(_EXTRA):
            values[_EXTRA] = self._moved(_EXTRA_BEFORE, _EXTRA)
        names = {key: values[key] for key in values if _is_name(key, values[key], str)}
        for key in names:
            del values[key]
        if isinstance(values.get(_EXTRA), dict):
            names |= self._moved(_EXTRA, _NAMED)
        if names:
            values[_NAMED] = names

    def _moved(self, before: str, key: str) -> Any:
        """Take the value of the key `before`; it is to stand under `key`."""
        self._source[key], self._written[key] = self._source[before], self._as_written(before)
        return self._values.pop(before)

    def _as_written(self, key: str) -> str:
        return self._written.get(key, key)

    def _by_id(self) -> dict[int, AddedToken]:
        listed = self._object(_BY_ID)
        added = {}
        for token_id, flags in listed.items():
            if not isinstance(flags, dict):
                raise self._wrong(_BY_ID, f"{shown(flags)} is not an object with a token's fields")
            try:
                added[int(token_id)] = self._made(_BY_ID, flags)
            except ValueError:
                raise self._wrong(_BY_ID, f"{shown(token_id)} is not a token id") from None
        return added

    def _merge_map(self) -> None:
        """special_tokens_map.json counts over tokenizer_config.json; extra tokens are joined."""
        for key, value in self._files.json_object(_MAP_FILE).items():
            self._source[key], self._written[key] = _MAP_FILE, key
            if isinstance(value, dict) and key != _EXTRA:
                value = self._made(key, {**value, "special": True})
            elif isinstance(value, list) and key == _EXTRA:
                value = self._joined(value)
            self._values[key] = value
        if isinstance(self._values.get(_EXTRA), dict):
            self._values[_NAMED] = self._object(_NAMED) | self._moved(_EXTRA, _NAMED)

    def _joined(self, extra: list[Any]) -> list[Any]:
        before = self._values.get(_EXTRA) or []
        if not isinstance(before, list):
            raise self._wrong(_EXTRA, f"{shown(before)} in {CONFIG_FILE} is not a list of tokens")
        joined = list(before)
        for value in extra:
            if isinstance(value, dict) and "special" in value:
                raise self._wrong(_EXTRA, f"{shown(value)} may not say whether it is special")
            special = isinstance(value, dict)
            token = self._made(_EXTRA, {**value, "special": True}) if special else value
            if token not in joined:
                joined.append(token)
        return joined

    def _listed_elsewhere(self) -> dict[int, AddedToken]:
        """Tokens by id, of added_tokens.json and tokenizer.json."""
        special = {str(self._values[role]) for role in ROLES if self._values.get(role)}
        special |= {str(token) for token in self._list(_EXTRA)}
        added = {}
        for content, token_id in self._files.json_object(_ADDED_FILE).items():
            if type(token_id) is not int:
                raise CheckpointError(
                    f"{self._files.folder / _ADDED_FILE}: {shown(content)}: {shown(token_id)} is "
                    "not a token id"
                )
            flag = content in special
            added[token_id] = AddedToken(content, normalized=not flag, special=flag)
        for token in self._files.stored_json.get("added_tokens") or ():
            flags = {key: value for key, value in token.items() if key != "id"}
            added[token["id"]] = AddedToken(**flags)
        return added

    def _roles(self, added: dict[int, AddedToken], defaults: Mapping[str, Any]) -> dict[str, Token]:
        """The token of each role that has one, as it is flagged where it is listed with an id."""
        by_content: dict[str, Token] = {token.content: token for token in added.values()}
        roles: dict[str, Token] = {}
        for role in ROLES:
            if role not in self._values and defaults.get(role) is not None:
                roles[role] = defaults[role]
            elif self._values.get(role) is not None:
                token = self._token(role, self._values[role])
                roles[role] = by_content.get(str(token), token)
        return roles

    def _other_names(self) -> dict[str, Token]:
        """`..._token` settings with flags, or of special_tokens_map.json; then those collected."""
        values = {key: self._typed(key, value) for key, value in self._values.items()}
        others = {k: v for k, v in values.items() if _is_name(k, v, str | AddedToken)}
        named = {key: self._token(_NAMED, value) for key, value in self._object(_NAMED).items()}
        return others | named

    def _extra(self) -> list[Token]:
        if _EXTRA_BEFORE in self._values and _EXTRA not in self._values:
            self._values[_EXTRA] = self._moved(_EXTRA_BEFORE, _EXTRA)
        return [self._token(_EXTRA, value) for value in self._list(_EXTRA)]

    def _list(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, f"{shown(value)} is not a list of tokens")
        return value or []

    def _object(self, key: str) -> dict[str, Any]:
        value = self._values.get(key)
        if value is None and key == _NAMED:
            return {}
        if not isinstance(value, dict) or value.get("__type") == "AddedToken":
            raise self._wrong(key, f"{shown(value)} is not an object of tokens")
        return value

    def _token(self, key: str, value: Any) -> Token:
        token = self._typed(key, value)
        if not isinstance(token, str | AddedToken):
            raise self._wrong(
                key,
                f"{shown(value)} is not a token: a string, or an object of "
                'an AddedToken\'s fields with "__type": "AddedToken"',
            )
        return token

    def _typed(self, key: str, value: Any) -> Any:
        """An object that says that it is an AddedToken as one."""
        if not (isinstance(value, dict) and value.get("__type") == "AddedToken"):
            return value
        return self._made(key, {name: flag for name, flag in value.items() if name != "__type"})

    def _made(self, key: str, flags: dict[str, Any]) -> AddedToken:
        try:
            return AddedToken(**flags)
        except TypeError as error:
            raise self._wrong(key, f"{shown(flags)} is not a token: {error}") from None

    def _wrong(self, key: str, problem: str) -> CheckpointError:
        file = self._source.get(key, CONFIG_FILE)
        return CheckpointError(f"{self._files.folder / file}: {self._as_written(key)}: {problem}")


def _is_name(key: str, value: Any, kind: Any) -> bool:
    """Whether a setting is a token with a name of the model's own."""
    return key.endswith("_token") and key not in ROLES and isinstance(value, kind)
