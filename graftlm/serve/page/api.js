// What the page asks the server for. The key is kept for the life of the tab.

import { eventsOf } from "./sse.js";

const KEY = "graft-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY));

async function request(path, body, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it running?");
  }
  if (!response.ok) {
    const tree = await response.json().catch(() => ({}));
    throw new ApiError(response.status, tree.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

/** The JSON of a GET, or of a POST where there is a body. Raises ApiError. */
export async function call(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** Which weights answered (`name@fingerprint`), and the chunks of a streamed answer. Raises ApiError, AbortError. */
export async function chat(body, signal) {
  const path = "/v1/chat/completions";
  const response = await request(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  return { adapter: response.headers.get("x-graft-adapter"), chunks: chunksOf(response) };
}

async function* chunksOf(response) {
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}
