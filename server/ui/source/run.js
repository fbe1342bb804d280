// One streaming request: its events until it ends, is stopped or fails, and its numbers, also in words.

import { openStream, RequestError } from "./api.js";

export class Run {
  constructor() {
    this._controller = new AbortController();
    this._startedAt = performance.now();
    this.stats = {};
    this.finish = null;
    this.isStopped = false;
  }

  stop() {
    this.isStopped = true;
    this._controller.abort();
  }

  /**
   * Send a request and call `onChoice` with the choice of each event. Returns `{error, note}`: why it failed, as a
   * RequestError, and what the server does not hold the model to; both null if there is nothing to say.
   */
  async follow({ path, body }, onChoice) {
    let note = null;
    try {
      const { objects, leftOpen } = await openStream(path, body, this._controller.signal);
      if (leftOpen !== null) note = `The model is not held to these places of the schema: ${leftOpen}`;
      for await (const object of objects) this._take(object, onChoice);
      return { error: null, note };
    } catch (error) {
      if (this.isStopped) return { error: null, note };
      if (error instanceof RequestError) return { error, note };
      throw error;
    } finally {
      if (this.isStopped) this.finish = "stopped";
      this.stats.totalMs = performance.now() - this._startedAt;
    }
  }

  _take({ choices, usage }, onChoice) {
    for (const choice of choices) {
      this.stats.firstMs ??= performance.now() - this._startedAt;
      this.stats.numEvents = (this.stats.numEvents ?? 0) + 1;
      if (choice.finish_reason) this.finish = choice.finish_reason;
      onChoice(choice);
    }
    if (usage) {
      this.stats.numTokens = usage.completion_tokens;
      this.stats.numPrompt = usage.prompt_tokens;
      this.stats.numCached = usage.prompt_tokens_details?.cached_tokens;
    }
  }
}

/**
 * A run's numbers in words: `{numTokens, numEvents, numPrompt, numCached, firstMs, totalMs}`. A run that was stopped or
 * broke off has no `numTokens`; its events stand for them, each a token or more.
 */
export function factsOf({ numTokens, numEvents, numPrompt, numCached, firstMs, totalMs }) {
  const facts = [];
  const count = numTokens ?? numEvents;
  if (count !== undefined) {
    facts.push(`${count} ${count === 1 ? "token" : "tokens"}${numTokens === undefined ? " or more" : ""}`);
    const seconds = (totalMs - firstMs) / 1000;
    if (count > 1 && seconds > 0) facts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (firstMs !== undefined) facts.push(`first after ${(firstMs / 1000).toFixed(2)} s`);
  if (numPrompt !== undefined) facts.push(`prompt ${numPrompt}${numCached ? `, ${numCached} of them cached` : ""}`);
  return facts;
}
