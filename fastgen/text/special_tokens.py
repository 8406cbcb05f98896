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
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from fastgen.text.tokenizer_files import TokenizerFiles

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = "extra_special_tokens"

Token = str | AddedToken


class SpecialTokens(NamedTuple):
    """Tokens with ids; tokens by role or other name; tokens that are merely special."""

    added: dict[int, AddedToken]
    named: dict[str, Token]
    extra: list[Token]


def special_tokens(files: TokenizerFiles, defaults: Mapping[str, Any]) -> SpecialTokens:
    """What the files list. `defaults`: the class's own tokens by role, for roles not named.

    Raises:
        TypeError, ValueError, AttributeError: a file holds something else than tokens.
    """
    settings = dict(files.settings)
    if "additional_special_tokens" in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop("additional_special_tokens")
    names = _take_names(settings) | _take_extra_names(settings)
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"].items()
        added = {int(token_id): AddedToken(**token) for token_id, token in listed}
    else:
        _merge_map(settings, files.json_object("special_tokens_map.json"))
        names |= _take_extra_names(settings)
        added = _listed_elsewhere(files, settings)
    if "additional_special_tokens" in settings and _EXTRA not in settings:
        settings[_EXTRA] = settings["additional_special_tokens"]
    named = _roles(settings, added, defaults) | _other_names(settings, names)
    extra = [token for value in settings.get(_EXTRA) or () if (token := _as_token(value))]
    return SpecialTokens(added, named, extra)


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


def _take_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Other `..._token` settings: special under a name of the model's own."""
    names = [
        key
        for key, value in settings.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, str)
    ]
    return {key: settings.pop(key) for key in names}


def _take_extra_names(settings: dict[str, Any]) -> dict[str, Any]:
    """`extra_special_tokens` may be an object of names, too."""
    return settings.pop(_EXTRA) if isinstance(settings.get(_EXTRA), dict) else {}


def _merge_map(settings: dict[str, Any], special_map: dict[str, Any]) -> None:
    """special_tokens_map.json counts over tokenizer_config.json; extra tokens are joined."""
    for key, value in special_map.items():
        if key == _EXTRA and isinstance(value, list):
            before = list(settings.get(_EXTRA) or ())
            tokens = [_special(token) for token in value]
            settings[key] = [*before, *(token for token in tokens if token not in before)]
        else:
            settings[key] = value if key == _EXTRA else _special(value)


def _special(value: Any) -> Any:
    return AddedToken(**{**value, "special": True}) if isinstance(value, dict) else value


def _listed_elsewhere(files: TokenizerFiles, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens by id, of added_tokens.json and tokenizer.json."""
    special = {str(settings[role]) for role in ROLES if settings.get(role)}
    special |= {str(token) for token in settings.get(_EXTRA) or ()}
    added = {}
    for content, token_id in files.json_object("added_tokens.json").items():
        flag = content in special
        added[token_id] = AddedToken(content, normalized=not flag, special=flag)
    for token in files.stored_json.get("added_tokens") or ():
        flags = {key: value for key, value in token.items() if key != "id"}
        added[token["id"]] = AddedToken(**flags)
    return added


def _roles(
    settings: dict[str, Any], added: dict[int, AddedToken], defaults: Mapping[str, Any]
) -> dict[str, Token]:
    """The token of each role that has one, as it is flagged where it is listed with an id."""
    by_content: dict[str, Token] = {token.content: token for token in added.values()}
    roles: dict[str, Token] = {}
    for role in ROLES:
        token = _as_token(settings.get(role, defaults.get(role)))
        if token is not None:
            roles[role] = by_content.get(str(token), token) if role in settings else token
    return roles


def _other_names(settings: dict[str, Any], names: dict[str, Any]) -> dict[str, Token]:
    """`names`, after the `..._token` settings of special_tokens_map.json, or with flags."""
    others = {key: value for key, value in settings.items() if key.endswith("_token")}
    return {
        key: token
        for key, value in (others | names).items()
        if key not in ROLES and (token := _as_token(value)) is not None
    }


def _as_token(value: Any) -> Token | None:
    """A token is written as a string, or as an object with its content and flags."""
    if isinstance(value, str | AddedToken):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"})
    return None
