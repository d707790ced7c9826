"""What grpo.generate shows of tokens."""
from grpo.generate import CompletionView
from models.chat.tokenizer import Tokenizer


def shown(tokenizer: Tokenizer, ids: list[int], capsys) -> str:
    view = CompletionView(tokenizer)
    for token_id in ids:
        view.feed(token_id)
    view.end_message()
    return capsys.readouterr().out
