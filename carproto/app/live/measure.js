// Measures cars as carproto.eval.attributes does. Images are channel by channel, in [-1, 1].

const N_COLUMNS = 48;
const OPAQUE = 0.25;
const NOISE = 0.06;

const clamp = (value, low = 0, high = 1) => Math.min(Math.max(value, low), high);

function opacityOf(image, size, background) {
  const n = size * size;
  const plain = background.map((value) => value / 127.5 - 1);
  return Float32Array.from({ length: n }, (_, i) => {
    let difference = 0;
    for (let c = 0; c < 3; c += 1) difference = Math.max(difference, Math.abs(image[c * n + i] - plain[c]));
    return difference > NOISE ? clamp(difference / OPAQUE) : 0;
  });
}

function outlineOf(opacity, size) {
  const columns = new Float32Array(size);
  const rows = new Float32Array(size);
  for (let y = 0; y < size; y += 1) {
    for (let x = 0; x < size; x += 1) {
      columns[x] = Math.max(columns[x], opacity[y * size + x]);
      rows[y] = Math.max(rows[y], opacity[y * size + x]);
    }
  }
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const isSolid = (value) => value > 0.5;
  const [width, height] = [sum(columns), sum(rows)];
  const left = Math.max(columns.findIndex(isSolid), 0);
  const right = columns.some(isSolid) ? columns.findLastIndex(isSolid) + 1 : size;
  const bottom = rows.some(isSolid) ? rows.findLastIndex(isSolid) + 1 : size;
  const belowTop = new Float32Array(size);
  const belowBody = new Float32Array(size);
  for (let x = 0; x < size; x += 1) {
    let most = 0;
    for (let y = 0; y < bottom; y += 1) {
      most = Math.max(most, opacity[y * size + x]);
      belowTop[x] += most;
    }
    most = 0;
    for (let y = size - 1; y >= 0; y -= 1) {
      most = Math.max(most, opacity[y * size + x]);
      if (y < bottom) belowBody[x] += 1 - most;
    }
  }
  const sample = (profile, j) => {
    const x = left + ((j + 0.5) / N_COLUMNS) * (right - left) - 0.5;
    const i = clamp(Math.floor(x), 0, size - 2);
    return profile[i] + (profile[i + 1] - profile[i]) * clamp(x - i);
  };
  const all = Array.from({ length: N_COLUMNS }, (_, j) => j);
  const top = all.map((j) => sample(belowTop, j) / height);
  return { width, height, left, bottom, top };
}

// The lower median, as torch.nanmedian.
function median(values) {
  if (!values.length) return NaN;
  return values.sort((a, b) => a - b)[(values.length - 1) >> 1];
}

export function toLab(rgb) {
  const [r, g, b] = rgb.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  const [x, y, z] = [
    (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047,
    0.2126729 * r + 0.7151522 * g + 0.072175 * b,
    (0.0193339 * r + 0.119192 * g + 0.9503041 * b) / 1.08883,
  ].map((value) => (value > 0.008856 ? Math.cbrt(value) : 7.787 * value + 16 / 116));
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}

function paintOf(image, opacity, size, { width, height, left, bottom }) {
  const colours = [[], [], []];
  for (let y = 0; y < size; y += 1) {
    const up = (bottom - y - 0.5) / height;
    for (let x = 0; x < size; x += 1) {
      const along = (x + 0.5 - left) / width;
      if (up > 0.3 && up < 0.48 && along > 0.25 && along < 0.75 && opacity[y * size + x] > 0.9) {
        colours.forEach((values, c) => values.push(image[(c * size + y) * size + x] / 2 + 0.5));
      }
    }
  }
  return toLab(colours.map(median));
}

export function measureCar(image, size, background) {
  const opacity = opacityOf(image, size, background);
  const outline = outlineOf(opacity, size);
  const { top } = outline;
  const roof = top.indexOf(Math.max(...top));
  let [hood, above, weighted] = [0, 0, 0];
  top.forEach((share, j) => {
    if (j < roof) hood += clamp((0.8 - share) / 0.15 + 0.5) / N_COLUMNS;
    const cabin = Math.max((share - 0.7) / 0.3, 0);
    above += cabin;
    weighted += (cabin * (j + 0.5)) / N_COLUMNS;
  });
  const [lightness, red_green, yellow_blue] = paintOf(image, opacity, size, outline);
  return { height: outline.height / outline.width, hood, cabin: weighted / above, lightness, red_green, yellow_blue };
}
