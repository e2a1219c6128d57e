// Runs the graph of the pair with onnxruntime-web, away from the page's own thread.

import { measureCar } from './measure.js';

let ort;
let session;
let sizes;

async function hasGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function createSession(backend, bytes) {
  const isGpu = backend === 'webgpu';
  const glue = isGpu ? 'ort-wasm-simd-threaded.asyncify' : 'ort-wasm-simd-threaded';
  const folder = new URL('ort/', self.location.href);
  ort = await import(new URL(isGpu ? 'ort.webgpu.min.mjs' : 'ort.wasm.min.mjs', folder).href);
  ort.env.wasm.wasmPaths = { mjs: new URL(`${glue}.mjs`, folder).href, wasm: new URL(`${glue}.wasm`, folder).href };
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = 'error';
  session = await ort.InferenceSession.create(bytes, { executionProviders: [backend] });
}

async function start({ backend, hasGpuFiles, pair }) {
  if (typeof WebAssembly !== 'object') throw new Error('WebAssembly is blocked');
  const response = await fetch(new URL('pair.onnx', self.location.href));
  if (!response.ok) throw new Error(`pair.onnx: ${response.status}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (self.crypto?.subtle) { // only on https and localhost
    const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    const hash = Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
    if (hash !== pair.sha256) throw new Error('pair.onnx belongs to another pair');
  }
  sizes = pair;
  const choice = backend ?? (hasGpuFiles && (await hasGpu()) ? 'webgpu' : 'wasm');
  try {
    await createSession(choice, bytes);
    await generate(warmUp());
    return { backend: choice, threads: ort.env.wasm.numThreads, note: '' };
  } catch (error) {
    if (choice !== 'webgpu') throw error;
    await createSession('wasm', bytes);
    return { backend: 'wasm', threads: ort.env.wasm.numThreads, note: `WebGPU failed (${error.message})` };
  }
}

const warmUp = () => ({ z_a: Array(sizes.z_dim).fill(1), z_b: Array(sizes.z_dim).fill(1), latent: 0, generator: [0, 0] });

// The image of one car or blend, channel by channel, in [-1, 1].
async function run({ z_a, z_b, latent, generator, levels, gains_a, gains_b, gain_power }) {
  const tensor = (values, dims) => new ort.Tensor('float32', Float32Array.from(values), dims);
  const ones = Array(sizes.n_gains).fill(1);
  const feeds = {
    z_a: tensor(z_a, [1, sizes.z_dim]),
    z_b: tensor(z_b, [1, sizes.z_dim]),
    latent: tensor([latent], [1]),
    generator: tensor(generator, [2]),
    levels: tensor(levels ?? Array(sizes.n_levels).fill(1), [sizes.n_levels]),
    gains_a: tensor(gains_a ?? ones, [1, sizes.n_gains]),
    gains_b: tensor(gains_b ?? ones, [1, sizes.n_gains]),
    gain_power: tensor([gain_power ?? sizes.gain_power], [1]),
  };
  const { images } = await session.run(feeds);
  return images.getData();
}

async function generate(inputs) {
  const values = await run(inputs);
  const n = sizes.size * sizes.size;
  const pixels = new Uint8ClampedArray(4 * n);
  for (let i = 0; i < n; i += 1) {
    for (let channel = 0; channel < 3; channel += 1) pixels[4 * i + channel] = Math.round((values[channel * n + i] + 1) * 127.5);
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}

async function measure({ z, gains }) {
  const image = await run({ z_a: z, z_b: z, latent: 0, generator: [0, 0], gains_a: gains, gains_b: gains });
  const values = measureCar(image, sizes.size, sizes.background);
  return sizes.editor.names.map((name) => values[name]);
}

self.onmessage = async ({ data }) => {
  try {
    if (data.type === 'start') {
      self.postMessage({ id: data.id, result: await start(data) });
    } else if (data.type === 'measure') {
      self.postMessage({ id: data.id, result: await measure(data.car) });
    } else {
      const pixels = await generate(data.inputs);
      self.postMessage({ id: data.id, result: pixels }, [pixels.buffer]);
    }
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
