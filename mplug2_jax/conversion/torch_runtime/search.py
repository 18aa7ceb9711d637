"""Search over the decoder's outputs: beams, and answer ranking; the release's results where asked (the default).

* Scores are length-normalised at every step by ((5 + length) / 6) ** 0.6, and ranked normalised.
* A beam that emits the end token is stored; a clip is done when its best beam has just ended.
* log(softmax(x)) rather than log_softmax(x), as in the release: a probability that underflows is minus infinity.
* The prompt is not fed: generation starts from the begin token alone.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug2_jax.conversion.torch_runtime.decoder import DecoderCache, TextDecoder
from mplug2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. Lengths count generated tokens: the begin token is not one, the end token is.

    ``begin`` and ``end`` are ids of the tokeniser; a model's ``generate`` takes its config's where they are None.

    With ``extend_finished``, as in the release, beams that ended go on, beyond their end token, and when a clip is done
    all its beams are stored, ended or not.
    """

    num_beams: int = 5
    min_length: int = 1
    max_length: int = 20
    begin: int | None = None
    end: int | None = None
    extend_finished: bool = True


class DecodeOutput(NamedTuple):
    """The best sequences of each clip, best first; ids start with the begin token and are 0 after ``lengths``."""

    ids: Tensor  # [b, r, m]
    scores: Tensor  # [b, r]
    lengths: Tensor  # [b, r]


@runtime_checkable
class IncrementalDecoder(Protocol):
    """The sequences so far, as something that says what comes next."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Takes the newest token of each sequence [b*r]; logits [b*r, v] for the next one."""

    def reorder(self, rows: Tensor) -> None:
        """Keeps the sequences ``rows`` [b*r], which the search has chosen."""


@torch.no_grad()
def beam_search(
    sequences: IncrementalDecoder, batch: int, config: SearchConfig, device: torch.device | None = None
) -> DecodeOutput:
    """Searches ``config.num_beams`` sequences for each of ``batch`` clips, up to ``config.max_length`` tokens.

    Raises:
        UserError: no begin or end token.
    """
    if config.begin is None or config.end is None:
        raise UserError("a search needs the ids of its begin and end tokens; set both, or use a model's generate")
    b, r = batch, config.num_beams
    ids = torch.zeros(b, r, config.max_length + 1, dtype=torch.long, device=device)
    ids[:, :, 0] = config.begin
    log_probs = torch.full((b, r), -torch.inf, device=device)
    found = DecodeOutput(torch.zeros_like(ids), log_probs.clone(), torch.zeros(b, r, dtype=torch.long, device=device))
    log_probs[:, 0] = 0.0
    live = torch.ones(b, dtype=torch.bool, device=device)
    first_rows = r * torch.arange(b, device=device)[:, None]

    for position in range(config.max_length):
        logits = sequences.logits(ids[:, :, position].flatten())
        next_log_probs = logits.float().softmax(-1).log().unflatten(0, (b, r))
        if position < config.min_length:
            next_log_probs[..., config.end] = -1e20

        normaliser = ((5 + position + 1) / 6) ** 0.6
        scores, flat = ((log_probs[..., None] + next_log_probs) / normaliser).flatten(1).topk(r)
        parent, token = flat // logits.shape[-1], flat % logits.shape[-1]
        ids = ids.take_along_dim(parent[..., None], dim=1)
        ids[:, :, position + 1] = token
        sequences.reorder((first_rows + parent).flatten())

        finished = (token == config.end) | (position == config.max_length - 1)
        done = finished[:, :1]
        stored = ((finished | done) if config.extend_finished else finished) & live[:, None]
        lengths = torch.full_like(found.lengths, position + 2)
        found = _keep_best(found, DecodeOutput(ids, scores.where(stored, -torch.inf), lengths))
        log_probs = scores * normaliser
        if not config.extend_finished:
            log_probs = log_probs.masked_fill(token == config.end, -torch.inf)
        live = live & ~done[:, 0]
        if not live.any():
            break
    return found


def _keep_best(old: DecodeOutput, new: DecodeOutput) -> DecodeOutput:
    """The best of both; equal scores keep the order in which they were stored."""
    ids, scores, lengths = (torch.cat(pair, dim=1) for pair in zip(old, new, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    kept = order[:, : old.scores.shape[1]]
    return DecodeOutput(
        ids.take_along_dim(kept[..., None], dim=1), scores[:, : kept.shape[1]], lengths.take_along_dim(kept, dim=1)
    )


@torch.no_grad()
def generate(decoder: TextDecoder, memory: Tensor, memory_mask: Tensor, config: SearchConfig) -> DecodeOutput:
    """Beam search with a cache: the memory [b, s, d] is projected once for each clip and shared by its beams.

    Raises:
        UserError: more tokens than the position table has rows.
    """
    rows = decoder.bert.embeddings.position_embeddings.num_embeddings
    if config.max_length > rows:
        raise UserError(f"generating {config.max_length} tokens exceeds max_positions={rows}; lower max_length")
    return beam_search(DecoderCache(decoder, memory, memory_mask), memory.shape[0], config, memory.device)


@torch.no_grad()
def rank_answers(
    decoder: TextDecoder,
    memory: Tensor,
    memory_mask: Tensor,
    answers: Tensor,
    answers_mask: Tensor,
    *,
    num_candidates: int,
    double_count_first_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the best answers of [a, m] to each example [b, num_candidates], and their probabilities among those.

    The answers are first narrowed by the probability of their first token, then scored by their log-likelihood; with
    ``double_count_first_token`` the first token counts a second time, as in the release. Answers are
    ``[CLS] words [SEP] pad``.
    """
    b = memory.shape[0]
    first = decoder(answers[:1, :1].expand(b, 1), None, memory, memory_mask)[:, 0].float().softmax(-1)
    probabilities, chosen = first[:, answers[:, 1]].topk(num_candidates)

    ids, mask = answers[chosen].flatten(0, 1), answers_mask[chosen].flatten(0, 1)  # [b*num_candidates, m]
    logits = decoder(ids, mask, memory, memory_mask)
    log_likelihood = -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    total = (log_likelihood * mask[:, 1:]).sum(-1).unflatten(0, (b, num_candidates))

    if double_count_first_token:
        total = total + probabilities.log()
    share, order = total.softmax(-1).sort(dim=-1, descending=True, stable=True)
    return chosen.take_along_dim(order, dim=1), share
