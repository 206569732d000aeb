"""Conversations as data sets hold them, made one form: turns of a role and a text, and these rendered as a model reads them."""

import ast
import json
import re

from hfprune_nb.errors import UserError

COLUMNS = ("messages", "conversations", "conversation")
# Some templates tell the model today's date; a fixed one gives the same text every day, and is that which LLaMA 3's fall back to.
_FIXED_DATE = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# Tables often hold turns as text, in JSON's spelling or in Python's.
_SPELT_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def is_turns(value) -> bool:
    """Return whether `value` is a conversation: a list of turns, or its spelling as JSON or Python text."""
    if isinstance(value, str):
        return bool(_SPELT_TURNS.match(value))
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def turns(value, place: str) -> list[dict[str, str]]:
    """Return a conversation as [{"role": ..., "content": text}, ...], from any form in use.

    Roles and texts stand under `role` and `content` (OpenAI, also with a list of text parts) or `from` and `value` (ShareGPT);
    a null text is an empty one. place : of the record, for sentences. Raises UserError for another form, and for parts that are
    no text.
    """
    if isinstance(value, str):
        value = _parsed(value, place)
    if not is_turns(value):
        raise UserError(f"{place} holds no chat turns: give a list of {{role, content}} or {{from, value}} objects")
    return [_turn(turn, place) for turn in value]


def render(tokenizer, conversation: list[dict[str, str]], place: str) -> str:
    """Return a conversation (`turns`) as one text, in the words of the tokenizer's chat template, special tokens spelt out.

    Raises UserError for a tokenizer without a template, and for turns that the template refuses.
    """
    if not tokenizer.chat_template:
        raise UserError("model: its tokenizer has no chat template: choose an instruction-tuned model or set chat_template=False")
    template = _FIXED_DATE + tokenizer.get_chat_template()
    try:
        return tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    # Templates raise what they like about roles and their order.
    except Exception as error:
        raise UserError(f"{place}: the chat template refuses its turns ({error}): correct or leave out the record") from error


def _parsed(text: str, place: str):
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    raise UserError(
        f"{place} holds text, not chat turns: give a list of {{role, content}} objects, or read it as text (chat_template=False)"
    )


def _turn(turn: dict, place: str) -> dict[str, str]:
    role, content = (turn.get(name, turn.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise UserError(
            f"{place} has a turn of {', '.join(map(str, turn))} without role and text: give {{role, content}} or {{from, value}}"
        )
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": content or ""}
