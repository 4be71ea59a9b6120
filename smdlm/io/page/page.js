"use strict";
// Plays the runs in #data, which smdlm/io/viewer.py describes. No library, nothing is loaded.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const {words, runs, candidates} = data;
  const frames = Math.max(...runs.map((run) => run.tokens.length));
  const length = runs[0].tokens[0].length;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const asked = new URLSearchParams(location.hash.slice(1));
  const state = {frame: 0, at: null, pinned: false, timer: null, shade: false};

  const get = (id) => document.getElementById(id);
  const make = (tag, cls = "", text = "") => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    node.textContent = text;
    return node;
  };
  const draw = (tag, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

  // ---------------------------------------------------------------------------------------------------- the data

  /** What stands before a token, what is shown for it, and what stands behind: lines break outside the token. */
  function split(text) {
    const core = text.trim();
    if (!core) return text.includes("\n") ? ["", "\u21b5", text] : ["", text, ""];
    const start = text.indexOf(core);
    return [text.slice(0, start), core, text.slice(start + core.length)];
  }
  const parts = words.map(split);
  const shown = (word) => parts[word][1].replace(/^ +$/, (blanks) => "\u2423".repeat(blanks.length));
  const spelled = (word) => words[word].replace(/ /g, "\u2423").replace(/\n/g, "\u21b5"); // with its blanks
  const partly = (run, frame) => run.computed[frame][1] - run.computed[frame][0] < length; // the rest is cached
  const nth = (run, frame) => Math.min(frame, run.tokens.length - 1); // a run may be a frame shorter

  /** Where in run.seen[frame] the numbers of each position begin, -1 without a prediction. */
  function offsets(run, frame) {
    if (!run.offsets[frame]) {
      const found = new Int32Array(length).fill(-1);
      let next = 0;
      run.tokens[frame].forEach((word, place) => {
        if (word >= 0) return;
        if (run.seen[frame][next] < 0) next += 1;
        else {
          found[place] = next;
          next += 2 + 2 * candidates;
        }
      });
      run.offsets[frame] = found;
    }
    return run.offsets[frame];
  }

  /** {entropy, lam, best: [{word, prob, weight}]} of a masked position, or null. */
  function prediction(run, frame, place) {
    const start = offsets(run, frame)[place];
    if (start < 0) return null;
    const seen = run.seen[frame];
    const best = [];
    for (let i = 0; i < candidates; i++) {
      best.push({word: seen[start + 2 + 2 * i], prob: seen[start + 3 + 2 * i] / 1e4});
    }
    const total = best.reduce((sum, one) => sum + one.prob, 0) || 1;
    for (const one of best) one.weight = one.prob / total;
    return {entropy: seen[start] / 100, lam: seen[start + 1] / 1e4, best};
  }

  /** Masked positions, and means over those with a prediction, for each frame. */
  function summarise(run) {
    run.masked = [], run.lam = [], run.entropy = [];
    run.tokens.forEach((row, frame) => {
      let count = 0, lam = 0, entropy = 0;
      row.forEach((_, place) => {
        const start = offsets(run, frame)[place];
        if (start < 0) return;
        count += 1;
        entropy += run.seen[frame][start] / 100;
        lam += run.seen[frame][start + 1] / 1e4;
      });
      run.masked.push(row.filter((word) => word < 0).length);
      run.lam.push(count ? lam / count : null);
      run.entropy.push(count ? entropy / count : null);
    });
  }
  for (const run of runs) {
    run.offsets = [];
    run.kind = run.fed ? "soft" : "plain"; // its colour
    if (run !== runs[0]) run.kind = runs[0].kind === "soft" ? "plain" : "soft"; // two runs of one kind differ, too
    summarise(run);
  }
  const soft = runs.some((run) => run.soft);
  let fullest = 0; // the largest lambda of all: a candidate's ink is measured against it
  for (const run of runs) {
    run.tokens.forEach((row, frame) => row.forEach((_, place) => {
      const start = offsets(run, frame)[place];
      if (start >= 0) fullest = Math.max(fullest, run.seen[frame][start + 1] / 1e4);
    }));
  }

  /** Ink of a lambda: its root, because lambda is far below its largest value most of the time. */
  const strength = (lam) => Math.sqrt(lam / fullest);

  // --------------------------------------------------------------------------------------------------- the canvas

  function cell(text) {
    const [before, core, behind] = split(text);
    const node = make("span", core.trim() ? "cell" : "cell blank");
    node.append(make("span", "size", core));
    const over = make("span", "over");
    for (let i = 0; i < Math.max(candidates, 1); i++) over.append(make("span"));
    node.append(over);
    return {node, pieces: [before, node, behind]};
  }

  function build(run) {
    const section = make("section", `run ${run.kind}`);
    const title = make("h2", "", "");
    title.append(make("span", "swatch"), run.name);
    section.append(title, make("p", "note", run.note));
    run.status = section.appendChild(make("p", "status"));
    const canvas = section.appendChild(make("div", "canvas"));
    canvas.setAttribute("aria-hidden", "true");
    run.reading = section.appendChild(make("p", "unseen"));
    run.last = run.tokens[run.tokens.length - 1];
    run.cells = run.last.map((word, place) => {
      const {node, pieces} = cell(word < 0 ? "\u2003" : words[word]);
      node.dataset.at = place;
      canvas.append(...pieces);
      return node;
    });
    const placeOf = (event) => event.target.closest(".cell")?.dataset.at;
    canvas.addEventListener("pointermove", (event) => {
      const at = placeOf(event);
      if (event.pointerType === "mouse" && at && !state.pinned) choose(+at, false);
    });
    canvas.addEventListener("click", (event) => {
      const at = placeOf(event);
      if (!at) return;
      if (state.pinned && state.at === +at) choose(null, false);
      else choose(+at, true, run);
    });
    get("runs").append(section);
  }

  function paint(run, place, frame) {
    const node = run.cells[place], now = run.tokens[frame][place], before = run.tokens[Math.max(frame - 1, 0)][place];
    const flag = (name, on) => node.classList.toggle(name, on);
    const layers = node.lastChild.children;
    const seen = now < 0 ? prediction(run, frame, place) : null;
    const other = now >= 0 && now !== run.last[place];
    flag("mask", now < 0);
    flag("given", run.prompt[place] === 1);
    flag("fresh", now >= 0 && before !== now);
    flag("again", now < 0 && before >= 0);
    flag("other", other);
    flag("edge", partly(run, frame) && place === run.computed[frame][0] - 1);
    flag("resumed", partly(run, frame) && place === run.computed[frame][1]);
    flag("picked", place === state.at);
    flag("heat", state.shade && now >= 0 && !run.prompt[place] && frame >= run.settled[place]);
    node.style.setProperty("--late", run.settled[place] / (run.tokens.length - 1));
    node.style.setProperty("--share", seen && fullest ? strength(seen.lam) : 0);
    for (let i = 0; i < layers.length; i++) {
      const one = seen?.best[i];
      const ink = one && fullest ? strength(seen.lam) * one.weight : 0;
      layers[i].textContent = other && i === 0 ? shown(now) : one && ink ? shown(one.word) : "";
      layers[i].style.opacity = other && i === 0 ? 1 : ink;
    }
  }

  function describe(run, frame) {
    const words = [`${run.masked[frame]} of ${length} masked`];
    if (run.entropy[frame] !== null) {
      if (run.soft) words.push(`\u03bb ${run.lam[frame].toFixed(3)}`);
      words.push(`entropy ${run.entropy[frame].toFixed(2)} nats`);
    }
    words.push(`${run.forwards[frame]} forwards`);
    const [first, end] = run.computed[frame];
    if (partly(run, frame)) words.push(`${first + 1}\u2013${end} computed, the rest cached`);
    return words.join(" \u00b7 ");
  }

  // ------------------------------------------------------------------------------------------------- one position

  const rest = (run, place) => {
    if (run.prompt[place]) return "given in the prompt";
    return `settled at step ${run.settled[place]}`;
  };

  function row(run, word, share, prob, hole) {
    const line = make("tr");
    const gauge = make("td", "gauge");
    const bar = gauge.appendChild(make("div", hole ? "hole" : ""));
    bar.style.width = `${100 * share}%`;
    line.append(make("td", "", word), gauge, make("td", "", share.toFixed(3)));
    if (prob !== null) line.append(make("td", "", prob));
    return line;
  }

  function card(run, place) {
    const frame = nth(run, state.frame), now = run.tokens[frame][place];
    const node = make("div", `card ${run.kind}`);
    const title = node.appendChild(make("h3"));
    title.append(make("span", "swatch"), run.name);
    const what = now < 0 ? "masked" : `holds \u201c${spelled(now)}\u201d`;
    node.append(make("p", "status", `${what}; ${rest(run, place)}`));
    let asOf = frame; // of a committed token, what was predicted last
    while (asOf > 0 && !prediction(run, asOf, place)) asOf -= 1;
    const seen = prediction(run, asOf, place);
    if (!seen) return node;
    const lam = run.soft ? `, \u03bb ${seen.lam.toFixed(3)}` : "";
    node.append(make("p", "status", `step ${asOf}: entropy ${seen.entropy.toFixed(2)} nats${lam}`));
    const table = node.appendChild(make("table"));
    const head = table.appendChild(make("tr"));
    const fate = run.fed ? "predicted, fed back but not as a soft mask" : "predicted, thrown away";
    for (const name of run.soft ? ["the next step sees", "", "share", "p"] : [fate, "", "p"]) {
      const th = head.appendChild(make("th", "", name));
      th.scope = "col";
    }
    if (run.soft) table.append(row(run, "[MASK]", 1 - seen.lam, "", true));
    for (const one of seen.best) {
      if (run.soft) table.append(row(run, spelled(one.word), seen.lam * one.weight, one.prob.toFixed(3), false));
      else table.append(row(run, spelled(one.word), one.prob, null, false));
    }
    return node;
  }

  /** Shows the numbers of a position, or of none; `pin` keeps it until it is let go, and in sight in one run. */
  function choose(at, pin, run = runs[0]) {
    const old = state.at;
    state.at = at, state.pinned = pin;
    for (const each of runs) {
      if (old !== null) each.cells[old].classList.remove("picked");
      if (at !== null) each.cells[at].classList.add("picked");
    }
    inspect();
    curves();
    if (pin) run.cells[at].scrollIntoView({block: "nearest"});
  }

  function inspect() {
    const chosen = state.at !== null;
    get("place").classList.toggle("chosen", chosen);
    get("place-name").textContent = chosen ? `Position ${state.at + 1} of ${length}` : "Position";
    get("cards").replaceChildren(...(chosen ? runs.map((run) => card(run, state.at)) : []));
  }

  // --------------------------------------------------------------------------------------------------- the charts

  const WIDE = 320, HIGH = 110, LEFT = 34, BOTTOM = 92, TOP = 8;
  const charts = [
    {title: "Masked positions", series: (run) => run.masked, digits: 0},
    {title: "Entropy, nats, mean over masked", series: (run) => run.entropy, digits: 1, one: "entropy"},
  ];
  if (soft) {
    const lambda = {title: "\u03bb, mean over masked", series: (run) => run.lam, digits: 2, one: "lam", soft: true};
    charts.splice(1, 0, lambda);
  }
  const across = (frame) => LEFT + ((WIDE - LEFT - 6) * frame) / Math.max(frames - 1, 1);

  function path(values, top) {
    let open = false, text = "";
    values.forEach((value, frame) => {
      if (value === null) return void (open = false);
      text += `${open ? "L" : "M"}${across(frame).toFixed(1)} ${(BOTTOM - ((BOTTOM - TOP) * value) / top).toFixed(1)}`;
      open = true;
    });
    return text;
  }

  function plot(chart) {
    const figure = make("figure");
    figure.append(make("figcaption", "", chart.title));
    const mine = runs.filter((run) => run.soft || !chart.soft);
    const all = mine.flatMap((run) => chart.series(run)).filter((value) => value !== null);
    chart.top = Math.max(...all, 1e-9) * (chart.one ? 1.35 : 1);
    const svg = figure.appendChild(draw("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img"}));
    const said = mine.map((run) => `${run.name} up to ${Math.max(...chart.series(run).filter((v) => v !== null)).toFixed(2)}`);
    svg.setAttribute("aria-label", `${chart.title} over ${frames - 1} steps: ${said.join(", ")}`);
    svg.append(
      draw("line", {x1: LEFT, x2: WIDE - 6, y1: BOTTOM, y2: BOTTOM, class: "axis"}),
      draw("line", {x1: LEFT, x2: LEFT, y1: TOP, y2: BOTTOM, class: "axis"}),
      draw("text", {x: LEFT - 5, y: BOTTOM, "text-anchor": "end"}, "0"),
      draw("text", {x: LEFT - 5, y: TOP + 8, "text-anchor": "end"}, chart.top.toFixed(chart.digits)),
      draw("text", {x: LEFT, y: HIGH - 3}, "step 0"),
      draw("text", {x: WIDE - 6, y: HIGH - 3, "text-anchor": "end"}, `${frames - 1}`),
    );
    for (const run of mine) {
      const classes = `curve ${run.kind}${run.kind === "soft" ? "" : " dashed"}`;
      svg.append(draw("path", {d: path(chart.series(run), chart.top), class: classes}));
    }
    chart.singles = mine.map((run) => [run, svg.appendChild(draw("path", {class: `curve one ${run.kind}`}))]);
    chart.now = svg.appendChild(draw("line", {y1: TOP, y2: BOTTOM, class: "now"}));
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDE;
      go(Math.round(((x - LEFT) / (WIDE - LEFT - 6)) * (frames - 1)));
    });
    get("charts").append(figure);
  }

  /** The thin lines of the chosen position. */
  function curves() {
    for (const chart of charts.filter((one) => one.one)) {
      for (const [run, line] of chart.singles) {
        const values = run.tokens.map((_, frame) => {
          const seen = state.at === null ? null : prediction(run, frame, state.at);
          return seen ? Math.min(seen[chart.one], chart.top) : null;
        });
        line.setAttribute("d", path(values, chart.top));
      }
    }
  }

  // ------------------------------------------------------------------------------------------------------- playing

  function show() {
    const {frame} = state;
    for (const run of runs) {
      const mine = nth(run, frame);
      for (let place = 0; place < length; place++) paint(run, place, mine);
      run.status.textContent = describe(run, mine);
      run.reading.textContent = run.tokens[mine].map((word) => (word < 0 ? " \u2026 " : words[word])).join("");
    }
    for (const chart of charts) {
      chart.now.setAttribute("x1", across(frame));
      chart.now.setAttribute("x2", across(frame));
    }
    get("step").value = frame;
    get("step").setAttribute("aria-valuetext", `step ${frame} of ${frames - 1}`);
    get("where").textContent = `step ${frame} of ${frames - 1}`;
    document.documentElement.dataset.step = frame;
    inspect();
  }

  let speaking = null;
  function speak() {
    clearTimeout(speaking);
    const said = runs.map((run) => `${run.name}: ${describe(run, nth(run, state.frame))}`).join("; ");
    speaking = setTimeout(() => (get("live").textContent = `Step ${state.frame}. ${said}`), 300);
  }

  function go(frame) {
    pause();
    state.frame = clamp(frame, 0, frames - 1);
    show();
    speak();
  }

  function pause() {
    clearInterval(state.timer);
    state.timer = null;
    get("play").textContent = "Play";
  }

  function play() {
    if (state.frame === frames - 1) state.frame = 0;
    get("play").textContent = "Pause";
    clearInterval(state.timer);
    state.timer = setInterval(() => {
      state.frame += 1;
      show();
      if (state.frame >= frames - 1) pause();
    }, 1000 / +get("speed").value);
    show();
  }

  const toggle = () => (state.timer === null ? play() : pause());

  function shade(on) {
    state.shade = on;
    get("shade").checked = on;
    show();
  }

  function faster(by) {
    const select = get("speed");
    select.selectedIndex = clamp(select.selectedIndex + by, 0, select.options.length - 1);
    if (state.timer !== null) play();
  }

  const move = (by) => choose(state.at === null ? 0 : clamp(state.at + by, 0, length - 1), true);

  function theme(name) {
    document.documentElement.dataset.theme = name;
    get("theme").textContent = name === "dark" ? "Light" : "Dark";
  }

  // -------------------------------------------------------------------------------------------------------- legend

  function legend() {
    const list = get("legend").querySelector("ul");
    const entry = (text, samples) => {
      const line = list.appendChild(make("li"));
      const left = line.appendChild(make("span"));
      left.setAttribute("aria-hidden", "true");
      samples.forEach(({cls = "", share = 0, late = 0, ink = 0, word}) => {
        const {node} = cell(word);
        node.className = `cell ${cls}`;
        node.style.setProperty("--share", share);
        node.style.setProperty("--late", late);
        node.lastChild.firstChild.textContent = ink ? word : "";
        node.lastChild.firstChild.style.opacity = ink;
        left.append(node, " ");
      });
      line.append(make("span", "", text));
    };
    entry("a mask, as wide as the token that ends there", [{cls: "mask", word: "token"}]);
    if (fullest) {
      const lams = [0.1 * fullest, 0.4 * fullest, fullest];
      entry(
        `the soft mask: candidates over the mask; ink for \u03bb = ${lams.map((lam) => lam.toPrecision(2)).join(", ")}`,
        lams.map((lam) => ({cls: "mask", word: "the", share: strength(lam), ink: strength(lam)})),
      );
    }
    entry("committed at this step", [{cls: "fresh", word: "token"}]);
    if (runs.some((run) => run.again)) entry("masked again at this step", [{cls: "mask again", word: "token"}]);
    if (runs.some((run) => run.prompt.includes(1))) entry("given in the prompt", [{cls: "given", word: "token"}]);
    if (runs.some((run) => run.tokens.some((_, frame) => partly(run, frame)))) {
      const bounds = [{cls: "edge", word: "cached"}, {word: "computed"}, {cls: "resumed", word: "cached"}];
      entry("what a step with a cache computes lies between two lines", bounds);
    }
    const scale = [0.1, 0.5, 1].map((late) => ({cls: "heat", late, word: "abc"}));
    entry("settled early \u2026 late, when shaded", scale);
  }

  // --------------------------------------------------------------------------------------------------------- start

  const SPEEDS = [1, 2, 4, 8, 16, 32, 64];
  const usual = SPEEDS.reduce((best, one) => (Math.abs(one - frames / 12) < Math.abs(best - frames / 12) ? one : best));
  for (const speed of SPEEDS) {
    const option = make("option", "", `${speed} ${speed === 1 ? "step" : "steps"}/s`);
    option.value = speed;
    option.selected = speed === usual;
    get("speed").append(option);
  }
  get("step").max = frames - 1;
  runs.forEach(build);
  charts.forEach(plot);
  legend();

  get("play").addEventListener("click", toggle);
  get("back").addEventListener("click", () => go(state.frame - 1));
  get("next").addEventListener("click", () => go(state.frame + 1));
  get("step").addEventListener("input", (event) => go(+event.target.value));
  get("speed").addEventListener("change", () => faster(0));
  get("shade").addEventListener("change", (event) => shade(event.target.checked));
  get("left").addEventListener("click", () => move(-1));
  get("right").addEventListener("click", () => move(1));
  get("close").addEventListener("click", () => choose(null, false));
  get("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  const KEYS = {
    " ": toggle,
    ArrowLeft: (event) => go(state.frame - (event.shiftKey ? 10 : 1)),
    ArrowRight: (event) => go(state.frame + (event.shiftKey ? 10 : 1)),
    Home: () => go(0),
    End: () => go(frames - 1),
    "+": () => faster(1),
    "=": () => faster(1),
    "-": () => faster(-1),
    ",": () => move(-1),
    ".": () => move(1),
    s: () => shade(!state.shade),
    Escape: () => choose(null, false),
  };
  addEventListener("keydown", (event) => {
    const own = {BUTTON: [" "], SUMMARY: [" "], SELECT: Object.keys(KEYS)}[event.target.tagName] ?? [];
    const checkbox = event.target.id === "shade" && event.key === " ";
    if (!KEYS[event.key] || own.includes(event.key) || checkbox || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key](event);
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(asked.get("theme") ?? (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  if (asked.has("at")) choose(clamp(asked.get("at") - 1, 0, length - 1), true);
  state.shade = get("shade").checked = asked.has("shade");
  if (asked.has("step")) go(+asked.get("step"));
  else if (calm) go(0);
  else play();
})();
