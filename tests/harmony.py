"""Conversations rendered as the hub's chat template is called, and ids of text that spells control tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from models.chat.render import Message, harmony_messages, render_message, render_prompt
from models.chat.tokenizer import CONTROL_TOKENS, Tokenizer


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Ids of a prompt; or what the template renders for training: the last answer with its analysis, ending in <|return|>."""
    chat = harmony_messages(messages, **options)
    if add_generation_prompt:
        return render_prompt(chat, tokenizer)
    thoughts = [messages[-1][key] for key in ("thinking", "reasoning_content", "reasoning") if messages[-1].get(key) is not None]
    if chat[-1].channel == "final" and thoughts:
        chat.insert(-1, Message("assistant", thoughts[0], "analysis"))
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
