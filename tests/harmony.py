"""Conversations rendered as the hub's chat template is called, for tests that compare with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.chat.render import harmony_messages, render_message, render_prompt
from models.chat.tokenizer import Tokenizer


def render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Ids of a prompt; or of the template's training render, whose last answer ends in <|return|>."""
    chat = harmony_messages(messages, keeps_last_analysis=not add_generation_prompt, **options)
    if add_generation_prompt:
        return render_prompt(chat, tokenizer)
    ids = [id for message in chat for id in render_message(message, tokenizer)]
    return [*ids[:-1], tokenizer.return_] if chat[-1].channel == "final" else ids
