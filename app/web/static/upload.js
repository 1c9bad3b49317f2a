// The drop zone: images, a folder or an archive in, progress while they are sent, then the page of what became of them.
// The form says where it is sent, `data-check` where its parameters are asked about first, `data-then` what follows.

import { call, detailOf, show } from './api.js';
import { fieldsOf, parametersOf } from './fields.js';
import { tarOf } from './tar.js';

const form = document.getElementById('upload');
const zone = document.getElementById('drop');
const chosen = document.getElementById('chosen');
const problem = form.querySelector('.problem');
const sending = document.getElementById('sending');
const bar = sending.querySelector('progress');
const sent = document.getElementById('sent');
const spoken = document.getElementById('sent-spoken');
const submit = form.querySelector('[type=submit]');
const stop = document.getElementById('stop');

let files = []; // [{ file, name }], the name with its folders

const ofInput = (input) => Array.from(input.files, (file) => ({ file, name: file.webkitRelativePath || file.name }));

function choose(found) {
  files = found;
  const bytes = found.reduce((sum, { file }) => sum + file.size, 0);
  const what = found.length === 1 ? found[0].name : `${found.length.toLocaleString('en')} files`;
  chosen.textContent = found.length ? `${what}, ${sizeOf(bytes)}` : 'There were no files in it.';
  zone.classList.toggle('full', found.length > 0);
  const closed = zone.closest('details:not([open])');
  if (closed) closed.open = true;
  show(problem, '');
}

function sizeOf(bytes) {
  const power = Math.min(3, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  const figure = bytes / 1000 ** power;
  return `${figure.toFixed(power && figure < 10 ? 1 : 0)} ${['B', 'kB', 'MB', 'GB'][power]}`;
}

for (const input of form.querySelectorAll('[type=file]')) {
  input.addEventListener('change', () => {
    const found = ofInput(input);
    input.value = ''; // so that choosing the same again is a change again
    if (found.length) choose(found);
  });
}

// Everywhere on the page, so that a drop beside the zone does not make the browser leave for the file.
let depth = 0;
addEventListener('dragenter', (event) => {
  event.preventDefault();
  depth += 1;
  zone.classList.add('over');
});
addEventListener('dragleave', () => {
  depth = Math.max(0, depth - 1);
  zone.classList.toggle('over', depth > 0);
});
addEventListener('dragover', (event) => event.preventDefault());
addEventListener('drop', async (event) => {
  event.preventDefault();
  depth = 0;
  zone.classList.remove('over');
  if (!sending.hidden || !event.dataTransfer.types.includes('Files')) return;
  // Entries must be taken before the first wait: the list is empty after it.
  const entries = Array.from(event.dataTransfer.items, (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  chosen.textContent = 'Looking …';
  try {
    choose((await Promise.all(entries.map(filesBelow))).flat());
  } catch {
    choose([]);
    show(problem, 'The browser could not read what was dropped.');
  }
});

async function filesBelow(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, name: entry.fullPath.replace(/^\//, '') }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) { // a reader hands out a hundred entries at a time
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!batch.length) return found;
    for (const inner of batch) found.push(...await filesBelow(inner));
  }
}

function isSending(now) {
  sending.hidden = !now;
  submit.hidden = now;
  stop.disabled = false;
  (now ? stop : submit).focus();
  bar.value = 0;
  sent.textContent = '';
  spoken.textContent = now ? 'Uploading' : '';
}

form.addEventListener('submit', async (event) => {
  event.preventDefault();
  if (!files.length) {
    show(problem, 'Choose images or an archive first.');
    document.getElementById('files').focus();
    return;
  }
  show(problem, '');
  submit.disabled = true;
  try {
    await check();
  } catch (error) {
    show(problem, error.message);
    return;
  } finally {
    submit.disabled = false;
  }
  const body = new FormData();
  for (const [name, value] of fieldsOf(form)) body.append(name, value);
  for (const [content, name] of partsOf(files)) body.append('file', content, name);
  isSending(true);
  send(body);
});

// Archives as they are, all else in one: named after the folder that it lies in.
function partsOf(found) {
  if (found.length === 1) return [[found[0].file, found[0].name]];
  const isArchive = ({ name }) => /\.(zip|tar|tgz|tar\.gz)$/i.test(name);
  const others = found.filter((each) => !isArchive(each));
  const parts = found.filter(isArchive).map(({ file, name }) => [file, name]);
  if (others.length) {
    const folders = new Set(others.map(({ name }) => (name.includes('/') ? name.split('/')[0] : '')));
    const [folder] = folders;
    parts.unshift([tarOf(others), `${folders.size === 1 && folder ? folder : `${others.length} images`}.tar`]);
  }
  return parts;
}

// Before the first byte: a refusal in the middle of a long upload may not even be heard.
async function check() {
  if (!form.dataset.check) return;
  const { name, ...parameters } = parametersOf(form);
  await call('POST', form.dataset.check, parameters);
}

function send(body) {
  const request = new XMLHttpRequest();
  const fail = (text) => {
    isSending(false);
    show(problem, text);
  };
  request.upload.addEventListener('progress', ({ loaded, total }) => {
    bar.value = total ? loaded / total : 0;
    sent.textContent = loaded < total ? `${sizeOf(loaded)} of ${sizeOf(total)} sent` : 'All sent; the service is storing it …';
  });
  request.upload.addEventListener('load', () => {
    stop.disabled = true; // what has arrived is taken in, whether or not we hear of it
    spoken.textContent = 'All sent';
  });
  request.addEventListener('load', () => {
    if (request.status === 202) {
      sending.hidden = true;
      const then = form.dataset.then;
      location.assign(then.endsWith('/') ? then + JSON.parse(request.responseText).id : then);
    } else {
      fail(detailOf(request.status, request.responseText));
    }
  });
  request.addEventListener('error', () => fail(stop.disabled
    ? 'The connection broke before the answer came. The collections tell whether it was taken in.'
    : 'The connection broke while sending. Nothing was kept; please try again.'));
  let stopped = false;
  request.addEventListener('abort', () => fail(stopped
    ? 'Stopped. Nothing was kept.'
    : 'The browser gave up sending. Nothing was kept; please send an archive (zip, tar, tar.gz).'));
  stop.onclick = () => {
    stopped = true;
    request.abort();
  };
  request.open('POST', form.action);
  request.send(body);
}

addEventListener('beforeunload', (event) => { if (!sending.hidden) event.preventDefault(); });
