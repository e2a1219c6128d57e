// Latents, paths, edits and recipes: no page, no network.

export class PageError extends Error {} // its text tells a person what to do

export function decodeLatents(base64, zDim) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const numbers = new Float32Array(bytes.buffer);
  return Array.from({ length: numbers.length / zDim }, (_, i) => Array.from(numbers.subarray(i * zDim, (i + 1) * zDim)));
}

export function interpolate(xs, ys, x) {
  if (x <= xs[0]) return ys[0];
  const last = xs.length - 1;
  if (x >= xs[last]) return ys[last];
  let i = 0;
  while (xs[i + 1] < x) i += 1;
  return ys[i] + ((ys[i + 1] - ys[i]) * (x - xs[i])) / (xs[i + 1] - xs[i]);
}

// path: {labels, latent, coarse, fine}, of which labels rise
export function intensitiesAt(path, position) {
  const [latent, coarse, fine] = [path.latent, path.coarse, path.fine].map((values) => interpolate(path.labels, values, position));
  return { latent, generator: [coarse, fine] };
}

// attributes: [{name, direction, amounts, steps}]; a step of 1 adds the direction once
export function applyEdits(z, edits, attributes) {
  const edited = [...z];
  for (const { name, direction, amounts, steps } of attributes) {
    if (!edits[name]) continue;
    const step = interpolate(amounts, steps, edits[name]);
    direction.forEach((value, i) => { edited[i] += step * value; });
  }
  return edited;
}

export function clampEdits(edits, attributes) {
  const clamped = {};
  const notes = [];
  for (const [name, amount] of Object.entries(edits)) {
    const attribute = attributes.find((row) => row.name === name);
    if (!attribute) throw new PageError(`This recipe edits ${name}, which this page cannot.`);
    const { amounts, label } = attribute;
    clamped[name] = Math.min(Math.max(amount, amounts[0]), amounts[amounts.length - 1]);
    if (clamped[name] !== amount) notes.push(`${label} ${amount} is beyond the cars that were seen; ${clamped[name].toFixed(2)} is shown.`);
  }
  return { edits: clamped, notes };
}

const isNumbers = (value) => Array.isArray(value) && value.length > 0 && value.every((v) => typeof v === 'number' && Math.abs(v) < 1e9);
const LISTS = ['z_a', 'z_b', 'latent', 'labels'];
const FIELDS = ['z_a', 'z_b', 'latent', 'generator', 'labels', 'levels', 'mode', 'car_a', 'car_b', 'common', 'futuristic', 'channel_gains_a',
  'channel_gains_b', 'shown', 'edits'];

export function parseRecipe(text, pair) {
  let recipe;
  try {
    recipe = JSON.parse(text);
  } catch {
    throw new PageError('This file is not JSON: open a recipe.json that carproto wrote.');
  }
  if (recipe === null || typeof recipe !== 'object' || Array.isArray(recipe) || !LISTS.every((name) => isNumbers(recipe[name]))
      || !Array.isArray(recipe.generator) || Object.keys(recipe).some((name) => !FIELDS.includes(name))) {
    throw new PageError('This file is no recipe of a blend: open a recipe.json that carproto wrote.');
  }
  for (const side of ['common', 'futuristic']) {
    if (recipe[side] && recipe[side] !== pair[side]) {
      throw new PageError(`This recipe belongs to another release: its ${side} generator is ${recipe[side]}, this page has ${pair[side]}.`);
    }
  }
  const n = recipe.labels.length;
  const rows = recipe.generator.map((row) => (typeof row === 'number' ? [row, row] : row));
  const sizes = { z_a: pair.z_dim, z_b: pair.z_dim, latent: n, levels: pair.n_levels, channel_gains_a: pair.n_gains, channel_gains_b: pair.n_gains };
  for (const [name, size] of Object.entries(sizes)) {
    const values = recipe[name];
    if (values !== null && values !== undefined && !(isNumbers(values) && values.length === size)) {
      throw new PageError(`This recipe is broken: ${name} must hold ${size} numbers.`);
    }
  }
  if (rows.length !== n || n > 1000 || !rows.every((row) => isNumbers(row) && row.length === 2)
      || recipe.labels.some((label, i) => i > 0 && label <= recipe.labels[i - 1])) {
    throw new PageError('This recipe is broken: labels rise, and latent, generator and labels have one length, at most 1000.');
  }
  if ((recipe.mode ?? 'norm') !== 'norm') {
    throw new PageError(`This recipe takes the path ${recipe.mode} between its latents: this page shows the path norm. Use carproto blend --recipe.`);
  }
  const edits = recipe.edits ?? {};
  if (typeof edits !== 'object' || Array.isArray(edits) || !Object.values(edits).every((v) => typeof v === 'number' && Number.isFinite(v))) {
    throw new PageError('This recipe is broken: edits are numbers by name.');
  }
  const { shown } = recipe;
  if (!(shown === null || shown === undefined || (Number.isInteger(shown) && shown >= 0 && shown < n))) {
    throw new PageError('This recipe is broken: shown is the index of a frame.');
  }
  return { ...recipe, edits, generator: rows };
}

export function writeRecipe(state, pair) {
  const labels = [...new Set([...Array(11).keys()].map((i) => i / 10).concat(state.position))].sort((x, y) => x - y);
  const rows = labels.map((label) => intensitiesAt(state.path, label));
  const edits = Object.fromEntries(Object.entries(state.edits).filter(([, amount]) => amount !== 0));
  return {
    z_a: applyEdits(state.a.z, state.edits, pair.attributes),
    z_b: applyEdits(state.b.z, state.edits, pair.attributes),
    latent: rows.map((row) => row.latent),
    generator: rows.map((row) => row.generator),
    labels,
    levels: state.levels,
    mode: 'norm',
    car_a: state.a.name,
    car_b: state.b.name,
    common: pair.common,
    futuristic: pair.futuristic,
    channel_gains_a: state.a.gains,
    channel_gains_b: state.b.gains,
    shown: labels.indexOf(state.position),
    ...(Object.keys(edits).length ? { edits } : {}),
  };
}
