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

// The editor predicts attributes with two hidden layers; see carproto.latent.edit. A matrix is a list of rows.
// Its input x is a latent, followed by the channel gains in units of gain_unit from 1.

export function decodeEditor(about) {
  if (!about) return null;
  const bytes = Uint8Array.from(atob(about.weights), (character) => character.charCodeAt(0));
  const numbers = new Float32Array(bytes.buffer);
  let start = 0;
  const layers = about.sizes.slice(1).map((nOut, k) => {
    const nIn = about.sizes[k];
    const weight = Array.from({ length: nOut }, (_, i) => numbers.subarray(start + i * nIn, start + (i + 1) * nIn));
    start += nOut * nIn;
    const bias = numbers.subarray(start, start + nOut);
    start += nOut;
    return { weight, bias };
  });
  return { ...about, layers };
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) sum += a[i] * b[i];
  return sum;
}

// Returns the standardised attributes of a latent and their Jacobian, one row an attribute.
export function predict({ layers }, z) {
  let h = z;
  const slopes = [];
  layers.forEach(({ weight, bias }, k) => {
    h = weight.map((row, i) => dot(row, h) + bias[i]);
    if (k < layers.length - 1) {
      h = h.map(Math.tanh);
      slopes.push(h.map((value) => 1 - value * value));
    }
  });
  let jacobian = layers[layers.length - 1].weight.map((row) => Array.from(row));
  for (let k = layers.length - 2; k >= 0; k -= 1) {
    const { weight } = layers[k];
    const nIn = weight[0].length;
    jacobian = jacobian.map((row) => {
      const out = new Array(nIn).fill(0);
      row.forEach((value, i) => {
        const factor = value * slopes[k][i];
        for (let n = 0; n < nIn; n += 1) out[n] += factor * weight[i][n];
      });
      return out;
    });
  }
  return { values: h, jacobian };
}

// Solves a small symmetric positive system by elimination.
function solve(matrix, right) {
  const rows = matrix.map((row, i) => [...row, right[i]]);
  rows.forEach((pivot, i) => {
    for (let j = i + 1; j < rows.length; j += 1) {
      const factor = rows[j][i] / pivot[i];
      for (let k = i; k <= rows.length; k += 1) rows[j][k] -= factor * pivot[k];
    }
  });
  const x = new Array(rows.length).fill(0);
  for (let i = rows.length - 1; i >= 0; i -= 1) {
    let sum = rows[i][rows.length];
    for (let k = i + 1; k < rows.length; k += 1) sum -= rows[i][k] * x[k];
    x[i] = sum / rows[i][i];
  }
  return x;
}

const clampTo = (value, low, high) => Math.min(Math.max(value, low), high);

const zeros = (length) => new Array(length).fill(0);
const add = (a, b) => a.map((value, i) => value + b[i]);
const subtract = (a, b) => a.map((value, i) => value - b[i]);
const limit = (values, bound) => values.map((value) => clampTo(value, -bound, bound));

// Returns the smallest step that changes the attributes by `missing`, to first order.
function smallestStep(jacobian, missing, damping) {
  const square = jacobian.map((row, i) => jacobian.map((other, j) => dot(row, other) + (i === j ? damping : 0)));
  const weights = solve(square, missing);
  return jacobian[0].map((_, n) => jacobian.reduce((sum, row, k) => sum + row[n] * weights[k], 0));
}

function predictStep(editor, x, change) {
  const goal = add(predict(editor, x).values, change);
  let moved = x;
  for (let step = 0; step < editor.steps; step += 1) {
    const { values, jacobian } = predict(editor, moved);
    moved = add(moved, smallestStep(jacobian, subtract(goal, values), editor.damping));
  }
  return moved;
}

function updateJacobian(jacobian, step, change) {
  const length = Math.max(dot(step, step), 1e-6);
  jacobian.forEach((row, k) => {
    const factor = (change[k] - dot(row, step)) / length;
    if (Number.isFinite(factor)) step.forEach((value, n) => { row[n] += factor * value; });
  });
}

function goalOf(editor, start, amounts) {
  const { names, mean, spread, low, high } = editor;
  const clamped = [];
  const goal = names.map((name, k) => {
    const now = start[k] * spread[k] + mean[k];
    const wish = now + (amounts[name] ?? 0);
    const value = clampTo(wish, Math.min(low[k], now), Math.max(high[k], now));
    if (Math.abs(value - wish) > 1e-6 + 1e-5 * Math.abs(wish)) clamped.push(name);
    return (value - mean[k]) / spread[k];
  });
  return { goal, clamped };
}

const isEdited = (amounts) => Object.values(amounts).some((amount) => amount !== 0);

// The gains of the first block come first, 64 positions a channel; an edit moves all of a channel alike.
function perChannel({ channels: [first] }, gains) {
  const means = Array.from({ length: first }, (_, c) => gains.slice(64 * c, 64 * c + 64).reduce((sum, gain) => sum + gain, 0) / 64);
  return [...means, ...gains.slice(64 * first)];
}

function toInput(editor, { z, gains }) {
  const n = editor.sizes[0] - editor.z_dim;
  const byChannel = gains ? perChannel(editor, gains) : zeros(n).fill(1);
  return [...z, ...byChannel.map((gain) => (gain - 1) / editor.gain_unit)];
}

