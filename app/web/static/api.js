// Calls of the API, and its problems in words.

export function show(place, text) {
  place.textContent = text;
  place.hidden = !text;
}

export function detailOf(status, body) {
  try {
    return JSON.parse(body).detail;
  } catch {
    return `The service answered with status ${status}.`;
  }
}

export async function call(method, path, body) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: body ? { 'Content-Type': 'application/json' } : {},
      body: body && JSON.stringify(body),
    });
  } catch {
    throw new Error('The service cannot be reached. Is it still running?');
  }
  const text = await response.text();
  if (response.status === 401) location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  if (!response.ok) throw new Error(detailOf(response.status, text));
  return text ? JSON.parse(text) : null;
}
