// Sends pictures to /similarity and shows, for each, the others from the most to the least alike.
"use strict";

const byId = (id) => document.getElementById(id);
let pictures = []; // [{file, url}]
let asked = 0; // the latest request; answers to older ones are dropped

function element(name, text, attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  if (text) made.textContent = text;
  return made;
}

function headers() {
  const key = byId("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  const content = await response.json().catch(() => null);
  return content?.error?.message ?? `the server answered ${response.status}`;
}

async function loadModels() {
  const response = await fetch("/models", { headers: headers() });
  if (response.status === 401) {
    byId("key-row").hidden = false;
    byId("status").textContent = "This server asks for an API key.";
    return;
  }
  if (!response.ok) {
    byId("status").textContent = `${await failure(response)}. Reload the page to try again.`;
    return;
  }
  byId("status").textContent = "";
  const { data } = await response.json();
  byId("model").replaceChildren(...data.map((model) => element("option", model.id, { value: model.id })));
}

function figure(picture, similarity) {
  const made = element("figure");
  made.append(element("img", "", { src: picture.url, alt: picture.file.name }));
  const caption = similarity === undefined ? picture.file.name : `${similarity.toFixed(3)} ${picture.file.name}`;
  made.append(element("figcaption", caption));
  return made;
}

function pair(similarity) {
  const row = element("ul", "", { className: "row" });
  for (const picture of pictures) {
    const item = element("li");
    item.append(figure(picture));
    row.append(item);
  }
  const score = element("p", `Similarity ${similarity.toFixed(3)}`, { className: "score" });
  byId("results").replaceChildren(element("h2", "Two pictures"), score, row);
}

function grid(matrix) {
  const parts = [];
  pictures.forEach((picture, index) => {
    parts.push(element("h2", `Most like ${picture.file.name}`));
    const order = pictures.map((_, other) => other).filter((other) => other !== index);
    order.sort((a, b) => matrix[index][b] - matrix[index][a]);
    const row = element("ol", "", { className: "row" });
    const own = element("li");
    own.append(figure(picture));
    row.append(own);
    for (const other of order.slice(0, 5)) {
      const item = element("li");
      item.append(figure(pictures[other], matrix[index][other]));
      row.append(item);
    }
    parts.push(row);
  });
  byId("results").replaceChildren(...parts);
}

async function compare() {
  const request = ++asked;
  if (pictures.length < 2) {
    byId("status").textContent = pictures.length ? "One more picture is needed." : "";
    byId("results").replaceChildren(...pictures.map((picture) => figure(picture)));
    return;
  }
  byId("status").textContent = `Comparing ${pictures.length} pictures…`;
  const body = new FormData();
  if (byId("model").value) body.append("model", byId("model").value);
  for (const picture of pictures) body.append("file", picture.file);
  try {
    const response = await fetch("/similarity", { method: "POST", body, headers: headers() });
    const message = response.ok ? "" : await failure(response);
    const content = response.ok ? await response.json() : null;
    if (request !== asked) return;
    if (!content) {
      byId("status").textContent = `Not compared: ${message}.`;
      byId("results").replaceChildren();
      return;
    }
    const { similarity } = content;
    if (pictures.length === 2) pair(similarity[0][1]);
    else grid(similarity);
    byId("status").textContent = `${pictures.length} pictures compared.`;
  } catch (error) {
    if (request === asked) byId("status").textContent = "The server cannot be reached.";
  }
}

function take(files) {
  for (const picture of pictures) URL.revokeObjectURL(picture.url);
  pictures = [...files].map((file) => ({ file, url: URL.createObjectURL(file) }));
  compare();
}

byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("files").addEventListener("change", (event) => take(event.target.files));
byId("model").addEventListener("change", compare);
byId("key").addEventListener("change", loadModels);
const drop = byId("drop");
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
loadModels();