// car: the one that x0 = toInput(editor, car) came from; what its gains differ by position stays.
function fromInput(editor, x, car, clamped) {
  const x0 = toInput(editor, car);
  const moved = x.slice(editor.z_dim).map((value, i) => (value - x0[editor.z_dim + i]) * editor.gain_unit);
  const [first] = editor.channels;
  const nGains = 63 * first + moved.length;
  const before = car.gains ?? zeros(nGains).fill(1);
  const gains = before.map((gain, i) => Math.round(1e4 * (gain + moved[i < 64 * first ? Math.floor(i / 64) : i - 63 * first])) / 1e4);
  return { z: x.slice(0, editor.z_dim), gains, clamped };
}

// amounts: change of each attribute in its unit. Returns the edited car as predicted, and the attributes that end at the limit.
export function predictEdit(car, amounts, editor) {
  if (!editor || !isEdited(amounts)) return { ...car, clamped: [] };
  const x = toInput(editor, car);
  const start = predict(editor, x).values;
  const { goal, clamped } = goalOf(editor, start, amounts);
  return fromInput(editor, predictStep(editor, x, subtract(goal, start)), car, clamped);
}

// Edits a car, corrected by its measured attributes: yields cars to measure, takes their attributes, returns the edited car.
export function* measureEdit(car, amounts, editor) {
  if (!editor || !isEdited(amounts)) return { ...car, clamped: [] };
  const standardise = (values) => values.map((value, k) => (value - editor.mean[k]) / editor.spread[k]);
  const x = toInput(editor, car);
  const start = standardise(yield fromInput(editor, x, car));
  if (!start.every(Number.isFinite)) throw new PageError('This car cannot be measured, so it cannot be edited: choose another car.');
  const { goal, clamped } = goalOf(editor, start, amounts);
  const { jacobian } = predict(editor, x);
  let moved = predictStep(editor, x, subtract(goal, start));
  let best = x;
  let atBest = start;
  let least = Infinity;
  for (let round = 0; round <= editor.rounds; round += 1) {
    const reached = standardise(yield fromInput(editor, moved, car));
    updateJacobian(jacobian, subtract(moved, best), subtract(reached, atBest));
    const missing = subtract(goal, reached);
    const error = dot(missing, missing);
    if (error < least) [best, atBest, least] = [moved, reached, error];
    if (least < editor.tolerance ** 2) break;
    moved = add(best, smallestStep(jacobian, limit(subtract(goal, atBest), editor.max_step), editor.damping));
  }
  return fromInput(editor, best, car, clamped);
}

const isNumbers = (value) => Array.isArray(value) && value.length > 0 && value.every((v) => typeof v === 'number' && Math.abs(v) < 1e9);
const LISTS = ['z_a', 'z_b', 'latent', 'labels'];
const FIELDS = ['z_a', 'z_b', 'latent', 'generator', 'labels', 'levels', 'mode', 'car_a', 'car_b', 'common', 'futuristic', 'channel_gains_a',
  'channel_gains_b', 'gain_power', 'shown', 'edits'];

function checkEdits({ amounts, z_a, z_b, channel_gains_a, channel_gains_b }, pair) {
  const isRight = (z) => isNumbers(z) && z.length === pair.z_dim;
  const areGains = (gains) => gains === null || gains === undefined || (isNumbers(gains) && gains.length === pair.n_gains);
  if (!isRight(z_a) || !isRight(z_b) || !areGains(channel_gains_a) || !areGains(channel_gains_b) || typeof amounts !== 'object' || amounts === null || !isNumbers(Object.values(amounts))) {
    throw new PageError('This recipe is broken: edits hold amounts, and both cars before the edit.');
  }
  const unknown = Object.keys(amounts).filter((name) => !pair.editor?.editable.includes(name));
  if (unknown.length) throw new PageError(`This recipe edits ${unknown.join(', ')}, which this page cannot.`);
}

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
  const power = recipe.gain_power ?? 1; // recipes from before this field are linear
  if (!(typeof power === 'number' && power >= 1 && power <= 10)) {
    throw new PageError('This recipe is broken: gain_power is a number from 1 to 10.');
  }
  const edits = recipe.edits ?? null;
  if (edits !== null) checkEdits(edits, pair);
  const { shown } = recipe;
  if (!(shown === null || shown === undefined || (Number.isInteger(shown) && shown >= 0 && shown < n))) {
    throw new PageError('This recipe is broken: shown is the index of a frame.');
  }
  return { ...recipe, generator: rows, gain_power: power };
}

// edited: {a, b}, the cars as they are shown
export function writeRecipe(state, edited, pair) {
  const labels = [...new Set([...Array(11).keys()].map((i) => i / 10).concat(state.position))].sort((x, y) => x - y);
  const rows = labels.map((label) => intensitiesAt(state.path, label));
  const amounts = Object.fromEntries(Object.entries(state.edits).filter(([, amount]) => amount !== 0));
  const { a, b } = state;
  const before = { z_a: a.z, z_b: b.z, channel_gains_a: a.gains, channel_gains_b: b.gains };
  return {
    z_a: edited.a.z,
    z_b: edited.b.z,
    latent: rows.map((row) => row.latent),
    generator: rows.map((row) => row.generator),
    labels,
    levels: state.levels,
    mode: 'norm',
    car_a: a.name,
    car_b: b.name,
    common: pair.common,
    futuristic: pair.futuristic,
    channel_gains_a: edited.a.gains,
    channel_gains_b: edited.b.gains,
    gain_power: state.gainPower ?? pair.gain_power,
    shown: labels.indexOf(state.position),
    ...(Object.keys(amounts).length ? { edits: { amounts, ...before } } : {}),
  };
}
