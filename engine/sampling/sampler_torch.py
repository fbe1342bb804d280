"""Sampling in plain torch: the reference implementation, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch

from engine.link.messages import SamplingParams
from engine.sampling.sampler import RawRows, bounded_temperature, log_min_p, uniform
from engine.scheduling.batch import SampledBatch


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
    normalizers = reported.logsumexp(dim=-1)
    logprobs = reported.gather(1, chosen.unsqueeze(1)).squeeze(1) - normalizers
    is_finite &= logprobs.isfinite()
    # One device-to-host copy for what every step needs to know.
    columns = torch.stack([chosen.double(), logprobs.double(), is_finite.double()]).tolist()
    return SampledBatch(
        [int(token) for token in columns[0]],
        columns[1],
        [bool(value) for value in columns[2]],
        *_top_tokens(reported, normalizers, [param.num_top_tokens for param in params]),
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
    logits: torch.Tensor, normalizers: torch.Tensor, counts: SequenceOf[int]
) -> tuple[list[list[int]], list[list[float]]]:
    """For each row [rows, vocab] its `counts[row]` best tokens and their logprobs, the best first; empty for none.

    Ties with the last one are listed, too, in the order of their ids; what is -inf never is, as in TGI.
    """
    rows = [row for row, count in enumerate(counts) if count]
    token_ids: list[list[int]] = [[] for _ in counts]
    logprobs: list[list[float]] = [[] for _ in counts]
    if not rows:
        return token_ids, logprobs
    lasts = [min(counts[row], logits.shape[1]) - 1 for row in rows]
    logits, normalizers = logits[rows], normalizers[rows]
    bounds = logits.topk(max(lasts) + 1, dim=-1).values.gather(1, _column(lasts, logits.device))
    places = ((logits >= bounds) & (logits > -torch.inf)).nonzero()
    values = logits[places[:, 0], places[:, 1]]
    order = values.argsort(descending=True, stable=True)
    listed = zip(places[order].tolist(), (values - normalizers[places[:, 0]])[order].tolist(), strict=True)
    for (index, token_id), logprob in listed:
        token_ids[rows[index]].append(token_id)
        logprobs[rows[index]].append(logprob)
    return token_ids, logprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Filter:
    """A sampling parameter that drops tokens."""

    value: Callable[[SamplingParams], float | None]
    """None where the parameter is off."""
    keep: Callable[[torch.Tensor, SequenceOf[float]], torch.Tensor]
    """Scaled logits [rows, vocab] and a value for each row -> the logits, with -inf for dropped tokens."""


def filter_logits(logits: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    """Temperature, then the filters in their order, over rows [rows, vocab].

    In the result the best logit is 0, and a dropped token's -inf.
    """
    # The best logit becomes 0 first: a tiny temperature then leaves only it, instead of overflowing.
    temperatures = _column([bounded_temperature(param) for param in params], logits.device)
    logits = (logits - logits.max(dim=-1, keepdim=True).values).div_(temperatures)
    for each in FILTERS:
        values = {row: value for row, param in enumerate(params) if (value := each.value(param)) is not None}
        if values:
            rows = torch.tensor([*values], device=logits.device)
            logits[rows] = each.keep(logits[rows], [*values.values()])
    return logits


def _column(values: SequenceOf[float], device: torch.device) -> torch.Tensor:
    """[rows, 1] on `device`: int64 of integers, else float32."""
    return torch.tensor(values, device=device).unsqueeze(1)


def _keep_best(logits: torch.Tensor, counts: SequenceOf[float]) -> torch.Tensor:
    """Keep the best tokens, so many for each row; ties with the last one stay."""
    lasts = [min(int(count), logits.shape[1]) - 1 for count in counts]
    best = logits.topk(max(lasts) + 1, dim=-1).values
    return logits.masked_fill(logits < best.gather(1, _column(lasts, logits.device)), -torch.inf)


def _keep_nucleus(logits: torch.Tensor, masses: SequenceOf[float]) -> torch.Tensor:
    """Keep the smallest set of best tokens whose mass reaches the row's; ties with the last one stay."""
    best = logits.sort(dim=-1, descending=True).values
    mass = (best - logits.logsumexp(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    last = (mass < _column(masses, logits.device)).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return logits.masked_fill(logits < best.gather(1, last), -torch.inf)


def _keep_likely(logits: torch.Tensor, bounds: SequenceOf[float]) -> torch.Tensor:
    """Keep the tokens whose logits reach the row's bound."""
    return logits.masked_fill(logits < _column(bounds, logits.device), -torch.inf)


def _keep_typical(logits: torch.Tensor, masses: SequenceOf[float]) -> torch.Tensor:
    """Keep the tokens whose surprise -log p is nearest to the entropy, until their mass reaches the row's.

    Locally typical sampling (Meister et al. 2022) as in transformers and TGI; ties with the last one stay.
    """
    logprobs = logits.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum(dim=-1, keepdim=True)
    distances, order = (-logprobs - entropy).abs().sort(dim=-1)
    cumulated = probabilities.gather(1, order).cumsum(dim=-1)
    last = (cumulated < _column(masses, logits.device)).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return logits.masked_fill((-logprobs - entropy).abs() > distances.gather(1, last), -torch.inf)


FILTERS: tuple[Filter, ...] = (
    Filter(lambda param: param.top_k or None, _keep_best),
    Filter(lambda param: param.top_p if param.top_p < 1.0 else None, _keep_nucleus),
    Filter(lambda param: log_min_p(param) if param.min_p > 0.0 else None, _keep_likely),
    Filter(lambda param: param.typical_p if param.typical_p < 1.0 else None, _keep_typical),
)
"""In the order in which they drop tokens: each sees what the ones before it left."""
