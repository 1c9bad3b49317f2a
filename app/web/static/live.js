// Keeps a page with work under way true: asks for the same page again and takes over what has changed.
// Elements with `data-live` and an id are replaced; `data-open` on <main> says that there is something to wait for,
// and `data-open="reload"` that the page looks different once it is over.

const EVERY_MS = 1500;
const main = document.querySelector('main');

async function refresh() {
  if (document.hidden) return;
  let response;
  try {
    response = await fetch(location.href, { headers: { Accept: 'text/html' }, cache: 'no-store' });
  } catch {
    return; // the service is away: the next look may find it back
  }
  if (response.status === 404 || response.redirected) location.reload(); // gone, or signed out
  if (!response.ok) return;
  const fresh = new DOMParser().parseFromString(await response.text(), 'text/html');
  for (const next of fresh.querySelectorAll('[data-live][id]')) take(next);
  if (fresh.querySelector('main').hasAttribute('data-open')) return;
  if (main.dataset.open === 'reload') location.reload();
  delete main.dataset.open;
}

function take(next) {
  const now = document.getElementById(next.id);
  if (!now || now.isEqualNode(next)) return;
  const bars = [now.querySelector('progress'), next.querySelector('progress')];
  const before = bars[0]?.value;
  now.replaceWith(document.adoptNode(next));
  if (before === undefined || !bars[1] || bars[1].value < before) return;
  const goal = bars[1].value;
  bars[1].value = before; // so that the bar glides
  requestAnimationFrame(() => requestAnimationFrame(() => { bars[1].value = goal; }));
}

async function watch() {
  while ('open' in main.dataset) {
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
    await refresh();
  }
}

document.addEventListener('visibilitychange', () => { if ('open' in main.dataset) refresh(); });
watch();
