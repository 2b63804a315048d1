"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, properties) => Object.assign(document.createElement(name), properties);
  const tables = all("table").map(setUp);

  function setUp(table) {
    const body = table.tBodies[0], rows = [...body.rows], noun = table.dataset.noun;
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const bar = make("div", { className: "bar" });
    const label = make("label", { textContent: "Filter " });
    const input = make("input", { type: "search", placeholder: "name or finding", autocomplete: "off", spellcheck: false });
    label.append(input);
    const only = make("label"), box = make("input", { type: "checkbox" });
    only.append(box, ` ${table.dataset.marked}`);
    const output = make("output");
    output.setAttribute("aria-live", "polite");
    const marked = rows.some((row) => row.className);
    bar.append(label, ...(marked ? [only] : []), output);
    if (rows.length > 5) table.closest(".scroll").before(bar);

    function filter() {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, index) => {
        row.hidden = !words.every((word) => texts[index].includes(word)) || (box.checked && !row.className);
        shown += !row.hidden;
      });
      output.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} ${noun}`;
    }
    input.addEventListener("input", filter);
    box.addEventListener("change", filter);

    all("thead th", table).forEach((heading, column) => {
      const span = heading.querySelector("span");
      const button = make("button", { type: "button", textContent: span.textContent });
      span.replaceChildren(button);
      button.addEventListener("click", () => sort(heading, column));
    });

    function sort(heading, column) {
      const down = heading.getAttribute("aria-sort") === "none" || !heading.hasAttribute("aria-sort")
        ? rows[0] && rows[0].cells[column].dataset.v !== undefined : heading.getAttribute("aria-sort") === "ascending";
      all("th", table.tHead).forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
      };
      const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
        : String(a).localeCompare(String(b), "en", { numeric: true });
      const keyed = rows.map((row, index) => [key(row), index, row]);
      keyed.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]) || a[1] - b[1]);
      body.append(...keyed.map((entry) => entry[2]));
    }
    return { input, filter, box };
  }

  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1)).get("filter");
    if (wanted !== null) for (const table of tables) { table.input.value = wanted; table.filter(); }
    const row = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (row && row.hidden) {
      for (const table of tables) { table.input.value = ""; table.box.checked = false; table.filter(); }
      row.scrollIntoView({ block: "center" });
    }
  }
  addEventListener("hashchange", follow);
  follow();
  addEventListener("keydown", (event) => {
    const field = tables.find((table) => table.input.isConnected);
    if (event.key === "/" && field && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) {
      event.preventDefault();
      field.input.focus();
    }
  });

  // Chromium draws no buttons in the heading that it repeats on each printed page
  const buttons = all("th button");
  addEventListener("beforeprint", () => buttons.forEach((one) => one.replaceWith(one.textContent)));
  addEventListener("afterprint", () => {
    buttons.forEach((one, index) => all("thead th > span:first-child")[index].replaceChildren(one));
  });

  for (const figure of all(".copy")) {
    const button = make("button", { type: "button", textContent: "Copy" });
    button.addEventListener("click", async () => {
      const code = figure.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent.trimEnd());
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    figure.append(button);
  }

  // what a pixel of a strip stands for is read from the strip: its colours are those of the legend
  const tip = make("div", { id: "tip", hidden: true });
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  const read = new WeakMap();

  function pixels(image) {
    if (!read.has(image)) {
      const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      read.set(image, context.getImageData(0, 0, canvas.width, canvas.height));
    }
    return read.get(image);
  }
  const colour = (data, x, y) => data.data.slice(4 * (y * data.width + x), 4 * (y * data.width + x) + 4).join();
  const format = (number) => Number(number.toPrecision(2)).toString().replace("e+", "e");

  function describe(image, share) {
    const cell = image.closest("td"), heading = image.closest("table").tHead.rows[0].cells[cell.cellIndex];
    const data = pixels(image), legend = pixels(heading.querySelector("img"));
    const x = Math.min(Math.floor(share * data.width), data.width - 1), count = Number(image.dataset.n);
    const palette = Array.from({ length: legend.width }, (_, index) => colour(legend, index, 0));
    const levels = [colour(data, x, 3), colour(data, x, data.height - 1)].map((one) => palette.indexOf(one));
    const names = heading.dataset.places.split("\n");
    let place;
    if (names.length > 1) {
      const gap = Number(heading.dataset.gap || 0), wide = Math.floor(data.width / names.length);
      place = gap && x === gap * wide ? "" : names[Math.floor((x - (gap && x > gap * wide)) / wide)];
    } else {
      const first = Math.floor((x * count) / data.width), last = Math.floor(((x + 1) * count) / data.width) - 1;
      place = first >= last ? `${names[0]} ${first}` : `${names[0]}s ${first} to ${last}`;
    }
    if (!place) return "";
    if (levels.some((level) => level < 0)) return `${place}: ${colour(data, x, 3).endsWith(",0") ? "none" : "not finite"}`;
    const low = Number(heading.dataset.low), high = Number(heading.dataset.high);
    const edge = (level) => 10 ** (low + ((high - low) * level) / palette.length);
    const below = Math.min(...levels), above = Math.max(...levels) + 1;
    if (above === palette.length) return `${place}: ${format(edge(below))} or more`;
    return below === 0 ? `${place}: ${format(edge(above))} or less` : `${place}: ${format(edge(below))} to ${format(edge(above))}`;
  }

  addEventListener("pointermove", (event) => {
    const image = event.target.closest && event.target.closest("img.s");
    const text = image && image.complete ? describe(image, event.offsetX / image.clientWidth) : "";
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
})();
