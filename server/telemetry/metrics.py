"""What /metrics says (reference `tgi-http.md` 7.1, 7.2): TGI's families under their exact names, and ours as `pytgi_*`.

Written by hand: `prometheus_client` would add `_total` to counters, and an observation here is one bisection and two
additions. docs/metrics.md has the table for users.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from engine.link.errors import EngineDeadError, EngineHungError, GenerationError
from engine.link.messages import EngineReady, EngineStats, StepOutput, StepReport
from server.errors import (
    BatchSizeError,
    IncompleteGenerationError,
    OverloadedError,
    SuffixError,
    TemplateError,
    ValidationError,
)

DURATION_BOUNDS = tuple(itertools.accumulate([1.5] * 35, operator.mul, initial=0.0001))[1:]
"""Seconds; multiplied one by one, as TGI does: the digits of the bounds are part of their names."""
BATCH_BOUNDS = range(1, 1025)
QUANTILES = (0, 0.5, 0.9, 0.95, 0.99, 0.999, 1)

ERROR_LABELS: dict[type[Exception], str] = {
    ValidationError: "validation",
    SuffixError: "validation",
    BatchSizeError: "validation",
    OverloadedError: "overloaded",
    TemplateError: "template",
    IncompleteGenerationError: "incomplete",
    GenerationError: "generation",
    EngineDeadError: "generation",
    EngineHungError: "generation",
}
"""An exception that nobody foresaw counts as `generation`."""
ERRORS = (*dict.fromkeys(ERROR_LABELS.values()), "dropped")
METHODS = ("prefill", "decode")
CONCAT_REASON = "chunking"
"""Newcomers' prompts share steps with the running sequences, which is what TGI calls by this name."""


def _token_bounds(limit: int) -> list[float]:
    """100 multiples of a hundredth of `limit`."""
    return [limit / 100 * number for number in range(1, 101)]


def _number(value: float) -> str:
    """As Rust prints it: no `.0`, no exponent, the shortest digits that are the same number."""
    return f"{Decimal(repr(value)):f}".removesuffix(".0")


class Counter:
    """A count, or one for each value of `label`; those of `preset` are there from the start.

    As with the other kinds, `samples` are the lines of the exposition: none before the first observation.
    """

    kind = "counter"

    def __init__(self, name: str, help: str, label: str = "", preset: Iterable[str] = ()) -> None:
        self.name, self.help, self._label = name, help, label
        self._values: dict[str, int] = dict.fromkeys(preset, 0)

    def add(self, label_value: str = "") -> None:
        self._values[label_value] = self._values.get(label_value, 0) + 1

    def samples(self) -> Iterator[str]:
        for value, count in self._values.items():
            labels = f'{{{self._label}="{value}"}}' if self._label else ""
            yield f"{self.name}{labels} {count}"


class Histogram:
    """Counts per bucket, or such a row of counts for each value of `label`."""

    kind = "histogram"

    def __init__(self, name: str, help: str, bounds: Sequence[float] = DURATION_BOUNDS, label: str = "") -> None:
        self.name, self.help, self._label = name, help, label
        self._bounds = bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, value: float, label_value: str = "", times: int = 1) -> None:
        counts = self._counts.get(label_value)
        if counts is None:
            counts = self._counts[label_value] = [0] * (len(self._bounds) + 1)
            self._sums[label_value] = 0
        counts[bisect.bisect_left(self._bounds, value)] += times
        self._sums[label_value] += value * times

    def samples(self) -> Iterator[str]:
        for value, counts in self._counts.items():
            labels = f'{self._label}="{value}"' if self._label else ""
            separator, braced = ("," if labels else ""), (f"{{{labels}}}" if labels else "")
            for bound, count in zip([*map(_number, self._bounds), "+Inf"], itertools.accumulate(counts), strict=True):
                yield f'{self.name}_bucket{{{labels}{separator}le="{bound}"}} {count}'
            yield f"{self.name}_sum{braced} {_number(self._sums[value])}"
            yield f"{self.name}_count{braced} {sum(counts)}"


class Summary:
    """Exact quantiles, since the start, of small whole numbers."""

    kind = "summary"

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._counts: collections.Counter[int] = collections.Counter()

    def observe(self, values: Iterable[int]) -> None:
        self._counts.update(values)

    def samples(self) -> Iterator[str]:
        total = self._counts.total()
        if not total:
            return
        values = sorted(self._counts)
        ends = list(itertools.accumulate(self._counts[value] for value in values))
        for quantile in QUANTILES:
            rank = max(1, quantile * total)
            yield f'{self.name}{{quantile="{_number(quantile)}"}} {values[bisect.bisect_left(ends, rank)]}'
        yield f"{self.name}_sum {sum(value * count for value, count in self._counts.items())}"
        yield f"{self.name}_count {total}"


