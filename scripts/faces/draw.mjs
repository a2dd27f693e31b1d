// Draw faces and write them to stdout, for `make.py`:
//
//     node draw.mjs FIRST COUNT
//
// Each face is one line of JSON (its attributes, as the library reports them), then 128 x 128 x 4 bytes of RGBA.
// Design: ToonHead by Johan Melin, CC BY 4.0 (figma.com/community/file/1589627891082866389).

import { createAvatar } from '@dicebear/core';
import * as toonHead from '@dicebear/toon-head';
import { Resvg } from '@resvg/resvg-js';

const SIZE = 128;

// A number in [0, 1) for a string: 32-bit FNV-1a, then two rounds of mixing.
function uniform(text) {
  let h = 2166136261;
  for (const character of text) h = Math.imul(h ^ character.charCodeAt(0), 16777619) >>> 0;
  h = Math.imul(h ^ (h >>> 15), 2246822507) >>> 0;
  h = (h ^ (h >>> 13)) >>> 0;
  return h / 2 ** 32;
}

// HSL, each in [0, 1], to six hexadecimal digits.
function hex(hue, saturation, lightness) {
  const chroma = saturation * Math.min(lightness, 1 - lightness);
  const channel = (n) => {
    const k = (n + hue * 12) % 12;
    const value = lightness - chroma * Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return Math.round(255 * value).toString(16).padStart(2, '0');
  };
  return channel(0) + channel(8) + channel(4);
}

function background(i) {
  return hex(uniform(`hue${i}`), 0.35 + 0.3 * uniform(`sat${i}`), 0.78 + 0.12 * uniform(`light${i}`));
}

// Wait where the reader is slower: a pipe holds little.
function write(chunk) {
  return new Promise((resolve) => process.stdout.write(chunk, resolve));
}

const [first, count] = process.argv.slice(2).map(Number);
for (let i = first; i < first + count; i++) {
  const options = { seed: `face-${i}`, backgroundColor: [background(i)], beardProbability: 30, scale: 110 };
  const avatar = createAvatar(toonHead, options);
  const image = new Resvg(avatar.toString(), { fitTo: { mode: 'width', value: SIZE } }).render();
  await write(`${JSON.stringify(avatar.toJson().extra)}\n`);
  await write(Buffer.from(image.pixels));
}
