"""Sampling in plain torch: the reference implementation, on any device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from engine.link.messages import SamplingParams
from engine.sampling.sampler import MIN_TEMPERATURE, RawRows, log_min_p, uniform
from engine.scheduling.batch import SampledBatch

NUCLEUS_CANDIDATES = 1024
"""Top-p first looks among this many best tokens, and sorts the vocabulary only if they don't hold the mass."""


def sample(
    logits: torch.Tensor, params: SequenceOf[SamplingParams], positions: SequenceOf[int], raw: RawRows | None = None
) -> SampledBatch:
    """As `engine.sampling.sampler.Sample` says."""
    random_rows = [row for row, param in enumerate(params) if param.seed is not None]
    greedy_rows = [row for row, param in enumerate(params) if param.seed is None]
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    is_finite = torch.empty(len(params), dtype=torch.bool, device=logits.device)
    reported = logits
    if greedy_rows:
        chosen[greedy_rows], is_finite[greedy_rows] = _take_best(logits[greedy_rows] if random_rows else logits)
    if random_rows:
        drawn = [params[row] for row in random_rows]
        numbers = uniform([param.seed or 0 for param in drawn], [positions[row] for row in random_rows])
        scaled = filter_logits(logits[random_rows] if greedy_rows else logits, drawn)
        chosen[random_rows], is_finite[random_rows] = _draw(scaled, torch.from_numpy(numbers).to(logits.device))
        filtered = [index for index, param in enumerate(drawn) if param.is_logprob_filtered]
        if filtered:
            reported = _with_rows(reported, [random_rows[index] for index in filtered], scaled[filtered])
    if raw is not None:
        reported = _with_rows(reported, raw.rows, raw.logits)
    normalisers = reported.logsumexp(dim=-1)
    logprobs = reported.gather(1, chosen.unsqueeze(1)).squeeze(1) - normalisers
    is_finite &= logprobs.isfinite()
    # One device-to-host copy for what every step needs to know.
    columns = torch.stack([chosen.double(), logprobs.double(), is_finite.double()]).tolist()
    return SampledBatch(
        [int(token) for token in columns[0]],
        columns[1],
        [bool(value) for value in columns[2]],
        *_top_tokens(reported, normalisers, [param.num_top_tokens for param in params]),
    )


def _with_rows(logits: torch.Tensor, rows: list[int], others: torch.Tensor) -> torch.Tensor:
    """A copy of logits [all rows, vocab] with `others` [len(rows), vocab] in place of `rows`."""
    return logits.index_copy(0, torch.tensor(rows, device=logits.device), others)


def _take_best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows [rows, vocab] the token of the largest logit [rows] int64, and whether that logit is finite [rows]."""
    best, chosen = logits.max(dim=-1)
    return chosen, best.isfinite()


def _draw(scaled: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token at which the cumulated mass exceeds the number [rows] int64, and whether the mass is finite.

    scaled [rows, vocab]: logits relative to the best one, so that no exponential overflows; numbers [rows] in [0, 1).
    """
    cumulated = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, numbers.unsqueeze(1) * total, right=True)
    return chosen.squeeze(1).clamp_(max=scaled.shape[1] - 1), total.squeeze(1).isfinite()


def _top_tokens(
    logits: torch.Tensor, normalisers: torch.Tensor, counts: SequenceOf[int]
) -> tuple[list[list[int]], list[list[float]]]:
    """For each row [rows, vocab] its `counts[row]` best tokens and their logprobs, the best first; empty for none.

    Ties with the last one are listed, too, in the order of their ids; what is -inf never is (reference 4.7).
    """
    wanting = [row for row, count in enumerate(counts) if count]
    token_ids: list[list[int]] = [[] for _ in counts]
    logprobs: list[list[float]] = [[] for _ in counts]
    if not wanting:
        return token_ids, logprobs
    lasts = torch.tensor([[min(counts[row], logits.shape[1]) - 1] for row in wanting], device=logits.device)
    own = logits[wanting]
    least = own.topk(int(max(lasts)) + 1, dim=-1).values.gather(1, lasts)
    listed = ((own >= least) & (own > -torch.inf)).nonzero()
    values = own[listed[:, 0], listed[:, 1]]
    order = values.argsort(descending=True, stable=True)
    found = zip(listed[order].tolist(), (values - normalisers[wanting][listed[:, 0]])[order].tolist(), strict=True)
    for (index, token_id), logprob in found:
        token_ids[wanting[index]].append(token_id)
        logprobs[wanting[index]].append(logprob)
    return token_ids, logprobs