class Reading:
    """A number that is read when it is asked for."""

    def __init__(self, name: str, kind: str, help: str, value: int) -> None:
        self.name, self.kind, self.help, self._value = name, kind, help, value

    def samples(self) -> Iterator[str]:
        yield f"{self.name} {self._value}"


class RequestMetrics:
    """What is observed of one request between its entry and its end; it may have several sequences."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._num_accepted = 0
        self._num_finished = 0

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Counts the failure if the block is left by an exception; after its last token a client may leave."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            if not 0 < self._num_accepted == self._num_finished:
                self._metrics.failure.add("dropped")
            raise
        except Exception as error:
            self._metrics.failed(error)
            raise

    def accepted(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """A sequence has become an engine's request."""
        self._num_accepted += 1
        self._metrics.input_length.observe(num_prompt_tokens)
        self._metrics.max_new_tokens.observe(max_new_tokens)

    def received(self, num_tokens: int, waited_s: float, *, is_first: bool) -> None:
        """Tokens came after `waited_s` seconds, counted from the tokens before them or from the request's entry."""
        if is_first:
            self._metrics.time_to_first_token.observe(waited_s)
        elif num_tokens:
            self._metrics.inter_token.observe(waited_s / num_tokens, times=num_tokens)

    def finished(
        self, *, total_s: float, validation_s: float, queue_s: float, inference_s: float, num_generated_tokens: int
    ) -> None:
        """A sequence has come to its end."""
        self._num_finished += 1
        metrics = self._metrics
        metrics.success.add()
        metrics.duration.observe(total_s)
        metrics.validation_duration.observe(validation_s)
        metrics.queue_duration.observe(queue_s)
        metrics.inference_duration.observe(inference_s)
        metrics.time_per_token.observe(inference_s / max(1, num_generated_tokens))
        metrics.generated_tokens.observe(num_generated_tokens)


