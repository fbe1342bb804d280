"""The contents of /metrics: TGI's families under their exact names, and ours as `pytgi_*` (`docs/metrics.md`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

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
from server.telemetry.families import Reading, Registry

BATCH_BOUNDS = range(1, 1025)
RATIO_BOUNDS = [tenth / 10 for tenth in range(11)]

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
"""TGI's name for what happens here: prompts of newcomers share steps with the running sequences."""


def _token_bounds(limit: int) -> list[float]:
    """100 multiples of a hundredth of `limit`."""
    return [limit / 100 * number for number in range(1, 101)]


class RequestFamilies:
    """Families about requests and their sequences."""

    def __init__(self, registry: Registry, limits: EngineReady) -> None:
        input_bounds, total_bounds = _token_bounds(limits.max_input_tokens), _token_bounds(limits.max_total_tokens)
        counter, histogram = registry.counter, registry.histogram
        self.count = counter("tgi_request_count", "Requests for a generation")
        self.success = counter("tgi_request_success", "Generations that came to their end")
        self.failure = counter("tgi_request_failure", "Requests that failed, by the reason", "err", ERRORS)
        self.duration = histogram("tgi_request_duration", "Seconds from entry to the last token")
        self.validation_duration = histogram("tgi_request_validation_duration", "Seconds from entry to the queue")
        self.queue_duration = histogram("tgi_request_queue_duration", "Seconds in the queue")
        self.inference_duration = histogram(
            "tgi_request_inference_duration", "Seconds from the queue to the last token"
        )
        self.time_per_token = histogram(
            "tgi_request_mean_time_per_token_duration", "Seconds of inference over generated tokens, per request"
        )
        self.generated_tokens = histogram("tgi_request_generated_tokens", "Tokens of the answer", total_bounds)
        self.input_length = histogram("tgi_request_input_length", "Tokens of the prompt", input_bounds)
        self.prefix_hit_ratio = histogram(
            "pytgi_request_prefix_hit_ratio", "Part of the prompt that was in the prefix cache", RATIO_BOUNDS
        )
        self.max_new_tokens = histogram("tgi_request_max_new_tokens", "Tokens that were allowed", total_bounds)
        self.skipped_tokens = registry.summary(
            "tgi_request_skipped_tokens", "Tokens of a step that speculation had guessed, per sequence"
        )
        self.time_to_first_token = histogram(
            "pytgi_time_to_first_token_duration", "Seconds from a request's entry to its first token"
        )
        self.inter_token = histogram("pytgi_inter_token_duration", "Seconds from one token of a request to the next")


class StepFamilies:
    """Families about the engine's steps."""

    def __init__(self, registry: Registry) -> None:
        counter, histogram = registry.counter, registry.histogram
        self.next_size = histogram("tgi_batch_next_size", "Requests that left the queue for one step", BATCH_BOUNDS)
        self.count = counter("tgi_batch_inference_count", "Steps of the engine", "method", METHODS)
        self.success = counter("tgi_batch_inference_success", "Steps that came to their end", "method", METHODS)
        self.failure = counter("tgi_batch_inference_failure", "Steps that failed", "method", METHODS)
        self.duration = histogram("tgi_batch_inference_duration", "Seconds of a step", label="method")
        self.forward_duration = histogram(
            "tgi_batch_forward_duration", "Seconds of a step's forward pass and sampling", label="method"
        )
        self.decode_duration = histogram(
            "tgi_batch_decode_duration", "Seconds of a step's taking tokens in and looking for ends", label="method"
        )
        self.filter_duration = histogram(
            "tgi_batch_filter_duration", "Seconds of handing a step's tokens to their requests", label="method"
        )
        self.concat = counter(
            "tgi_batch_concat", "Steps where newcomers joined running sequences", "reason", [CONCAT_REASON]
        )
        self.concat_duration = histogram(
            "tgi_batch_concat_duration", "Seconds of scheduling a step where newcomers joined", label="method"
        )

    def observe_step(self, report: StepReport) -> None:
        method = _method(report)
        self.count.increment(method)
        if report.num_admitted:
            self.next_size.observe(report.num_admitted)
        if report.is_failed:
            self.failure.increment(method)
            return
        self.success.increment(method)
        self.duration.observe(report.total_s, method)
        self.forward_duration.observe(report.forward_s, method)
        self.decode_duration.observe(report.update_s, method)
        if 0 < report.num_admitted < report.num_sequences:
            self.concat.increment(CONCAT_REASON)
            self.concat_duration.observe(report.schedule_s, "decode")


