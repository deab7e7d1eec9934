// Features of patches, from /dense: which patches of two pictures are alike, and a picture of their principal components.
"use strict";

// What is computed, apart from what is shown. Features are [rows, columns, C] in one Float32Array.
const Features = {
  // Each patch's features at length 1.
  unit(features, width) {
    const made = new Float32Array(features.length);
    for (let at = 0; at < features.length; at += width) {
      let square = 0;
      for (let i = at; i < at + width; i++) square += features[i] * features[i];
      const scale = square > 0 ? 1 / Math.sqrt(square) : 0;
      for (let i = at; i < at + width; i++) made[i] = scale * features[i];
    }
    return made;
  },

  // Cosines of one patch of `from` with all patches of `to`, both of unit length.
  cosines(from, patch, to, width) {
    const made = new Float32Array(to.length / width);
    for (let other = 0; other < made.length; other++) {
      let sum = 0;
      for (let i = 0; i < width; i++) sum += from[patch * width + i] * to[other * width + i];
      made[other] = sum;
    }
    return made;
  },

  // Colours, three numbers a patch from 0 to 255, of the first three principal components of all patches together.
  // A component's sign is such that its largest entry is positive; its values are stretched from least to largest.
  colours(features, width) {
    const count = features.length / width;
    const rest = Float64Array.from(features);
    for (let i = 0; i < width; i++) {
      let mean = 0;
      for (let patch = 0; patch < count; patch++) mean += rest[patch * width + i] / count;
      for (let patch = 0; patch < count; patch++) rest[patch * width + i] -= mean;
    }
    const made = new Uint8ClampedArray(3 * count);
    for (let component = 0; component < Math.min(3, width); component++) {
      const { direction, values } = Features.component(rest, width, count);
      const largest = direction.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
      const sign = largest < 0 ? -1 : 1;
      let low = Infinity;
      let high = -Infinity;
      for (const value of values) {
        low = Math.min(low, sign * value);
        high = Math.max(high, sign * value);
      }
      for (let patch = 0; patch < count; patch++) {
        made[3 * patch + component] = high > low ? (255 * (sign * values[patch] - low)) / (high - low) : 128;
        for (let i = 0; i < width; i++) rest[patch * width + i] -= values[patch] * direction[i];
      }
    }
    return made;
  },

  // The direction in which rows of `rest` vary most, by power iteration, and each row's share of it.
  component(rest, width, count) {
    let direction = new Float64Array(width);
    for (let i = 0; i < width; i++) direction[i] = 1 + (i % 7) / 7;
    const values = new Float64Array(count);
    for (let step = 0; step < 60; step++) {
      const next = new Float64Array(width);
      for (let patch = 0; patch < count; patch++) {
        let sum = 0;
        for (let i = 0; i < width; i++) sum += rest[patch * width + i] * direction[i];
        for (let i = 0; i < width; i++) next[i] += sum * rest[patch * width + i];
      }
      const length = Math.sqrt(next.reduce((sum, value) => sum + value * value, 0));
      if (length === 0) break;
      direction = next.map((value) => value / length);
    }
    for (let patch = 0; patch < count; patch++) {
      values[patch] = 0;
      for (let i = 0; i < width; i++) values[patch] += rest[patch * width + i] * direction[i];
    }
    return { direction, values };
  },

  // The part of a picture that the model sees: {x, y, width, height} in its pixels.
  seen(width, height, model) {
    const [rows, columns] = model.image_size;
    if (!model.center_crop || model.resize === null) return { x: 0, y: 0, width, height };
    const scale =
      typeof model.resize === "number"
        ? model.resize / Math.min(width, height)
        : Math.max(model.resize[0] / height, model.resize[1] / width);
    const made = { width: Math.min(width, columns / scale), height: Math.min(height, rows / scale) };
    return { x: (width - made.width) / 2, y: (height - made.height) / 2, ...made };
  },
};

