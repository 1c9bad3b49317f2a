// The fields of a run's form: what is left empty is left out, so that the service resolves it.

export function fieldsOf(form) {
  return Array.from(new FormData(form)).filter(([, value]) => value !== '');
}

// As JSON: what was typed into a number field is a number.
export function parametersOf(form) {
  const numbers = new Set(Array.from(form.querySelectorAll('[type=number]:enabled'), (field) => field.name));
  return Object.fromEntries(fieldsOf(form).map(([name, value]) => [name, numbers.has(name) ? Number(value) : value]));
}

// Whoever lets the service find the number of clusters need not give one.
for (const auto of document.querySelectorAll('[type=checkbox][name=clusters]')) {
  const number = auto.form.querySelector('[type=number][name=clusters]');
  const follow = () => { number.disabled = auto.checked; };
  auto.addEventListener('change', follow);
  follow(); // the browser may have restored the box
}

// What is wrong inside of a closed part could not be shown, and the form would not say why it does nothing.
addEventListener('invalid', ({ target }) => {
  const closed = target.closest('details:not([open])');
  if (closed) closed.open = true;
}, true);
