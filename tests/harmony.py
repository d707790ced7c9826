"""Conversations rendered as the hub's chat template is called, and ids of text that spells control tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from models.chat.render import harmony_messages, render_message, render_prompt
from models.chat.tokenizer import CONTROL_TOKENS, Tokenizer


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Ids of a prompt; or of the template's training render, whose last answer ends in <|return|>."""
    chat = harmony_messages(messages, keeps_last_analysis=not add_generation_prompt, **options)
    if add_generation_prompt:
        return render_prompt(chat, tokenizer)
    ids = [id for message in chat for id in render_message(message, tokenizer)]
    return [*ids[:-1], tokenizer.return_] if chat[-1].channel == "final" else ids


def encode_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which the control tokens that it spells are control tokens."""
    ids = []
    for piece in re.split(r"(<\|\w+\|>)", text):
        name = piece[2:-2]
        is_control = piece in CONTROL_TOKENS
        ids += [getattr(tokenizer, "return_" if name == "return" else name)] if is_control else tokenizer.encode(piece)
    return ids
