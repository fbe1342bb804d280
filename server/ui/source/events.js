// Server-sent events, read from the body of a response: EventSource can send neither a key nor a request.

/** The events of a body, each with its `name` and its `data`. Leaving the loop closes the connection. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split(/\r?\n\r?\n/);
      rest = frames.pop();
      for (const frame of frames) {
        const event = eventOf(frame);
        if (event.data !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be closed already
  }
}

function eventOf(frame) {
  const event = { name: "message", data: null };
  for (const line of frame.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") event.name = value;
    if (field === "data") event.data = event.data === null ? value : `${event.data}\n${value}`;
  }
  return event;
}
