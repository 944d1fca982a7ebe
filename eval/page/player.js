"use strict";
// Two videos and their difference, which play, pause, seek and step as one.

// Holds videos to one frame. Positions are the middle of a frame, so rounding cannot fall into its neighbour.
class Together {
  constructor(videos, onFrame) {
    this.videos = videos;
    this.onFrame = onFrame;
    this.frame = 0;
    this.playing = false;
    this.rate = 1;
  }

  load(fps, frames) {
    this.pause();
    Object.assign(this, { fps, frames, frame: 0, wanted: null });
  }

  active() {
    return this.videos.filter((video) => video.readyState >= 1);
  }

  frameOf(video) {
    return Math.min(this.frames - 1, Math.floor(video.currentTime * this.fps + 1e-3));
  }

  // Goes to a frame. While one seek is under way only the latest wish is kept.
  async seek(frame) {
    this.frame = this.wanted = Math.max(0, Math.min(this.frames - 1, Math.round(frame)));
    this.onFrame(this.frame);
    if (this.seeking) return this.seeking;
    this.seeking = this.follow();
    await this.seeking;
    this.seeking = null;
  }

  async follow() {
    while (this.wanted !== null) {
      const time = (this.wanted + 0.5) / this.fps;
      this.wanted = null;
      await Promise.all(this.active().map((video) => seekVideo(video, time)));
    }
    this.onFrame(this.frame);
  }

  async play() {
    if (this.playing || !this.active().length) return;
    this.playing = true;
    await this.seek(this.frame >= this.frames - 1 ? 0 : this.frame);
    if (!this.playing) return;
    await this.start();
    this.tick();
  }

  async start() {
    for (const video of this.active()) video.playbackRate = this.rate;
    await Promise.all(this.active().map((video) => video.play().catch(() => this.pause())));
  }

  async pause() {
    if (!this.playing) return;
    this.playing = false;
    for (const video of this.videos) video.pause();
    await this.seek(this.frame);
  }

  tick() {
    if (!this.playing) return;
    const [first, ...others] = this.active();
    if (first.ended || (this.frameOf(first) >= this.frames - 1 && first.currentTime * this.fps >= this.frames - 0.3))
      return this.again();
    for (const other of others) {
      if (!other.seeking && Math.abs(other.currentTime - first.currentTime) > 0.6 / this.fps)
        other.currentTime = first.currentTime;
    }
    this.frame = this.frameOf(first);
    this.onFrame(this.frame);
    requestAnimationFrame(() => this.tick());
  }

  async again() {
    for (const video of this.videos) video.pause();
    await this.seek(0);
    if (!this.playing) return;
    await this.start();
    this.tick();
  }
}

function seekVideo(video, time) {
  if (Math.abs(video.currentTime - time) < 1e-4 && !video.seeking) return null;
  return new Promise((resolve) => {
    video.addEventListener("seeked", resolve, { once: true });
    video.addEventListener("error", resolve, { once: true });
    video.currentTime = time;
  });
}

function playerSection() {
  const playable = CELLS.filter((cell) => cell.video);
  if (!playable.length) return null;
  const view = playerView();
  const together = new Together(view.videos, (frame) => showFrame(view, together, frame));
  view.together = together;
  view.sides.forEach((side, index) => side.box.addEventListener("change", () => load(view, index, side.box.value)));
  for (const video of view.videos) {
    video.addEventListener("loadeddata", () => together.seek(together.frame));
    video.addEventListener("loadedmetadata", () => fitCanvas(view));
  }
  watchFrames(view);
  wireControls(view);
  onChange((keys) => {
    if (keys.includes("group")) offer(view);
    if (keys.includes("selected") || keys.includes("group")) showSelected(view);
    if (keys.includes("metric")) drawStrip(view);
  });
  offer(view);
  showSelected(view);
  new ResizeObserver(() => drawStrip(view)).observe(view.strip);
  return section(
    "player",
    "Side by side",
    "Space plays and pauses, the arrow keys step by one frame, Home and End go to the ends. The difference is |A − B|, brightened so that small errors show.",
    view.node,
  );
}

