// Draws the heat maps, one pixel a cell, and shows the numbers beside the pointer.
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function colourOf(level) {
  if (level === null) return [0, 0, 0, 0];
  const place = (level / 255) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return [...VIRIDIS[low].map((c, i) => c + (VIRIDIS[low + 1][i] - c) * (place - low)), 255];
}

const tip = document.getElementById("tip");
for (const figure of document.querySelectorAll("figure.map")) {
  const {layers, steps, colours, numbers} = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas");
  canvas.width = steps.length;
  canvas.height = layers.length;
  const pixels = new Uint8ClampedArray(colours.flat().flatMap(colourOf));
  canvas.getContext("2d").putImageData(new ImageData(pixels, steps.length), 0, 0);

  const cell = (offset, size, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = cell(event.clientX - box.left, box.width, steps.length);
    const row = cell(event.clientY - box.top, box.height, layers.length);
    tip.textContent = `${layers[row]}, step ${steps[column]}: ${numbers[row][column]}`;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6) + "px";
    tip.style.top = event.clientY + 16 + "px";
  });
  canvas.addEventListener("mouseleave", () => { tip.hidden = true; });
}
