// Draws the two plots as SVG. Texts are set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Jobs that ended in equal stretches of time, as stacked bars. */
export function drawThroughput(figure, { stretch_seconds, completed, failed }) {
  const width = widthOf(figure), height = 190, left = 34, right = 6, top = 10, bottom = 24;
  const most = Math.max(...completed.map((count, index) => count + failed[index]));
  const ceiling = niceCeiling(most);
  const y = (count) => top + (height - top - bottom) * (1 - count / ceiling);
  const minutes = (stretch_seconds * completed.length) / 60;
  const total = sum(completed), lost = sum(failed);
  const svg = drawing(width, height, `${total} jobs completed and ${lost} failed in the last ${span(minutes)}`);
  for (const count of [0, ceiling / 2, ceiling]) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(count), y2: y(count) }));
    if (Number.isInteger(count)) svg.append(label(count, left - 6, y(count) + 4, "end"));
  }
  const step = (width - left - right) / completed.length;
  completed.forEach((count, index) => {
    const x = left + index * step + 1.5;
    const bar = (kind, from, to) => shape("rect", { class: kind, x, width: Math.max(step - 3, 1), y: y(to), height: y(from) - y(to), rx: 1.5 });
    const group = shape("g", {});
    if (count) group.append(bar("completed", 0, count));
    if (failed[index]) group.append(bar("failed", count, count + failed[index]));
    const title = shape("title", {});
    title.textContent = `${count} completed, ${failed[index]} failed`;
    group.append(title);
    svg.append(group);
  });
  svg.append(label(`${minutes >= 60 || minutes <= 1 ? "1 " : ""}${span(minutes)} ago`, left, height - 6, "start"), label("now", width - right, height - 6, "end"));
  figure.replaceChildren(svg, key([["completed", `${total} completed`], ["failed", `${lost} failed`]]));
}

/** Where the median job of each type spends its time, as one bar each. */
export function drawStages(figure, stages) {
  const row = 48, width = widthOf(figure), right = 84;
  const longest = Math.max(...stages.map((type) => sum(Object.values(type.seconds))), 0.001);
  const said = stages.map((type) => `${type.job_type}: ${seconds(type.total_seconds)}`).join(", ");
  const svg = drawing(width, row * stages.length, `Median time by stage. ${said}`);
  const seen = [];
  stages.forEach((type, index) => {
    const y = index * row;
    const name = label(type.job_type.length > 36 ? `${type.job_type.slice(0, 35)}…` : type.job_type, 0, y + 14, "start");
    name.classList.add("strong");
    svg.append(name, label(`median of ${type.jobs}`, width, y + 14, "end"));
    let x = 0;
    for (const [stage, value] of Object.entries(type.seconds)) {
      const length = Math.max(((width - right) * value) / longest, 1);
      const bar = shape("rect", { class: stage, x, y: y + 21, width: length, height: 14, rx: 2 });
      const title = shape("title", {});
      title.textContent = `${stage} ${seconds(value)}`;
      bar.append(title);
      svg.append(bar);
      x += length;
      if (!seen.includes(stage)) seen.push(stage);
    }
    svg.append(label(seconds(type.total_seconds), x + 8, y + 32, "start"));
  });
  const order = ["references", "waiting", "generate", "store"];
  figure.replaceChildren(svg, key(order.filter((stage) => seen.includes(stage)).map((stage) => [stage, stage])));
}

/** A duration for people. */
export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min ${String(Math.round(value % 60)).padStart(2, "0")} s`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

/** How long ago, where nobody counts the seconds. */
export function roughly(value) {
  return value < 120 ? `${Math.round(value)} s` : value < 7200 ? `${Math.round(value / 60)} min` : seconds(value);
}

/** A window of time, in words. */
export function span(minutes) {
  return minutes >= 60 ? "hour" : minutes > 1 ? `${Math.round(minutes)} min` : "minute";
}

function niceCeiling(most) {
  for (let size = 1; ; size *= 10) {
    for (const step of [2, 4, 10]) if (step * size >= most) return step * size;
  }
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function widthOf(figure) {
  return Math.max(figure.clientWidth, 240);
}

function drawing(width, height, said) {
  return shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said });
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

function label(text, x, y, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

function key(entries) {
  const made = document.createElement("figcaption");
  made.className = "key";
  for (const [kind, text] of entries) {
    const entry = document.createElement("span"), mark = document.createElement("i");
    mark.className = kind;
    entry.append(mark, text);
    made.append(entry);
  }
  return made;
}
