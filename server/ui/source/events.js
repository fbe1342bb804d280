// Server-sent events, read from the body of a response: EventSource can send neither a key nor a request.

/** The data of each event of a body. Leaving the loop closes the connection. */
export async function* dataOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split(/\r?\n\r?\n/);
      rest = frames.pop();
      for (const frame of frames) {
        const lines = frame.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length > 0) yield lines.map((line) => line.replace(/^data: ?/, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be closed already
  }
}
