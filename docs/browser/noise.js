// Gaussian noise of a seed: the numbers of torch.randn(size, generator=torch.Generator().manual_seed(seed)) on a CPU.
//
// PyTorch draws 32-bit integers from MT19937, whose state the low 32 bits of the seed fill, and makes each into a float
// u = (the low 24 bits) / 2^24 in [0, 1). Box and Muller's transform turns eight pairs (u_i, u_(i+8)) of sixteen u into
// sixteen normal numbers,
//
//     r = sqrt(-2 log(1 - u_i)), phi = 2 pi u_(i+8):    z_i = r cos(phi), z_(i+8) = r sin(phi)
//
// and if the size is not a multiple of 16, the last sixteen numbers are drawn once more. The numbers agree with
// PyTorch's to the rounding of its float32 functions, about 1e-6.

const LENGTH = 624;
const OFFSET = 397;

class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(LENGTH);
    this.state[0] = seed;
    for (let i = 1; i < LENGTH; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, previous) + i;
    }
    this.index = LENGTH;
  }

  #refill() {
    const s = this.state;
    for (let i = 0; i < LENGTH; i++) {
      const bits = (s[i] & 0x80000000) | (s[(i + 1) % LENGTH] & 0x7fffffff);
      s[i] = s[(i + OFFSET) % LENGTH] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    this.index = 0;
  }

  // Returns a float in [0, 1), a multiple of 2^-24.
  uniform() {
    if (this.index === LENGTH) this.#refill();
    let bits = this.state[this.index++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    bits ^= bits >>> 18;
    return (bits & 0xffffff) / 0x1000000;
  }
}

// Returns a Float32Array of `size` numbers, at least 16 of them. The seed is an integer from 0 to 2^53 - 1.
export function randn(seed, size) {
  if (!Number.isSafeInteger(seed) || seed < 0) throw new RangeError(`the seed must be an integer of at least 0, got ${seed}`);
  if (size < 16) throw new RangeError(`there must be at least 16 numbers, got ${size}`);
  const twister = new MersenneTwister(Number(BigInt(seed) & 0xffffffffn));
  const z = Float32Array.from({ length: size }, () => twister.uniform());
  for (let start = 0; start + 16 <= size; start += 16) transform(z, start);
  if (size % 16) {
    for (let i = size - 16; i < size; i++) z[i] = twister.uniform();
    transform(z, size - 16);
  }
  return z;
}

function transform(z, start) {
  for (let i = start; i < start + 8; i++) {
    const r = Math.sqrt(-2 * Math.log(1 - z[i]));
    const phi = 2 * Math.PI * z[i + 8];
    z[i] = r * Math.cos(phi);
    z[i + 8] = r * Math.sin(phi);
  }
}

// Returns the point at `weight` (0 to 1) of the great circle from one noise to another (spherical interpolation).
export function slerp(a, b, weight) {
  let [aa, bb, ab] = [0, 0, 0];
  for (let i = 0; i < a.length; i++) {
    aa += a[i] * a[i];
    bb += b[i] * b[i];
    ab += a[i] * b[i];
  }
  const angle = Math.acos(Math.max(-1, Math.min(1, ab / Math.sqrt(aa * bb))));
  const sine = Math.sin(angle);
  if (sine < 1e-6) return a.map((value, i) => (1 - weight) * value + weight * b[i]);
  const [p, q] = [Math.sin((1 - weight) * angle) / sine, Math.sin(weight * angle) / sine];
  return a.map((value, i) => p * value + q * b[i]);
}
