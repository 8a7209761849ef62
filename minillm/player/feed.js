// Server-sent events through fetch, because EventSource cannot send a key in a header.

// Each `data:` of the stream, parsed as JSON. Throws an Error such as "401 ..." if the server refuses.
export async function* records(url, { headers = {}, signal } = {}) {
  const response = await fetch(url, { headers: { Accept: "text/event-stream", ...headers }, signal });
  const { ok, status, statusText } = response;
  if (!ok) throw Object.assign(new Error(`${status} ${statusText}`), { status });
  for await (const data of events(response.body)) if (data !== "[DONE]") yield JSON.parse(data);
}

// The `data` of every event of a byte stream; lines end with \n, \r\n or \r, and pieces may split a character.
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the very end may be the first half of \r\n
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
