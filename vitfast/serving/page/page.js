// Sends pictures and sentences to /similarity and shows, for each, the pictures from the most to the least alike.
"use strict";

const byId = (id) => document.getElementById(id);
let models = new Map(); // name -> what /models says of it
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
  models = new Map(data.map((model) => [model.id, model]));
  byId("model").replaceChildren(...data.map((model) => element("option", model.id, { value: model.id })));
  chooseModel();
}

const chosen = () => models.get(byId("model").value);

function chooseModel() {
  byId("texts-row").hidden = !chosen()?.text;
  compare();
}

function sentences() {
  if (!chosen()?.text) return [];
  return byId("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
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

function ranked(heading, scores, own) {
  const order = pictures.map((_, index) => index).filter((index) => index !== own);
  order.sort((a, b) => scores[b] - scores[a]);
  const row = element("ol", "", { className: "row" });
  if (own !== undefined) {
    const item = element("li");
    item.append(figure(pictures[own]));
    row.append(item);
  }
  for (const index of order.slice(0, 5)) {
    const item = element("li");
    item.append(figure(pictures[index], scores[index]));
    row.append(item);
  }
  return [element("h2", heading), row];
}

function show(matrix, texts) {
  const parts = texts.flatMap((text, index) => ranked(`Pictures for “${text}”`, matrix[pictures.length + index]));
  if (pictures.length === 2) {
    pair(matrix[0][1]);
    byId("results").prepend(...parts);
    return;
  }
  if (pictures.length > 2) {
    pictures.forEach((picture, index) => parts.push(...ranked(`Most like ${picture.file.name}`, matrix[index], index)));
  }
  byId("results").replaceChildren(...parts);
}

async function ask(path, files, texts = [], more = {}) {
  const body = new FormData();
  if (byId("model").value) body.append("model", byId("model").value);
  for (const file of files) body.append("file", file);
  for (const text of texts) body.append("text", text);
  return fetch(path, { method: "POST", body, headers: { ...headers(), ...more } });
}

async function compare() {
  const request = ++asked;
  const texts = sentences();
  Patches.take(pictures, chosen());
  if (pictures.length < 1 || pictures.length + texts.length < 2) {
    byId("status").textContent = pictures.length ? "One more picture is needed." : "";
    byId("results").replaceChildren(...pictures.map((picture) => figure(picture)));
    return;
  }
  byId("status").textContent = `Comparing ${pictures.length} pictures…`;
  try {
    const response = await ask("/similarity", pictures.map((picture) => picture.file), texts);
    const message = response.ok ? "" : await failure(response);
    const content = response.ok ? await response.json() : null;
    if (request !== asked) return;
    if (!content) {
      byId("status").textContent = `Not compared: ${message}.`;
      byId("results").replaceChildren();
      return;
    }
    show(content.similarity, texts);
    const what = pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`;
    const with_ = texts.length ? ` with ${texts.length === 1 ? "1 sentence" : `${texts.length} sentences`}` : "";
    byId("status").textContent = `${what} compared${with_}.`;
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
byId("model").addEventListener("change", chooseModel);
byId("texts").addEventListener("change", compare);
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
