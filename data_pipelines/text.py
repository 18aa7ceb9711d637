"""The official release's rules for text: cleaning, tokenization, and decoding of generated text.

Runs that start from the release's weights, or are compared with its metrics, need these. Two things differ from the
usual ``[CLS] words [SEP]`` of ``Tokenizer.encode``: ``[SEP]`` appears only where the text itself ends in the literal
"[SEP]", and truncation removes the end, ``[SEP]`` included.
"""

import re
from collections.abc import Sequence

from data_pipelines.config import RELEASE_PROMPT
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer, join_wordpieces

_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
_SPECIAL = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")


def _clean(text: str) -> str:
    return _PUNCTUATION.sub("", text.lower()).replace("-", " ").replace("/", " ")


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


def pre_caption(caption: str, max_words: int) -> str:
    """Clean a caption: lower case, no punctuation, single spaces, at most ``max_words`` words."""
    caption = re.sub(r"\s{2,}", " ", _clean(caption).replace("<person>", "person"))
    return _first_words(caption.rstrip("\n").strip(" "), max_words)


def pre_question(question: str, max_words: int) -> str:
    """Clean a question: lower case, no punctuation; repeated spaces stay and count as empty words."""
    return _first_words(_clean(question).rstrip(" "), max_words)


def release_encode(tokenizer: WordPieceTokenizer, text: str, max_length: int | None = None) -> list[int]:
    """Return token ids ``[CLS] tokens`` without a closing ``[SEP]``, truncated to ``max_length`` ids.

    The literals "[SEP]", "[CLS]", "[PAD]", "[UNK]" and "[MASK]" are special tokens even without spaces around them.
    """
    ids = [tokenizer.cls_id]
    for part in _SPECIAL.split(text):
        if part in SPECIAL_TOKENS:
            ids.append(tokenizer.token_id(part))
        else:
            ids += tokenizer.encode(part, None, add_sep=False)[1:]
    return ids[:max_length]


def release_caption(
    tokenizer: WordPieceTokenizer, caption: str, max_length: int | None, prompt: str = RELEASE_PROMPT
) -> list[int]:
    """Return token ids of a training caption: prompt, caption and "[SEP]" concatenated without spaces.

    So the first word of the caption joins the last of the prompt ("ofa man"), as the release's weights expect.
    """
    return release_encode(tokenizer, f"{prompt}{caption}[SEP]", max_length)


def release_answer(tokenizer: WordPieceTokenizer, answer: str) -> list[int]:
    """Return token ids of an answer: ``[CLS] tokens [SEP]``, never truncated."""
    return release_encode(tokenizer, f"{answer}[SEP]")


def release_prompt_length(tokenizer: WordPieceTokenizer, prompt: str = RELEASE_PROMPT) -> int:
    """Return the number of leading labels that the release masks for a prompt: its tokens without ``[CLS]``."""
    return len(release_encode(tokenizer, prompt)) - 1


def release_decode(tokenizer: WordPieceTokenizer, ids: Sequence[int]) -> str:
    """Return the raw string of generated ids, with special tokens ("[CLS] a man [SEP] [PAD]")."""
    return join_wordpieces(tokenizer.tokens(ids))


def release_read_answer(raw: str) -> str:
    """Return the answer in a raw string; an inner ``[SEP]`` leaves a double space, as in the release."""
    for token in ("[SEP]", "[CLS]", "[PAD]"):
        raw = raw.replace(token, "")
    return raw.strip()


def release_read_caption(raw: str, prompt: str = RELEASE_PROMPT) -> str:
    """Return the caption in a raw string: what follows the last occurrence of the prompt, if any."""
    answer = release_read_answer(raw)
    return answer.split(prompt)[-1].strip() if prompt else answer
