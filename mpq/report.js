"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  const ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
  const data = JSON.parse($("#data").textContent);
  document.documentElement.classList.add("js");
  $$(".readout").forEach((line) => { line.textContent = line.dataset.default; });

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const breakable = (cell, name) => { name.split(/(?<=[._])/).forEach((part) => cell.append(part, document.createElement("wbr"))); return cell; };
  const say = (line, text) => { line.textContent = text || line.dataset.default; line.classList.toggle("on", Boolean(text)); };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // One stop of the tab key for many marks; arrow keys move between them in the order given.
  const rove = (marks, onFocus, onEnter) => {
    if (!marks.length) return;
    let current = Math.max(0, marks.findIndex((mark) => mark.getAttribute("tabindex") === "0"));
    const go = (to) => {
      marks[current].setAttribute("tabindex", "-1");
      current = clamp(to, 0, marks.length - 1);
      marks[current].setAttribute("tabindex", "0");
      marks[current].focus({ preventScroll: false });
    };
    marks.forEach((mark, place) => {
      mark.setAttribute("tabindex", place === current ? "0" : "-1");
      mark.addEventListener("focus", () => { marks[current].setAttribute("tabindex", "-1"); current = place; mark.setAttribute("tabindex", "0"); onFocus(mark); });
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
        if (step) go(current + step);
        else if (event.key === "Home") go(0);
        else if (event.key === "End") go(marks.length - 1);
        else if ((event.key === "Enter" || event.key === " ") && onEnter) onEnter(mark);
        else return;
        event.preventDefault();
      });
    });
  };

  // Layers: what a row of the table says, in a sentence.
  const rows = new Map($$("#layer-table tbody tr").map((row) => [row.dataset.i, row]));
  const titles = $$("#layer-table thead button").map((button) => button.textContent);
  const sentence = (index) => {
    const row = rows.get(String(index));
    if (!row) return data.layers[index] ?? `layer ${Number(index) + 1}`;
    const cells = [...row.cells].map((cell) => cell.textContent);
    const more = titles.slice(3).map((title, at) => (cells[at + 3] && title !== "format" ? `${title} ${cells[at + 3]}` : "")).filter(Boolean);
    return `${cells[1]}: ${cells[2]} in ${cells[4]}; ${more.join(", ")}`;
  };
  const bars = $$("svg.bars rect[data-layer]");
  const readout = $("#layer-readout");
  let shown = null;
  const showLayer = (bar) => {
    if (shown) { shown.classList.remove("on"); rows.get(shown.dataset.layer)?.classList.remove("on"); }
    shown = bar;
    bar.classList.add("on");
    rows.get(bar.dataset.layer)?.classList.add("on");
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", sentence(bar.dataset.layer));
    say(readout, sentence(bar.dataset.layer));
  };
  const reveal = (bar) => {
    const row = rows.get(bar.dataset.layer), box = $(".tall", $("#layers"));
    if (row && box) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  };
  rove(bars, showLayer, reveal);
  bars.forEach((bar) => {
    bar.addEventListener("pointerenter", () => showLayer(bar));
    bar.addEventListener("click", () => { showLayer(bar); reveal(bar); });
  });

  // Sorting and finding.
  const table = $("#layer-table");
  const number = (text) => { const found = parseFloat(text.replaceAll(",", "")); return Number.isNaN(found) ? -Infinity : found; };
  $$("thead th", table).forEach((head, column) => $("button", head).addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" || (head.getAttribute("aria-sort") === "none" && head.classList.contains("n") && column > 0);
    $$("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => { const cell = row.cells[column]; return cell.dataset.v ?? cell.textContent; };
    const compare = head.classList.contains("n")
      ? (a, b) => number(value(a)) - number(value(b))
      : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)));
  }));
  $("#find").addEventListener("input", (event) => {
    const words = event.target.value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(words); count += !row.hidden; });
    $("#found").textContent = words ? `${count} of ${rows.size} layers` : "";
  });

  // Pictures: a halo and a readout for the mark under the pointer or in focus; the nearest mark takes a click.
  const code = (codes, layer) => (typeof codes === "string" ? ALPHABET.indexOf(codes[layer]) : codes[layer]);
  const signed = (value, text) => (value > 0 ? "+" : value < 0 ? "−" : "±") + text(Math.abs(value));
  const bytes = (value) => { const [unit, name] = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : value >= 1e3 ? [1e3, "kB"] : [1, "B"]; return `${Number((value / unit).toPrecision(3))} ${name}`; };
  const short = (value) => (value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(2).replace("e-", "e-0").replace(/e-0(\d\d)/, "e-$1") : Number(value.toPrecision(3)).toString());
  const sum = (cells, codes) => (cells && codes ? cells.reduce((all, options, layer) => all + (options[code(codes, layer)] ?? 0), 0) : null);

  const mini = (codes, title) => {
    const strip = element("div", undefined, { class: "mini", role: "img", "aria-label": title });
    data.layers.forEach((_, layer) => {
      const part = element("i");
      part.style.flex = "1 1 0";
      part.style.background = data.colours[code(codes, layer)];
      strip.append(part);
    });
    return strip;
  };
  const differences = (codes) => data.layers.map((name, layer) => {
    const from = code(data.plan, layer), to = code(codes, layer);
    if (from === to) return null;
    const change = (cells) => (cells && cells[layer][to] != null && cells[layer][from] != null ? cells[layer][to] - cells[layer][from] : null);
    const label = (at) => (data.whole ? data.options[at] : `${at} bits`);
    return { name, from: label(from), to: label(to), bytes: change(data.bytes), loss: change(data.loss) };
  }).filter(Boolean).sort((a, b) => Math.abs(b.bytes ?? 0) - Math.abs(a.bytes ?? 0));

  const differenceTable = (found) => {
    const made = element("table"), head = element("tr"), body = element("tbody");
    const hasBytes = found.some((each) => each.bytes !== null), hasLoss = found.some((each) => each.loss !== null);
    for (const title of ["layer", "this plan → that", ...(hasBytes ? ["size"] : []), ...(hasLoss ? ["loss"] : [])]) {
      head.append(element("th", title, { scope: "col", class: title === "size" || title === "loss" ? "n" : "" }));
    }
    const fill = (list) => list.forEach((each) => {
      const row = element("tr");
      row.append(breakable(element("th", undefined, { scope: "row" }), each.name), element("td", `${each.from} → ${each.to}`));
      if (hasBytes) row.append(element("td", each.bytes === null ? "" : signed(each.bytes, bytes), { class: "n" }));
      if (hasLoss) row.append(element("td", each.loss === null ? "" : signed(each.loss, short), { class: "n" }));
      body.append(row);
    });
    fill(found.slice(0, 12));
    const top = element("thead");
    top.append(head);
    made.append(top, body);
    const box = element("div");
    box.append(made);
    if (found.length > 12) {
      const more = element("button", `Show all ${found.length}`, { type: "button" });
      more.addEventListener("click", () => { fill(found.slice(12)); more.remove(); });
      box.append(more);
    }
    return box;
  };

  const detail = $("#detail");
  const select = (chart, marks, mark) => {
    $$(".area [aria-selected='true']").forEach((other) => other.setAttribute("aria-selected", "false"));
    mark.setAttribute("aria-selected", "true");
    const point = data.points[chart.dataset.chart][marks.indexOf(mark)];
    const list = element("dl");
    list.append(element("dt", ""), element("dd", "that plan", { class: "head" }), element("dd", "this plan", { class: "head" }));
    for (const [name, text, mine] of point.figures) list.append(element("dt", name), element("dd", text), element("dd", mine));
    detail.replaceChildren(element("h3", mark.getAttribute("aria-label").split(": ")[0]), list);
    if (!point.codes || !data.plan) {
      detail.append(element("p", "The formats of its layers are not on this page.", { class: "soft" }));
      return;
    }
    const found = differences(point.codes);
    if (data.whole) {
      detail.append(element("p", "that plan", { class: "small" }), mini(point.codes, "Formats of that plan, layer by layer, as listed below"));
      detail.append(element("p", "this plan", { class: "small" }), mini(data.plan, "Formats of this plan, layer by layer"));
    }
    const total = (cells) => { const a = sum(cells, point.codes), b = sum(cells, data.plan); return a === null ? null : a - b; };
    const size = data.whole ? total(data.bytes) : null, loss = data.whole ? total(data.loss) : null;
    const parts = [size === null ? "" : `size ${signed(size, bytes)}`, loss === null ? "" : `predicted loss ${signed(loss, short)}`].filter(Boolean);
    const head = found.length ? `${found.length} of ${data.layers.length} layers differ${parts.length ? `: ${parts.join(", ")}` : ""}.` : "The same formats in every layer.";
    detail.append(element("p", head));
    if (found.length) detail.append(differenceTable(found));
  };

  $$(".chart").forEach((chart) => {
    const area = $(".area", chart), halo = $(".halo", chart), marks = $$("use.m", area), line = $(".readout", chart);
    const selectable = area.getAttribute("role") === "listbox";
    const point = (mark) => {
      halo.setAttribute("cx", mark.getAttribute("x"));
      halo.setAttribute("cy", mark.getAttribute("y"));
      halo.classList.add("on");
      if (mark.dataset.layer !== undefined) {
        mark.setAttribute("role", "img");
        mark.setAttribute("aria-label", sentence(mark.dataset.layer));
      }
      say(line, mark.getAttribute("aria-label"));
    };
    const ordered = [...marks].sort((a, b) => parseFloat(a.getAttribute("x")) - parseFloat(b.getAttribute("x")));
    const choose = selectable ? (mark) => select(chart, marks, mark) : null;
    rove(ordered, point, choose);
    const nearest = (event) => {
      const box = area.getBoundingClientRect();
      let best = null, least = 26;
      for (const mark of marks) {
        const dx = (parseFloat(mark.getAttribute("x")) / 100) * box.width - (event.clientX - box.left);
        const dy = (parseFloat(mark.getAttribute("y")) / 100) * box.height - (event.clientY - box.top);
        if (Math.hypot(dx, dy) <= least) { least = Math.hypot(dx, dy); best = mark; }
      }
      return best;
    };
    area.addEventListener("pointermove", (event) => { const mark = nearest(event); if (mark) point(mark); });
    area.addEventListener("click", (event) => { const mark = nearest(event); if (mark) { mark.focus({ preventScroll: true }); point(mark); if (choose) choose(mark); } });
  });

  // Quantities as tabs.
  const tabs = $$("[role='tab']");
  const open = (at) => tabs.forEach((tab, place) => {
    tab.setAttribute("aria-selected", String(place === at));
    tab.setAttribute("tabindex", place === at ? "0" : "-1");
    document.getElementById(tab.getAttribute("aria-controls")).hidden = place !== at;
  });
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => open(place));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { const to = (place + step + tabs.length) % tabs.length; open(to); tabs[to].focus(); }
    });
  });
  if (tabs.length) open(0);
})();
