// The page: state, controls and canvases. The graph runs in worker.js.

import { decodeEditor, decodeLatents, intensitiesAt, measureEdit, PageError, parseRecipe, predictEdit, writeRecipe } from './model.js';

const N_FRAMES = 9;
const find = (selector) => document.querySelector(selector);
const message = find('#message');
const slider = find('#intensity');
const state = { a: null, b: null, edits: {}, position: 0.5, path: null, levels: null, gainPower: null };
const shared = { latencies: [], ready: false, first: null }; // for tests
let pair;
let latents;
let worker;
let nextId = 0;
const waiting = new Map();

function say(text, isError = false) {
  message.textContent = text;
  message.classList.toggle('error', isError);
}

function ask(data) {
  nextId += 1;
  const id = nextId;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ ...data, id });
  });
}

function startWorker() {
  worker = new Worker(new URL('worker.js', document.baseURI), { type: 'module' });
  worker.onmessage = ({ data: { id, result, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || 'worker.js cannot be loaded'));
    waiting.clear();
  };
}

// canvases

const small = document.createElement('canvas');

function paint(canvas, pixels) {
  small.width = pair.size;
  small.height = pair.size;
  small.getContext('2d').putImageData(new ImageData(pixels, pair.size, pair.size), 0, 0);
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// The cars as they are shown: edited as predicted while a slider moves, corrected by measuring when it rests.
let edited = null; // {a, b}
let correction = null; // yields cars to measure

const isEdited = () => Object.values(state.edits).some((amount) => amount !== 0);

function* correctBoth({ a, b }, edits) {
  return { a: yield* measureEdit(a, edits, pair.editor), b: yield* measureEdit(b, edits, pair.editor) };
}

function setEdited(cars) {
  edited = cars;
  showClamped([...new Set([...cars.a.clamped, ...cars.b.clamped])]);
}

function editCars(isFinal) {
  const edits = { ...state.edits };
  setEdited({ a: predictEdit(state.a, edits, pair.editor), b: predictEdit(state.b, edits, pair.editor) });
  correction = isFinal && isEdited() && pair.background ? { steps: correctBoth(state, edits), values: undefined } : null;
  showMeasured();
}

async function correct() {
  const { steps, values } = correction;
  const current = correction;
  const { value, done } = steps.next(values);
  if (done) {
    correction = null;
    setEdited(value);
    showMeasured();
    showFrames();
    stageSince ??= performance.now();
    return;
  }
  current.values = await ask({ type: 'measure', car: { z: value.z, gains: value.gains } });
}

function inputsAt(position) {
  const { a, b } = edited;
  return { z_a: a.z, z_b: b.z, ...intensitiesAt(state.path, position), levels: state.levels, gains_a: a.gains, gains_b: b.gains, gain_power: state.gainPower };
}

const generate = (position) => ask({ type: 'generate', inputs: inputsAt(position) });

// The newest request of the slider goes first; the strip fills when the slider rests.
let isBusy = false;
let stageSince = null;
let stripQueue = [];
const cars = document.querySelectorAll('.end canvas');

async function work() {
  if (isBusy) return;
  isBusy = true;
  document.body.dataset.state = 'busy';
  try {
    while (stageSince !== null || correction || stripQueue.length) {
      if (stageSince !== null) {
        const since = stageSince;
        stageSince = null;
        const pixels = await generate(state.position);
        paint(find('#stage'), pixels);
        shared.pixels = pixels;
        shared.shown = state.position;
        shared.latencies.push(performance.now() - since);
        shared.first ??= performance.now();
        shared.ready = true;
      } else if (correction) {
        await correct();
      } else {
        const queue = stripQueue;
        const i = queue.shift();
        const pixels = await generate(i / (N_FRAMES - 1));
        if (queue !== stripQueue) continue; // the cars have changed meanwhile
        paint(frames[i].firstElementChild, pixels);
        if (i === 0) paint(cars[0], pixels);
        if (i === N_FRAMES - 1) paint(cars[1], pixels);
      }
    }
  } catch (error) {
    say(explain(error), true);
  } finally {
    isBusy = false;
    document.body.dataset.state = 'rest';
  }
}

async function rest() {
  while (isBusy) await new Promise((resolve) => { setTimeout(resolve, 20); });
}

function showStage() {
  stageSince ??= performance.now();
  const text = state.position.toFixed(2);
  find('#value').textContent = text;
  fillTrack(slider, 0);
  slider.setAttribute('aria-valuetext', `${text}, from common to futuristic`);
  find('#stage').setAttribute('aria-label', `Blended car at intensity ${text}`);
  const nearest = Math.round(state.position * (N_FRAMES - 1));
  frames.forEach((frame, i) => frame.setAttribute('aria-current', String(i === nearest)));
  work();
}

function showFrames() {
  stripQueue = [0, N_FRAMES - 1, ...Array.from({ length: N_FRAMES - 2 }, (_, i) => i + 1)];
}

function showAll(isEditing = true) {
  if (isEditing) editCars(true);
  showFrames();
  for (const end of document.querySelectorAll('.end')) {
    const name = state[end.dataset.end].name.replace('seed:', 'car ');
    end.querySelector('[data-name]').textContent = name;
    end.querySelector('[data-number]').value = /^car \d+$/.test(name) ? name.slice(4) : '';
    end.querySelector('canvas').setAttribute('aria-label', `${end.dataset.end === 'a' ? 'Common' : 'Futuristic'} ${name}`);
  }
  showStage();
}

function select(position) {
  state.position = position;
  slider.value = position;
  showStage();
}

// cars

const carOf = (seed) => ({ z: latents[seed], gains: null, name: `seed:${seed}` });

function renew(end, chosen = null) {
  const isTaken = (seed) => [state.a, state.b].some((car) => car?.name === `seed:${seed}`);
  let seed = chosen;
  while (seed === null || (chosen === null && isTaken(seed))) seed = Math.floor(Math.random() * latents.length);
  state[end] = carOf(seed);
  if (find('#same').checked) state[end === 'a' ? 'b' : 'a'] = carOf(seed);
  say('');
  showAll();
}

// files

function saveFile(name, blob) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function openRecipe(file) {
  if (file.size > 4_000_000) throw new PageError('This file is larger than 4 MB: open a recipe.json that carproto wrote.');
  const recipe = parseRecipe(await file.text(), pair);
  const { edits } = recipe;
  const carsOf = (source) => ['a', 'b'].map((end) => ({
    z: source[`z_${end}`], gains: source[`channel_gains_${end}`] ?? null, name: recipe[`car_${end}`] || 'car of the recipe', clamped: [],
  }));
  [state.a, state.b] = carsOf(edits ?? recipe);
  state.edits = { ...edits?.amounts };
  state.levels = recipe.levels ?? null;
  state.gainPower = recipe.gain_power;
  if (recipe.labels.length > 1) {
    const [coarse, fine] = [0, 1].map((k) => recipe.generator.map((row) => row[k]));
    state.path = { labels: recipe.labels, latent: recipe.latent, coarse, fine };
  }
  find('#same').checked = false;
  showEdits();
  say('The recipe is open.');
  state.position = Math.min(1, Math.max(0, recipe.labels[recipe.shown ?? Math.floor(recipe.labels.length / 2)]));
  slider.value = state.position;
  const [a, b] = carsOf(recipe);
  correction = null;
  setEdited({ a, b });
  showMeasured();
  showAll(false);
}

// body sliders

// Colours the track of a slider between two shares of its length.
function fillTrack(input, origin) {
  const at = (Number(input.value) - Number(input.min)) / (Number(input.max) - Number(input.min));
  input.style.setProperty('--from', `${100 * Math.min(at, origin)}%`);
  input.style.setProperty('--to', `${100 * Math.max(at, origin)}%`);
}

function showMeasured() {
  const hasEdits = isEdited();
  find('#reset').disabled = !hasEdits;
  const text = correction ? 'Measuring the edited cars \u2026' : 'Measured on both cars.';
  find('#measured').textContent = hasEdits ? (pair.background ? text : 'Predicted: a change may differ from the number.') : '';
}

function formatAmount({ decimals, unit, scale }, amount) {
  const sign = amount > 0 ? '+' : amount < 0 ? '\u2212' : '';
  return `${sign}${Math.abs(amount * scale).toFixed(decimals)}${unit}`;
}

function showClamped(names) {
  document.querySelectorAll('.edit').forEach((row) => {
    row.querySelector('.limit').hidden = !names.includes(row.dataset.name);
  });
}

function showEdits() {
  find('.body').hidden = !pair.editor?.editable.length;
  const rows = (pair.editor?.editable ?? []).map((name) => {
    const k = pair.editor.names.indexOf(name);
    const { shown, low, high } = pair.editor;
    const row = document.createElement('div');
    row.className = 'edit';
    row.dataset.name = name;
    const id = `edit-${name}`;
    const label = Object.assign(document.createElement('label'), { htmlFor: id, textContent: shown[k].label });
    const output = document.createElement('output');
    const half = (high[k] - low[k]) / 2;
    const input = Object.assign(document.createElement('input'), { type: 'range', id, min: -1, max: 1, step: 0.02, value: 0 });
    input.value = (state.edits[name] ?? 0) / half;
    const limit = Object.assign(document.createElement('small'), {
      className: 'limit', hidden: true, textContent: 'at the limit of the cars that were seen',
    });
    const update = () => {
      output.textContent = formatAmount(shown[k], Number(input.value) * half);
      fillTrack(input, 0.5);
      input.setAttribute('aria-valuetext', output.textContent);
    };
    input.addEventListener('input', () => {
      state.edits[name] = Number(input.value) * half;
      update();
      editCars(false);
      showStage();
    });
    input.addEventListener('change', () => showAll());
    update();
    row.append(label, output, input, limit);
    return row;
  });
  find('.edits').replaceChildren(...rows);
}

// start

function explain(error) {
  const text = error.message;
  if (error instanceof PageError) return text;
  if (/WebAssembly|wasm/i.test(text) && /block|CompileError|not allowed|disallowed|unsafe-eval/i.test(text)) {
    return `This browser blocks WebAssembly, which the page needs: allow it, or open another browser. (${text})`;
  }
  if (/another pair/.test(text)) return 'The file pair.onnx does not belong to pair.json: export the page again with carproto export.';
  return `The page cannot go on: ${text}. Reload it; if that does not help, export it again with carproto export.`;
}

async function fetchPair() {
  const response = await fetch(new URL('pair.json', document.baseURI));
  if (!response.ok) throw new PageError('The file pair.json is missing: export the page again with carproto export.');
  const result = await response.json();
  if (result.kind !== 'pair' || result.format !== 1) {
    throw new PageError('The file pair.json is of another version: export the page again with carproto export.');
  }
  return result;
}

const frames = Array.from({ length: N_FRAMES }, (_, i) => {
  const button = document.createElement('button');
  const position = i / (N_FRAMES - 1);
  button.type = 'button';
  button.setAttribute('aria-label', `Frame at intensity ${position.toFixed(2)}`);
  button.append(Object.assign(document.createElement('canvas'), { width: 192, height: 192 }));
  button.addEventListener('click', () => select(position));
  return button;
});

function connect() {
  find('.strip').append(...frames);
  slider.addEventListener('input', () => select(Number(slider.value)));
  document.querySelectorAll('.end').forEach((end) => {
    end.querySelector('[data-new]').addEventListener('click', () => renew(end.dataset.end));
    const number = end.querySelector('[data-number]');
    number.max = latents.length - 1;
    number.addEventListener('change', () => {
      if (number.value !== '' && number.checkValidity()) renew(end.dataset.end, Number(number.value));
      else say(`Choose a car from 0 to ${number.max}.`);
    });
  });
  find('#same').addEventListener('change', ({ target }) => {
    if (target.checked) state.b = state.a;
    else if (state.b === state.a) renew('b');
    showAll();
  });
  find('#png').addEventListener('click', () => find('#stage').toBlob((blob) => saveFile(`car_${state.position.toFixed(2)}.png`, blob)));
  find('#save').addEventListener('click', async () => {
    await rest();
    saveFile('recipe.json', new Blob([JSON.stringify(writeRecipe(state, edited, pair), null, 2)], { type: 'application/json' }));
  });
  find('#load').addEventListener('click', () => find('#file').click());
  find('#file').addEventListener('change', async ({ target }) => {
    try {
      await openRecipe(target.files[0]);
    } catch (error) {
      say(explain(error), true);
    } finally {
      target.value = '';
    }
  });
  find('#reset').addEventListener('click', () => {
    state.edits = {};
    showEdits();
    showAll();
    find('.edit input').focus(); // the button is disabled now
  });
}

async function start() {
  window.carproto = shared;
  say('Loading the generators \u2026');
  const query = new URLSearchParams(location.search);
  try {
    pair = await fetchPair();
    const description = pair;
    pair = { ...pair, editor: decodeEditor(pair.editor) };
    startWorker();
    const { backend, threads, note } = await ask({ type: 'start', backend: query.get('backend'), hasGpuFiles: pair.has_webgpu, pair: description });
    latents = decodeLatents(pair.latents, pair.z_dim);
    state.path = pair.path;
    [state.a, state.b] = pair.start.map(carOf);
    shared.backend = backend;
    find('.workspace').hidden = false;
    connect();
    showEdits();
    say('');
    const where = backend === 'webgpu' ? 'WebGPU' : `WebAssembly, ${threads} thread${threads > 1 ? 's' : ''}`;
    find('#runtime').textContent = `${pair.name}: cars are generated in this browser with ${where}; nothing is sent. ${note}`;
    find('#card').textContent = pair.card;
    showAll();
  } catch (error) {
    say(explain(error), true);
  }
}

start();
