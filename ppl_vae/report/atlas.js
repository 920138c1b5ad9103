"use strict";
// The latent plane: where the pointer is, what z is there, what it decodes to, p(label | z), and who lives nearby.
(() => {
  const atlas = JSON.parse(document.getElementById("atlas-data").textContent);
  const element = (id) => document.getElementById(id);
  const plane = element("atlas-plane"), pen = plane.getContext("2d");
  const colors = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
  const color = (label) => colors[label % colors.length];
  const size = atlas.size, [high, wide] = atlas.tile, cell = plane.width / size;
  let row = Math.floor(size / 2), column = Math.floor(size / 2);

  const sheet = (source) => new Promise((done) => {
    const image = new Image();
    image.onload = () => done(image);
    image.src = source;
  });

  // A tile of a sheet, `across` tiles to a row, drawn to fill a canvas.
  const drawTile = (canvas, image, number, across) => {
    const ink = canvas.getContext("2d");
    ink.imageSmoothingEnabled = false;
    const x = (number % across) * wide, y = Math.floor(number / across) * high;
    ink.drawImage(image, x, y, wide, high, 0, 0, canvas.width, canvas.height);
  };

  const layer = () => document.querySelector("input[name=atlas-layer]:checked").value;

  const drawLabels = () => {
    for (let r = 0; r < size; r++) for (let c = 0; c < size; c++) {
      const shares = atlas.probability[r * size + c];
      const best = shares.indexOf(Math.max(...shares));
      pen.globalAlpha = 0.15 + 0.85 * (1 - atlas.entropy[r * size + c] / Math.log(shares.length));
      pen.fillStyle = color(best);
      pen.fillRect(c * cell, r * cell, cell + 0.5, cell + 0.5);
    }
    pen.globalAlpha = 1;
  };

  const drawPlane = (decoded) => {
    pen.clearRect(0, 0, plane.width, plane.height);
    pen.imageSmoothingEnabled = false;
    if (layer() === "labels" && atlas.probability.length) drawLabels();
    else pen.drawImage(decoded, 0, 0, plane.width, plane.height);
    if (element("atlas-observations").checked) atlas.places.forEach(([x, y], number) => {
      pen.fillStyle = atlas.labels.length ? color(atlas.labels[number]) : colors[0];
      pen.beginPath();
      pen.arc(x * plane.width, (1 - y) * plane.height, 2.2, 0, 2 * Math.PI);
      pen.fill();
    });
    pen.strokeStyle = "#d62728";
    pen.lineWidth = 2;
    pen.strokeRect(column * cell + 1, row * cell + 1, cell - 2, cell - 2);
  };

  const showLabels = (here) => {
    const box = element("atlas-labels");
    box.replaceChildren();
    if (!atlas.probability.length) return;
    const shares = atlas.probability[here];
    shares.forEach((share, label) => {
      const bar = document.createElement("div"), name = document.createElement("span");
      const length = document.createElement("i"), number = document.createElement("span");
      bar.className = "bar";
      name.textContent = atlas.label_names[label];
      length.style.width = `${100 * share}%`;
      length.style.background = color(label);
      number.textContent = `${Math.round(100 * share)} %`;
      bar.append(name, length, number);
      box.append(bar);
    });
  };

  const showNearest = (here, observations) => {
    const box = element("atlas-nearest"), nearest = atlas.nearest[here];
    box.replaceChildren();
    element("atlas-nearest-title").textContent = atlas.inhabited[here] ? "nearest observations:" : "nobody lives here; the nearest observations:";
    nearest.forEach((number) => {
      const canvas = document.createElement("canvas");
      canvas.width = 56; canvas.height = 56;
      const label = atlas.labels.length ? `, ${atlas.label_names[atlas.labels[number]]}` : "";
      canvas.title = `observation ${atlas.observation[number]}${label}`;
      drawTile(canvas, observations, atlas.shown[number], atlas.across);
      box.append(canvas);
    });
  };

  Promise.all([sheet(atlas.decoded), sheet(atlas.observations)]).then(([decoded, observations]) => {
    const show = () => {
      const here = row * size + column;
      drawPlane(decoded);
      element("atlas-where").textContent = `z = (${atlas.z[here].map((value) => value.toFixed(2)).join(", ")})`;
      drawTile(element("atlas-image"), decoded, here, size);
      showLabels(here);
      showNearest(here, observations);
    };
    const inside = (value) => Math.max(0, Math.min(size - 1, value));
    const go = (newRow, newColumn) => {
      if (inside(newRow) === row && inside(newColumn) === column) return;
      row = inside(newRow);
      column = inside(newColumn);
      show();
    };
    plane.addEventListener("pointermove", (event) => {
      const box = plane.getBoundingClientRect();
      go(Math.floor((event.clientY - box.top) / box.height * size), Math.floor((event.clientX - box.left) / box.width * size));
    });
    plane.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      go(row + step[0], column + step[1]);
    });
    document.querySelectorAll(".controls input").forEach((input) => input.addEventListener("change", show));
    if (!atlas.probability.length) document.querySelector("input[value=labels]").disabled = true;
    show();
    plane.dataset.ready = "yes";
  });
})();