class RequestMetrics:
    """The observations of one request between its entry and its end. It may have several sequences."""

    def __init__(self, families: RequestFamilies) -> None:
        self._families = families
        self._num_accepted = 0
        self._num_finished = 0

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Count the failure if an exception leaves the block. A client that leaves after its last token is none."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            if not 0 < self._num_accepted == self._num_finished:
                self._families.failure.increment("dropped")
            raise
        except Exception as error:
            self._families.failure.increment(_error_label(error))
            raise

    def accepted(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """Note that a sequence has become a request of the engine."""
        self._num_accepted += 1
        self._families.input_length.observe(num_prompt_tokens)
        self._families.max_new_tokens.observe(max_new_tokens)

    def received(self, num_tokens: int, waited_s: float, *, is_first: bool) -> None:
        """Note tokens that came `waited_s` seconds after the tokens before them, or after the request's entry."""
        if is_first:
            self._families.time_to_first_token.observe(waited_s)
        elif num_tokens:
            self._families.inter_token.observe(waited_s / num_tokens, times=num_tokens)

    def finished(
        self,
        *,
        total_s: float,
        validation_s: float,
        queue_s: float,
        inference_s: float,
        num_generated_tokens: int,
        prefix_hit_ratio: float,
    ) -> None:
        """Note that a sequence has come to its end. `prefix_hit_ratio`: the part of its prompt that was cached."""
        self._num_finished += 1
        families = self._families
        families.success.increment()
        families.duration.observe(total_s)
        families.validation_duration.observe(validation_s)
        families.queue_duration.observe(queue_s)
        families.inference_duration.observe(inference_s)
        families.time_per_token.observe(inference_s / max(1, num_generated_tokens))
        families.generated_tokens.observe(num_generated_tokens)
        families.prefix_hit_ratio.observe(prefix_hit_ratio)


class Metrics:
    """Every family of the server.

    In `is_strict` mode a family of TGI appears with its first observation, as in TGI. Otherwise counters start at 0, so
    that a dashboard's `rate()` and `increase()` see the first event as well.
    """

    def __init__(self, limits: EngineReady, *, is_strict: bool) -> None:
        self._limits = limits
        self._is_strict = is_strict
        self._has_stepped = False
        self._registry = Registry(has_presets=not is_strict)
        self.requests = RequestFamilies(self._registry, limits)
        self.steps = StepFamilies(self._registry)

    def entered(self) -> RequestMetrics:
        """Note that a request asks for a generation."""
        self.requests.count.increment()
        return RequestMetrics(self.requests)

    @contextlib.contextmanager
    def refusing(self, *kinds: type[Exception]) -> Iterator[None]:
        """Count a request that ends in the block with such an error, before it could be opened."""
        try:
            yield
        except kinds as error:
            self.requests.count.increment()
            self.requests.failure.increment(_error_label(error))
            raise

    def observe_output(self, output: StepOutput, seconds: float) -> None:
        """Take the engine's reports in. Handing the events of `output` out took `seconds`."""
        for report in output.reports:
            self._has_stepped = True
            self.steps.observe_step(report)
            if not report.is_failed:
                self.requests.skipped_tokens.observe(report.num_draft_hits)
        if output.reports:
            self.steps.filter_duration.observe(seconds, _method(output.reports[-1]))

    def render(self, stats: EngineStats) -> str:
        """The exposition: the observations so far, and `stats` as it is."""
        return self._registry.render(self._readings(stats))

    def _readings(self, stats: EngineStats) -> Iterator[Reading]:
        if self._has_stepped or not self._is_strict:
            num_reserved = stats.num_used_blocks * stats.block_size
            yield Reading("tgi_batch_current_size", "gauge", "Requests that are running", stats.num_running)
            yield Reading("tgi_batch_current_max_tokens", "gauge", "Tokens of KV memory that they hold", num_reserved)
            yield Reading("tgi_queue_size", "gauge", "Requests that wait", stats.num_waiting)
        if not self._is_strict:
            num_tokens = self._limits.max_batch_total_tokens
            yield Reading("tgi_batch_max_total_tokens", "gauge", "Tokens of KV memory that there are", num_tokens)
        for name, kind, help, value in (
            ("requests_running", "gauge", "Requests that are running", stats.num_running),
            ("requests_waiting", "gauge", "Requests that wait", stats.num_waiting),
            ("kv_blocks_used", "gauge", "KV blocks that some request holds", stats.num_used_blocks),
            ("kv_blocks_cached", "gauge", "KV blocks kept for prefixes that may come again", stats.num_cached_blocks),
            ("kv_blocks_total", "gauge", "KV blocks that there are", stats.num_blocks),
            ("prefix_hit_tokens", "counter", "Prompt tokens found in the prefix cache", stats.num_prefix_hit_tokens),
            ("preemptions", "counter", "Requests that had to give their KV blocks back", stats.num_preemptions),
            ("adapter_loads", "counter", "Times that an adapter got a place in memory", stats.num_adapter_loads),
            ("draft_steps", "counter", "How often a request had a draft in a step", stats.num_draft_steps),
            ("draft_tokens", "counter", "Tokens that speculation guessed", stats.num_drafted_tokens),
            ("draft_tokens_accepted", "counter", "Of those, the ones that were right", stats.num_accepted_tokens),
        ):
            yield Reading(f"pytgi_{name}", kind, help, value)


def _method(report: StepReport) -> str:
    return "prefill" if report.is_prefill else "decode"


def _error_label(error: Exception) -> str:
    return ERROR_LABELS.get(type(error), "generation")
