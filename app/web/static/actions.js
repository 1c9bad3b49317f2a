// Buttons and forms that write: cancel, delete, start a run.

import { call, show } from './api.js';
import { parametersOf } from './fields.js';

async function attempt(button, problem, work) {
  const label = button.textContent;
  button.disabled = true;
  button.textContent = button.dataset.busy ?? label;
  show(problem, '');
  try {
    await work();
  } catch (error) {
    show(problem, error.message);
    button.disabled = false;
    button.textContent = label;
    button.focus(); // which it lost when it was disabled
  }
}

for (const button of document.querySelectorAll('[data-post]')) {
  const problem = button.closest('section').querySelector('.problem');
  button.addEventListener('click', () => attempt(button, problem, () => call('POST', button.dataset.post)));
}

for (const button of document.querySelectorAll('[data-dialog]')) {
  const dialog = document.getElementById(button.dataset.dialog);
  button.addEventListener('click', () => dialog.showModal());
}

for (const button of document.querySelectorAll('[data-delete]')) {
  const problem = button.closest('dialog').querySelector('.problem');
  button.addEventListener('click', () => attempt(button, problem, async () => {
    await call('DELETE', button.dataset.delete);
    location.assign('/');
  }));
}

for (const form of document.querySelectorAll('form[data-send]')) {
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    attempt(form.querySelector('[type=submit]'), form.querySelector('.problem'), async () => {
      const run = await call('POST', form.dataset.send, parametersOf(form));
      location.assign(`/runs/${run.id}`);
    });
  });
}
