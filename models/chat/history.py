"""What of a conversation the model sees again when the user goes on after its answer (models/chat/render.py: kept_messages)."""

from models.chat.form import Form
from models.chat.parse import parse_completion
from models.chat.render import Message, generation_prompt, kept_messages
from models.chat.tokenizer import Tokenizer


def history_ids(prompt_ids: list[int], turn_ids: list[int], tokenizer: Tokenizer, form: Form) -> list[int]:
    """A prompt and the turn that answered it, as the beginning of the next prompt: the same ids without the messages that are
    dropped, <|end|> for <|return|>. turn_ids: all behind the prompt's `<|start|>assistant`, up to <|return|>. What is no message,
    before the first <|start|> or malformed, stays."""
    assert prompt_ids[-2:] == generation_prompt(tokenizer)[-2:], prompt_ids[-2:]
    assert turn_ids[-1] == tokenizer.return_, turn_ids[-1]
    ids = [*prompt_ids, *turn_ids[:-1], tokenizer.end]
    starts = [place for place, id in enumerate(ids) if id == tokenizer.start]
    pieces = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)])]
    kept = kept_messages([_message_of(piece, tokenizer) for piece in pieces], form)
    return [*ids[:starts[0]], *(id for piece, is_kept in zip(pieces, kept) if is_kept for id in piece)]


def _message_of(piece: list[int], tokenizer: Tokenizer) -> Message:
    parsed = parse_completion(piece, tokenizer, role=None)
    return parsed.messages[0] if parsed.error is None and len(parsed.messages) == 1 else Message("malformed", "")
