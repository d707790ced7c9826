"""What of a conversation the model sees again when the user goes on after its answer: harmony drops analysis of finished turns.

Hub's chat template: analysis of every turn that an answer has ended. openai-harmony: everything on the channel analysis before
the first answer, calls of built-in tools and their results too; later analysis stays.
"""

from models.chat.form import Form
from models.chat.parse import parse_completion
from models.chat.render import generation_prompt, kept_messages
from models.chat.tokenizer import Tokenizer


def history_ids(prompt_ids: list[int], turn_ids: list[int], tokenizer: Tokenizer, form: Form) -> list[int]:
    """A prompt and the turn that answered it, as the beginning of the next prompt: the same ids without what is dropped, <|end|>
    for <|return|>. turn_ids: a finished answer, behind the prompt's `<|start|>assistant`. A prompt that is no harmony is kept."""
    opening = generation_prompt(tokenizer)
    assert prompt_ids[-len(opening):] == opening, prompt_ids[-len(opening):]
    assert turn_ids[-1] == tokenizer.return_, turn_ids[-1]
    head, ids = [], [*prompt_ids, *turn_ids[:-1], tokenizer.end]
    parsed = parse_completion(ids, tokenizer, role=None)
    if parsed.error is not None:
        head, ids = prompt_ids[:-len(opening)], [*opening, *turn_ids[:-1], tokenizer.end]
        parsed = parse_completion(ids, tokenizer, role=None)
    assert parsed.error is None, parsed.error
    ends = [span.stop for span in parsed.spans]
    is_kept = kept_messages(parsed.messages, form)
    pieces = [ids[start:end] for start, end, is_wanted in zip([0, *ends], ends, is_kept) if is_wanted]
    return [*head, *(id for piece in pieces for id in piece)]