class Metrics:
    """Every family. In `is_strict` mode a family of TGI appears with its first observation, as TGI has it; otherwise
    counters start at 0, so that a dashboard's `rate()` and `increase()` see the first event as well."""

    def __init__(self, limits: EngineReady, *, is_strict: bool) -> None:
        self._limits = limits
        self._is_strict = is_strict
        self._has_stepped = False
        input_bounds, total_bounds = _token_bounds(limits.max_input_tokens), _token_bounds(limits.max_total_tokens)

        def counter(name: str, help: str, label: str = "", values: Iterable[str] = ("",)) -> Counter:
            return Counter(name, help, label, () if is_strict else values)

        self.count = counter("tgi_request_count", "Requests for a generation")
        self.success = counter("tgi_request_success", "Generations that came to their end")
        self.failure = counter("tgi_request_failure", "Requests that failed, by the reason", "err", ERRORS)
        self.duration = Histogram("tgi_request_duration", "Seconds from entry to the last token")
        self.validation_duration = Histogram("tgi_request_validation_duration", "Seconds from entry to the queue")
        self.queue_duration = Histogram("tgi_request_queue_duration", "Seconds in the queue")
        self.inference_duration = Histogram(
            "tgi_request_inference_duration", "Seconds from the queue to the last token"
        )
        self.time_per_token = Histogram(
            "tgi_request_mean_time_per_token_duration", "Seconds of inference over generated tokens, per request"
        )
        self.generated_tokens = Histogram("tgi_request_generated_tokens", "Tokens of the answer", total_bounds)
        self.input_length = Histogram("tgi_request_input_length", "Tokens of the prompt", input_bounds)
        self.max_new_tokens = Histogram("tgi_request_max_new_tokens", "Tokens that were allowed", total_bounds)
        self.skipped_tokens = Summary(
            "tgi_request_skipped_tokens", "Tokens of a step that speculation had guessed, per sequence"
        )
        self.time_to_first_token = Histogram(
            "pytgi_time_to_first_token_duration", "Seconds from a request's entry to its first token"
        )
        self.inter_token = Histogram("pytgi_inter_token_duration", "Seconds from one token of a request to the next")

        self.batch_next_size = Histogram(
            "tgi_batch_next_size", "Requests that left the queue for one step", BATCH_BOUNDS
        )
        self.batch_count = counter("tgi_batch_inference_count", "Steps of the engine", "method", METHODS)
        self.batch_success = counter("tgi_batch_inference_success", "Steps that came to their end", "method", METHODS)
        self.batch_failure = counter("tgi_batch_inference_failure", "Steps that failed", "method", METHODS)
        self.batch_duration = Histogram("tgi_batch_inference_duration", "Seconds of a step", label="method")
        self.forward_duration = Histogram(
            "tgi_batch_forward_duration", "Seconds of a step's forward pass and sampling", label="method"
        )
        self.decode_duration = Histogram(
            "tgi_batch_decode_duration", "Seconds of a step's taking tokens in and looking for ends", label="method"
        )
        self.filter_duration = Histogram(
            "tgi_batch_filter_duration", "Seconds of handing a step's tokens to their requests", label="method"
        )
        self.concat = counter(
            "tgi_batch_concat", "Steps where newcomers joined running sequences", "reason", [CONCAT_REASON]
        )
        self.concat_duration = Histogram(
            "tgi_batch_concat_duration", "Seconds of scheduling a step where newcomers joined", label="method"
        )

    def entered(self) -> RequestMetrics:
        """A request asks for a generation."""
        self.count.add()
        return RequestMetrics(self)

    def refused(self, error: Exception) -> None:
        """A request that failed before it could be opened."""
        self.count.add()
        self.failed(error)

    def failed(self, error: Exception) -> None:
        self.failure.add(ERROR_LABELS.get(type(error), "generation"))

    def observe_output(self, output: StepOutput, seconds: float) -> None:
        """Take the engine's reports in; handing `output` out took `seconds`."""
        for report in output.reports:
            self._observe_step(report)
        if output.reports:
            self.filter_duration.observe(seconds, _method(output.reports[-1]))

    def _observe_step(self, report: StepReport) -> None:
        self._has_stepped = True
        method = _method(report)
        self.batch_count.add(method)
        if report.num_admitted:
            self.batch_next_size.observe(report.num_admitted)
        if report.is_failed:
            self.batch_failure.add(method)
            return
        self.batch_success.add(method)
        self.batch_duration.observe(report.total_s, method)
        self.forward_duration.observe(report.forward_s, method)
        self.decode_duration.observe(report.update_s, method)
        if 0 < report.num_admitted < report.num_sequences:
            self.concat.add(CONCAT_REASON)
            self.concat_duration.observe(report.schedule_s, "decode")
        self.skipped_tokens.observe(report.num_draft_hits)

    def render(self, stats: EngineStats) -> str:
        """The exposition: the observations so far, and `stats` as it is."""
        families = [family for family in vars(self).values() if isinstance(family, Counter | Histogram | Summary)]
        parts = []
        for family in (*families, *self._readings(stats)):
            if samples := list(family.samples()):
                head = [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
                parts.append("\n".join([*head, *samples, "\n"]))
        return "".join(parts)

    def _readings(self, stats: EngineStats) -> Iterator[Reading]:
        if self._has_stepped or not self._is_strict:
            num_reserved = stats.num_used_blocks * stats.block_size
            yield Reading("tgi_batch_current_size", "gauge", "Requests that are running", stats.num_running)
            yield Reading("tgi_batch_current_max_tokens", "gauge", "Tokens of KV memory that they hold", num_reserved)
            yield Reading("tgi_queue_size", "gauge", "Requests that wait", stats.num_waiting)
        if not self._is_strict:
            most = self._limits.max_batch_total_tokens
            yield Reading("tgi_batch_max_total_tokens", "gauge", "Tokens of KV memory that there are", most)
        for name, kind, help, value in (
            ("requests_running", "gauge", "Requests that are running", stats.num_running),
            ("requests_waiting", "gauge", "Requests that wait", stats.num_waiting),
            ("kv_blocks_used", "gauge", "KV blocks that some request holds", stats.num_used_blocks),
            ("kv_blocks_cached", "gauge", "KV blocks kept for prefixes that may come again", stats.num_cached_blocks),
            ("kv_blocks_total", "gauge", "KV blocks that there are", stats.num_blocks),
            ("prefix_hit_tokens", "counter", "Prompt tokens found in the prefix cache", stats.num_prefix_hit_tokens),
            ("preemptions", "counter", "Requests that had to give their KV blocks back", stats.num_preemptions),
            ("draft_steps", "counter", "How often a request had a draft in a step", stats.num_draft_steps),
            ("draft_tokens", "counter", "Tokens that speculation guessed", stats.num_drafted_tokens),
            ("draft_tokens_accepted", "counter", "Of those, the ones that were right", stats.num_accepted_tokens),
        ):
            yield Reading(f"pytgi_{name}", kind, help, value)


def _method(report: StepReport) -> str:
    return "prefill" if report.is_prefill else "decode"