const Patches = {
  pictures: [],
  model: null,
  sides: [], // [{select, canvas, pca, image, unit}]
  asked: 0,
  chosen: null, // {side, patch}

  take(pictures, model) {
    if (pictures === Patches.pictures && model === Patches.model) return;
    Patches.pictures = pictures;
    Patches.model = model;
    document.getElementById("patches").hidden = !pictures.length || !model;
    if (document.getElementById("patches").open) Patches.show();
  },

  say(text) {
    document.getElementById("patches-status").textContent = text;
  },

  // Two sides, each with a picture to choose.
  build() {
    Patches.sides = ["First", "Second"].map((name, side) => {
      const options = Patches.pictures.map((picture, index) =>
        element("option", picture.file.name, { value: String(index) }),
      );
      const select = element("select", "", { id: `patches-${side}` });
      select.append(...options);
      select.value = String(Math.min(side, Patches.pictures.length - 1));
      select.addEventListener("change", Patches.load);
      const canvas = element("canvas", "", { className: "patch", tabIndex: 0, width: 448, height: 448 });
      canvas.setAttribute("role", "application");
      canvas.setAttribute("aria-describedby", "patches-help");
      canvas.addEventListener("click", (event) => Patches.click(side, event));
      canvas.addEventListener("keydown", (event) => Patches.press(side, event));
      const pca = element("canvas", "", { className: "pca" });
      pca.setAttribute("role", "img");
      const label = element("label", `${name} picture`, { htmlFor: select.id });
      const figure = element("figure");
      figure.append(label, select, canvas, pca);
      return { name, select, canvas, pca, figure, image: null, unit: null };
    });
    document.getElementById("sides").replaceChildren(...Patches.sides.map((side) => side.figure));
  },

  show() {
    if (!Patches.pictures.length || !Patches.model) return;
    Patches.build();
    Patches.load();
  },

  async load() {
    const request = ++Patches.asked;
    Patches.chosen = null;
    const chosen = Patches.sides.map((side) => Patches.pictures[Number(side.select.value)]);
    Patches.say("Looking at the patches…");
    try {
      const response = await ask("/dense", chosen.map((picture) => picture.file), [], {
        Accept: "application/octet-stream",
      });
      const message = response.ok ? "" : await failure(response);
      const content = response.ok ? new Float32Array(await response.arrayBuffer()) : null;
      const images = await Promise.all(chosen.map((picture) => createImageBitmap(picture.file)));
      if (request !== Patches.asked) return;
      if (!content) {
        Patches.say(`Not looked at: ${message}.`);
        return;
      }
      const [, rows, columns, width] = response.headers.get("X-Shape").split(",").map(Number);
      Object.assign(Patches, { rows, columns, width });
      const colours = Features.colours(content, width);
      Patches.sides.forEach((side, index) => {
        const size = rows * columns * width;
        side.image = images[index];
        side.unit = Features.unit(content.subarray(index * size, (index + 1) * size), width);
        side.canvas.height = Math.round((side.canvas.width * rows) / columns);
        side.canvas.setAttribute("aria-label", `${side.name} picture, ${rows} by ${columns} patches: ${chosen[index].file.name}`);
        side.pca.setAttribute("aria-label", `Principal components of ${chosen[index].file.name}`);
        Patches.paint(side, colours.subarray(3 * index * rows * columns, 3 * (index + 1) * rows * columns));
        Patches.draw(side);
      });
      Patches.say(`${rows} by ${columns} patches in each picture. Choose one.`);
    } catch (error) {
      if (request === Patches.asked) Patches.say("The server cannot be reached, or a picture cannot be shown.");
    }
  },

  // The colours of a side's principal components, a pixel a patch.
  paint(side, colours) {
    side.pca.width = Patches.columns;
    side.pca.height = Patches.rows;
    const context = side.pca.getContext("2d");
    const pixels = context.createImageData(Patches.columns, Patches.rows);
    for (let patch = 0; patch < Patches.rows * Patches.columns; patch++) {
      for (let i = 0; i < 3; i++) pixels.data[4 * patch + i] = colours[3 * patch + i];
      pixels.data[4 * patch + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  },

  // A side's picture as the model sees it; with cosines, what is unlike goes dark; a mark around one patch.
  draw(side, cosines = null, marked = null) {
    const { canvas, image } = side;
    const context = canvas.getContext("2d");
    const box = Features.seen(image.width, image.height, Patches.model);
    context.drawImage(image, box.x, box.y, box.width, box.height, 0, 0, canvas.width, canvas.height);
    const across = canvas.width / Patches.columns;
    const down = canvas.height / Patches.rows;
    if (cosines) {
      const low = Math.min(...cosines);
      const high = Math.max(...cosines);
      cosines.forEach((cosine, patch) => {
        const share = high > low ? (cosine - low) / (high - low) : 1;
        context.fillStyle = `rgba(0, 0, 0, ${0.85 * (1 - share)})`;
        context.fillRect((patch % Patches.columns) * across, Math.floor(patch / Patches.columns) * down, across, down);
      });
    }
    if (marked !== null) {
      const x = (marked % Patches.columns) * across;
      const y = Math.floor(marked / Patches.columns) * down;
      for (const [colour, line] of [["black", 6], ["yellow", 3]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.strokeRect(x, y, across, down);
      }
    }
  },

  click(side, event) {
    const { canvas } = Patches.sides[side];
    const column = Math.floor((event.offsetX / canvas.clientWidth) * Patches.columns);
    const row = Math.floor((event.offsetY / canvas.clientHeight) * Patches.rows);
    const patch = Math.min(row, Patches.rows - 1) * Patches.columns + Math.min(column, Patches.columns - 1);
    Patches.choose(side, patch);
  },

  press(side, event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!moves[event.key] || !Patches.sides[side].unit) return;
    event.preventDefault();
    const middle = Math.floor(Patches.rows / 2) * Patches.columns + Math.floor(Patches.columns / 2);
    if (Patches.chosen?.side !== side) {
      Patches.choose(side, middle);
      return;
    }
    const [down, across] = moves[event.key];
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    const row = clamp(Math.floor(Patches.chosen.patch / Patches.columns) + down, Patches.rows);
    const column = clamp((Patches.chosen.patch % Patches.columns) + across, Patches.columns);
    Patches.choose(side, row * Patches.columns + column);
  },

  choose(side, patch) {
    const [from, to] = [Patches.sides[side], Patches.sides[1 - side]];
    if (!from.unit) return;
    Patches.chosen = { side, patch };
    const cosines = Features.cosines(from.unit, patch, to.unit, Patches.width);
    const best = cosines.reduce((at, cosine, index) => (cosine > cosines[at] ? index : at), 0);
    Patches.draw(from, null, patch);
    Patches.draw(to, cosines, best);
    const place = (which) => `row ${Math.floor(which / Patches.columns) + 1}, column ${(which % Patches.columns) + 1}`;
    const other = to.name.toLowerCase();
    Patches.say(
      `${from.name} picture, ${place(patch)}: most like ${place(best)} of the ${other}, ${cosines[best].toFixed(3)}.`,
    );
  },
};

document.getElementById("patches").addEventListener("toggle", (event) => {
  if (event.target.open) Patches.show();
});
