// The gateway. The key lives in this tab's session storage, and nowhere else.

const BASE = new URL("../", document.baseURI);
const KEY = "tiercel-key";
const PATIENCE_MS = 10_000;

/** What the gateway refused, in its own words. `status` is 0 when it could not be reached at all. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** A response that is not an error. `path` is relative to the gateway. */
export async function send(path, { headers = {}, signal, ...options } = {}) {
  const mine = key.get();
  let response;
  try {
    response = await fetch(new URL(path, BASE), {
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      ...options,
      headers: { ...headers, ...(mine ? { authorization: `Bearer ${mine}` } : {}) },
      signal: signal ?? AbortSignal.timeout(PATIENCE_MS),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The gateway cannot be reached.", 0);
  }
  if (response.ok) return response;
  throw new ApiError(await words(response), response.status);
}

export async function getJson(path) {
  return (await send(path)).json();
}

export async function postJson(path, body) {
  const headers = { "content-type": "application/json" };
  return (await send(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

async function words(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `HTTP ${response.status}: ${text.slice(0, 200) || response.statusText}`;
  }
}
