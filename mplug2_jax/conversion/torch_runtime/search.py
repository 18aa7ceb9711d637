"""Beam search and answer ranking over the decoder's outputs; by default with the release's results.

* Scores are divided by a length penalty, ((5 + length) / 6) ** 0.6, at every step, and ranked so.
* A beam that emits the end token is finished; an example is done when its best beam has just finished.
* log(softmax(x)) rather than log_softmax(x), as in the release: a probability that underflows becomes minus infinity.
* There is no prompt: generation starts from the begin token.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .decoder import DecodeFn, DecoderCache, DecoderMemory, DecodeStep, TextDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of a beam search. Lengths count generated tokens: the end token, but not the begin token.

    ``begin`` and ``end`` are ids of the tokenizer; a model's ``generate`` uses its config's if they are None.

    With ``extend_finished``, as in the release, finished beams are extended beyond their end token, and when an example
    is done, all its beams are stored, finished or not.
    """

    num_beams: int = 5
    min_length: int = 1
    max_length: int = 20
    begin: int | None = None
    end: int | None = None
    extend_finished: bool = True


class DecodeOutput(NamedTuple):
    """The best sequences of each example, best first; ids start with the begin token and are 0 after ``lengths``."""

    ids: Tensor  # [b, r, m]
    scores: Tensor  # [b, r]
    lengths: Tensor  # [b, r]


@runtime_checkable
class IncrementalDecoder(Protocol):
    """The sequences so far, and a model of their next tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence [b*r], and return logits [b*r, v] for the next one."""

    def reorder(self, rows: Tensor) -> None:
        """Replace the sequences by ``rows`` of them [b*r], which the search selected."""


@torch.no_grad()
def beam_search(
    decoder: IncrementalDecoder, batch: int, config: SearchConfig, device: torch.device | None = None
) -> DecodeOutput:
    """Search ``config.num_beams`` sequences for each of ``batch`` examples, of up to ``config.max_length`` tokens.

    Raises:
        UserError: the begin or the end token is missing.
    """
    if config.begin is None or config.end is None:
        raise UserError(
            "SearchConfig.begin or SearchConfig.end is None, expected token ids; set both, or use a model's generate"
        )
    b, r = batch, config.num_beams
    ids = torch.zeros(b, r, config.max_length + 1, dtype=torch.long, device=device)
    ids[:, :, 0] = config.begin
    log_probs = torch.full((b, r), -torch.inf, device=device)
    best = DecodeOutput(torch.zeros_like(ids), log_probs.clone(), torch.zeros(b, r, dtype=torch.long, device=device))
    log_probs[:, 0] = 0.0
    unfinished = torch.ones(b, dtype=torch.bool, device=device)
    first_rows = r * torch.arange(b, device=device)[:, None]

    for position in range(config.max_length):
        logits = decoder.step(ids[:, :, position].flatten())
        next_log_probs = logits.float().softmax(-1).log().unflatten(0, (b, r))
        if position < config.min_length:
            next_log_probs[..., config.end] = -1e20

        length_penalty = ((5 + position + 1) / 6) ** 0.6
        scores, flat = ((log_probs[..., None] + next_log_probs) / length_penalty).flatten(1).topk(r)
        parent, token = flat // logits.shape[-1], flat % logits.shape[-1]
        ids = ids.take_along_dim(parent[..., None], dim=1)
        ids[:, :, position + 1] = token
        decoder.reorder((first_rows + parent).flatten())

        finished = (token == config.end) | (position == config.max_length - 1)
        done = finished[:, :1]
        is_stored = ((finished | done) if config.extend_finished else finished) & unfinished[:, None]
        lengths = torch.full_like(best.lengths, position + 2)
        best = _merge_best(best, DecodeOutput(ids, scores.where(is_stored, -torch.inf), lengths))
        log_probs = scores * length_penalty
        if not config.extend_finished:
            log_probs = log_probs.masked_fill(token == config.end, -torch.inf)
        unfinished = unfinished & ~done[:, 0]
        if not unfinished.any():
            break
    return best


def _merge_best(old: DecodeOutput, new: DecodeOutput) -> DecodeOutput:
    """Return the best sequences of both; equal scores keep the order in which they were stored."""
    ids, scores, lengths = (torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    top = order[:, : old.scores.shape[1]]
    return DecodeOutput(
        ids.take_along_dim(top[..., None], dim=1), scores[:, : top.shape[1]], lengths.take_along_dim(top, dim=1)
    )


@torch.no_grad()
def generate(
    decoder: TextDecoder, memory: DecoderMemory, config: SearchConfig, step: DecodeFn | None = None
) -> DecodeOutput:
    """Run beam search with a cache; the memory is shared by the beams of an example.

    Args:
        decoder: projects the memory, see :meth:`TextDecoder.project`.
        memory: what the texts are about.
        config: of the search.
        step: the decoder's, if it is compiled.

    Raises:
        UserError: ``max_length`` exceeds the position table.
    """
    rows = decoder.bert.embeddings.position_embeddings.num_embeddings
    if config.max_length > rows:
        raise UserError(f"generating {config.max_length} tokens exceeds max_positions={rows}; lower max_length")
    step = DecodeStep(decoder) if step is None else step
    cache = DecoderCache(step, memory, config.num_beams, config.max_length)
    return beam_search(cache, memory.mask.shape[0], config, memory.mask.device)


@torch.no_grad()
def rank_answers(
    decoder: TextDecoder, memory: Tensor, memory_mask: Tensor, answers: Tensor, answers_mask: Tensor, *,
    num_candidates: int, double_count_first_token: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the best answers of [a, m] to each example [b, num_candidates], and their probabilities among those.

    The answers are first narrowed by the probability of their first token, then scored by their log-likelihood; with
    ``double_count_first_token`` the first token counts a second time, as in the release. Answers are
    ``[CLS] words [SEP] pad``.
    """
    b = memory.shape[0]
    first = decoder(answers[:1, :1].expand(b, 1), None, memory, memory_mask)[:, 0].float().softmax(-1)
    probabilities, selected = first[:, answers[:, 1]].topk(num_candidates)

    ids, mask = answers[selected].flatten(0, 1), answers_mask[selected].flatten(0, 1)  # [b*num_candidates, m]
    logits = decoder(ids, mask, memory, memory_mask)
    log_likelihood = -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    total = (log_likelihood * mask[:, 1:]).sum(-1).unflatten(0, (b, num_candidates))

    if double_count_first_token:
        total = total + probabilities.log()
    ranked, order = total.softmax(-1).sort(dim=-1, descending=True, stable=True)
    return selected.take_along_dim(order, dim=1), ranked