function playerView() {
  const sides = ["A", "B"].map((name) => {
    const box = el("select", { "aria-label": `Video ${name}` });
    const video = el("video", { muted: true, playsinline: true, preload: "auto", "aria-label": `Video ${name}` });
    video.muted = true;
    const problem = el("p", { class: "problem", hidden: true }, "This video could not be played.");
    return {
      name,
      box,
      video,
      problem,
      node: el(
        "div",
        { class: "side" },
        el("div", { class: "side-head" }, el("b", {}, name), box),
        el("div", { class: "screen" }, video, problem),
      ),
    };
  });
  const canvas = el("canvas", { role: "img", "aria-label": "Difference of A and B" });
  const gain = choice(
    "gain",
    "Brightness",
    [
      ["1", "1x"],
      ["4", "4x"],
      ["16", "16x"],
    ],
    "4",
    () => drawDifference(view),
  );
  const view = { sides, canvas, gain, videos: sides.map((side) => side.video), shown: [-1, -1] };
  view.strip = el("div", { class: "strip" });
  view.seek = el("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "Frame" });
  view.play = el("button", { type: "button", class: "play", "aria-label": "Play" });
  view.back = el("button", { type: "button", "aria-label": "One frame back" }, "‹");
  view.forward = el("button", { type: "button", "aria-label": "One frame forward" }, "›");
  view.counter = el("output", { class: "counter" });
  view.rate = selectBox(
    "Speed",
    [
      ["0.25", "0.25x"],
      ["0.5", "0.5x"],
      ["1", "1x"],
      ["2", "2x"],
    ],
    "1",
    (rate) => setRate(view, Number(rate)),
  );
  const difference = el(
    "div",
    { class: "side difference" },
    el("div", { class: "side-head" }, el("b", {}, "|A − B|"), gain),
    el("div", { class: "screen" }, canvas),
  );
  const transport = el(
    "div",
    { class: "transport" },
    view.back,
    view.play,
    view.forward,
    el("div", { class: "track" }, view.strip, view.seek),
    view.counter,
    view.rate,
  );
  view.node = el(
    "div",
    { class: "player", tabindex: 0, role: "group", "aria-label": "Video players" },
    el(
      "div",
      { class: "screens" },
      sides.map((side) => side.node),
      difference,
    ),
    transport,
  );
  return view;
}

function offer(view) {
  const choices = inGroup().filter((cell) => cell.video);
  for (const { box } of view.sides)
    box.replaceChildren(...choices.map((cell) => el("option", { value: cell.id }, describe(cell))));
}

// The selected cell on the right, what it is measured against on the left.
function showSelected(view) {
  const cells = inGroup().filter((cell) => cell.video);
  const right =
    cells.find((cell) => cell.id === state.selected) || cells.find((cell) => cell.role === "accelerated") || cells[0];
  if (!right) return;
  const left =
    cells.find((cell) => cell.id === right.reference) ||
    cells.find((cell) => cell.role === "dense" && cell.prompt === right.prompt) ||
    right;
  load(view, 0, left.id);
  load(view, 1, right.id);
}

function load(view, index, id) {
  const side = view.sides[index];
  const cell = BY_ID.get(id);
  side.box.value = id;
  if (side.cell === cell) return;
  side.cell = cell;
  side.problem.hidden = true;
  view.shown[index] = -1;
  side.video.src = cell.video;
  const cells = view.sides.map((item) => item.cell).filter(Boolean);
  view.together.load(Math.max(...cells.map((item) => item.fps)), Math.min(...cells.map((item) => item.frames)));
  view.seek.max = view.together.frames - 1;
  showFrame(view, view.together, 0);
  drawStrip(view);
}

function setRate(view, rate) {
  view.together.rate = rate;
  for (const video of view.videos) video.playbackRate = rate;
}

function wireControls(view) {
  const { together } = view;
  const toggle = () => (together.playing ? together.pause() : together.play()).then(() => showPlaying(view));
  const go = (frame) =>
    together
      .pause()
      .then(() => together.seek(frame()))
      .then(() => showPlaying(view));
  const step = (by) => go(() => together.frame + by);
  view.play.addEventListener("click", () => (toggle(), showPlaying(view)));
  view.back.addEventListener("click", () => step(-1));
  view.forward.addEventListener("click", () => step(1));
  view.seek.addEventListener("input", () => {
    const frame = Number(view.seek.value);
    go(() => frame);
  });
  view.sides.forEach(({ video, problem }) => video.addEventListener("error", () => (problem.hidden = false)));
  view.node.addEventListener("keydown", (event) => {
    const typing = event.target.matches("select, input[type=radio]");
    const keys = {
      " ": () => (toggle(), showPlaying(view)),
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      Home: () => go(() => 0),
      End: () => go(() => together.frames - 1),
    };
    if (typing || !keys[event.key] || (event.key === " " && event.target.matches("button"))) return;
    event.preventDefault();
    keys[event.key]();
  });
  showPlaying(view);
}

function showPlaying({ play, together }) {
  play.setAttribute("aria-label", together.playing ? "Pause" : "Play");
  play.classList.toggle("on", together.playing);
}

function showFrame(view, together, frame) {
  view.seek.value = frame;
  view.seek.setAttribute("aria-valuetext", `frame ${frame + 1} of ${together.frames}`);
  view.counter.textContent = `${frame + 1} / ${together.frames}`;
  const playhead = view.strip.querySelector(".playhead");
  if (playhead) playhead.setAttribute("transform", `translate(${stripX(view, frame)} 0)`);
  if (!together.playing && !view.videos.some((video) => video.seeking)) drawDifference(view);
}

// ---- the difference

function fitCanvas({ canvas, videos }) {
  const [{ videoWidth, videoHeight }] = videos.filter((video) => video.videoWidth).concat(videos);
  Object.assign(canvas, { width: videoWidth || 16, height: videoHeight || 9 });
  // A small video shows its own pixels, not what a browser makes between them.
  for (const screen of [canvas, ...videos]) screen.classList.toggle("small", videoHeight > 0 && videoHeight < 360);
}

// While playing, a difference is drawn only when both videos show the same frame.
function watchFrames(view) {
  view.videos.forEach((video, index) => {
    const shown = (now, { mediaTime }) => {
      view.shown[index] = Math.floor(mediaTime * view.together.fps + 0.5);
      if (view.shown[0] === view.shown[1]) drawDifference(view);
      video.requestVideoFrameCallback(shown);
    };
    video.requestVideoFrameCallback?.(shown);
    video.addEventListener("seeked", () => !view.videos.some((other) => other.seeking) && drawDifference(view));
  });
}

function drawDifference({ canvas, videos, gain }) {
  if (videos.some((video) => video.readyState < 2)) return;
  const context = canvas.getContext("2d");
  const draw = (source, mode) => {
    context.globalCompositeOperation = mode;
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
  };
  draw(videos[0], "copy");
  draw(videos[1], "difference");
  const doublings = Math.log2(Number(gain.querySelector("input:checked").value));
  for (let index = 0; index < doublings; index += 1) draw(canvas, "lighter");
}

// ---- quality by frame, above the seek bar

function stripX(view, frame) {
  const width = view.strip.clientWidth;
  const knob = 8; // half the range input's knob: its ends stand that far inside
  return knob + (frame / Math.max(1, view.together.frames - 1)) * (width - 2 * knob);
}

function drawStrip(view) {
  const [left, right] = view.sides.map((side) => side.cell);
  const values = right && left && right.reference === left.id ? right.per_frame[state.metric] : null;
  const width = view.strip.clientWidth;
  if (!values || !width) return view.strip.replaceChildren();
  const finite = values.map(value).filter(Number.isFinite);
  const offset = view.together.frames - values.length; // changes between frames start at the second frame
  const height = 44;
  const [low, high] = finite.length ? [Math.min(...finite), Math.max(...finite)] : [0, 1];
  const { up, name } = METRICS[state.metric];
  const y = scale([low, high], up ? [height - 5, 15] : [15, height - 5]);
  const path = values
    .map(value)
    .map((number, index) =>
      Number.isFinite(number) ? `${index ? "L" : "M"}${stripX(view, index + offset)} ${y(number)}` : "",
    )
    .join("")
    .replace(/^L/, "M");
  const text = `${name} by frame, ${metricText(state.metric, low)} to ${metricText(state.metric, high)}`;
  view.strip.replaceChildren(
    svg(
      "svg",
      { width, height, role: "img", "aria-label": text },
      svg("text", { x: 8, y: 10, class: "tick" }, text),
      svg("path", { d: path, class: "curve", style: { stroke: colourOf(right) } }),
      svg("line", {
        class: "playhead",
        y1: 12,
        y2: height,
        transform: `translate(${stripX(view, view.together.frame)} 0)`,
      }),
    ),
  );
}