def filter_logits(logits: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Temperature, then top-k, top-p, min-p, typical-p over rows [rows, vocab].

    In the result the best becomes 0, and what is not allowed -inf.
    """
    device = logits.device
    # The best logit becomes 0 first: a tiny temperature then leaves only it, instead of overflowing.
    temperatures = torch.tensor([[max(param.temperature, MIN_TEMPERATURE)] for param in params], device=device)
    logits = (logits - logits.max(dim=-1, keepdim=True).values).div_(temperatures)
    vocab_size = logits.shape[1]
    top_ks = [min(param.top_k, vocab_size) for param in params]
    if any(top_ks):
        rows = torch.tensor([row for row, top_k in enumerate(top_ks) if top_k], device=device)
        limits = torch.tensor([[top_k - 1] for top_k in top_ks if top_k], device=device)
        best = logits[rows].topk(max(top_ks), dim=-1).values
        kept = logits[rows]
        logits[rows] = kept.masked_fill(kept < best.gather(1, limits), -torch.inf)
    if any(param.top_p < 1.0 for param in params):
        rows = torch.tensor([row for row, param in enumerate(params) if param.top_p < 1.0], device=device)
        top_ps = torch.tensor([[param.top_p] for param in params if param.top_p < 1.0], device=device)
        logits[rows] = _keep_nucleus(logits[rows], top_ps)
    if any(param.min_p > 0.0 for param in params):
        least = torch.tensor([[log_min_p(param)] for param in params], device=device)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if any(param.typical_p < 1.0 for param in params):
        rows = torch.tensor([row for row, param in enumerate(params) if param.typical_p < 1.0], device=device)
        typical_ps = torch.tensor([[param.typical_p] for param in params if param.typical_p < 1.0], device=device)
        logits[rows] = _keep_typical(logits[rows], typical_ps)
    return logits


def _keep_nucleus(logits: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of best tokens whose mass reaches top_p [rows, 1]; ties with the last one stay."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    for num_candidates in (min(NUCLEUS_CANDIDATES, logits.shape[1]), logits.shape[1]):
        best = logits.topk(num_candidates, dim=-1).values
        mass = (best - normaliser).exp().cumsum(dim=-1)
        if num_candidates == logits.shape[1] or bool((mass[:, -1:] >= top_ps).all()):
            break
    last = (mass < top_ps).sum(dim=-1, keepdim=True).clamp_(max=num_candidates - 1)
    return logits.masked_fill(logits < best.gather(1, last), -torch.inf)


def _keep_typical(logits: torch.Tensor, typical_ps: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose surprise -log p is nearest to the entropy, until their mass reaches typical_p [rows, 1].

    Locally typical sampling (Meister et al. 2022) as in transformers and TGI; ties with the last one stay.
    """
    logprobs = logits.log_softmax(dim=-1)
    masses = logprobs.exp()
    entropy = -(logprobs * masses).nansum(dim=-1, keepdim=True)
    distances, order = (-logprobs - entropy).abs().sort(dim=-1)
    cumulated = masses.gather(1, order).cumsum(dim=-1)
    last = (cumulated < typical_ps).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return logits.masked_fill((-logprobs - entropy).abs() > distances.gather(1, last), -torch.inf)
