"use strict";
// Reads the form into an answer, saves it as a draft after each change, and submits it.
const form = document.getElementById("task");

function start() {
  const { task, item, csrf } = form.dataset;
  const articles = [...form.querySelectorAll("article")];
  const count = articles.length;
  const message = document.getElementById("message");
  const next = document.getElementById("next");
  const previous = document.getElementById("previous");
  const submit = document.getElementById("submit");
  let revision = Number(form.dataset.revision);
  let step = 0;
  let timer = 0;
  let queue = Promise.resolve();

  const values = (name) => [...form.querySelectorAll(`[name="${name}"]:checked`)].map((e) => e.value);
  const indices = [...Array(count).keys()];
  const chip = (i) => form.querySelector(`[data-chip="${i}"]`);

  function ranks() {
    if (task === "rank") return indices.map((i) => Number(chip(i).parentElement.dataset.rank) || null);
    const better = values("better")[0];
    if (better === undefined) return [null, null];
    return better === "tie" ? [1, 1] : indices.map((i) => (i === Number(better) ? 1 : 2));
  }

  function answer() {
    if (task === "demonstrate") return { response: form.elements.response.value };
    const read = {};
    if (task === "rank" || task === "compare") read.ranks = ranks();
    if (task === "rank" || task === "rate") {
      read.ratings = indices.map((i) => Number(values(`quality-${i}`)[0]) || null);
      read.flags = indices.map((i) => values(`flag-${i}`));
    }
    return read;
  }

  function check(name, value) {
    const input = form.querySelector(`[name="${name}"][value="${CSS.escape(String(value))}"]`);
    if (input) input.checked = true;
  }

  function restore(draft) {
    if (!draft) return;
    if (draft.response) form.elements.response.value = draft.response;
    (draft.ratings || []).forEach((value, i) => value && check(`quality-${i}`, value));
    (draft.flags || []).forEach((names, i) => names.forEach((name) => check(`flag-${i}`, name)));
    const given = draft.ranks || [];
    if (task === "rank") given.forEach((rank, i) => rank && move(chip(i), rank));
    else if (given[0]) check("better", given[0] === given[1] ? "tie" : given[0] < given[1] ? 0 : 1);
  }

  function move(element, rank) {
    const target = form.querySelector(`[data-rank="${rank}"]`);
    if (element && target) target.append(element);
  }

  // Requests are sent one after another, because each needs the revision of the one before.
  function send(path, content) {
    const sent = queue.then(async () => {
      const response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
        body: JSON.stringify({ item, revision, ...content() }),
      });
      if (!response.ok) throw new Error(await response.text());
      return response.json();
    });
    queue = sent.catch(() => {});
    return sent.catch((error) => {
      message.textContent = `Not saved: ${error.message}`;
      return null;
    });
  }

  function save() {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const saved = await send("/draft", () => ({ answer: answer() }));
      if (saved) {
        revision = saved.revision;
        message.textContent = "";
      }
    }, 300);
  }

  async function finish(path, content) {
    clearTimeout(timer);
    if (await send(path, content)) location.reload();
  }

  function show() {
    if (task !== "rank") return;
    articles.forEach((article, i) => { article.hidden = i !== step && step !== count; });
    document.getElementById("ranking").hidden = step !== count;
    previous.hidden = step === 0;
    next.hidden = step === count;
    submit.hidden = step !== count;
  }

  function onKey(event) {
    const element = event.target;
    if (!element.dataset.chip) return;
    const rank = Number(element.parentElement.dataset.rank);
    const wanted = { ArrowUp: rank - 1, ArrowDown: rank + 1 }[event.key] ?? Number(event.key);
    if (!(wanted >= 1 && wanted <= count)) return;
    event.preventDefault();
    move(element, wanted);
    element.focus();
    save();
  }

  function onDrop(event) {
    const target = event.target.closest(".rank");
    if (!target) return;
    event.preventDefault();
    const index = event.dataTransfer.getData("text/plain");
    if (/^[0-9]$/.test(index)) move(chip(index), target.dataset.rank);
    save();
  }

  form.addEventListener("input", (event) => { if (event.target.id !== "reason") save(); });
  form.addEventListener("keydown", onKey);
  form.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/plain", event.target.dataset.chip));
  form.addEventListener("dragover", (event) => { if (event.target.closest(".rank")) event.preventDefault(); });
  form.addEventListener("drop", onDrop);
  next.addEventListener("click", () => { step += 1; show(); });
  previous.addEventListener("click", () => { step -= 1; show(); });
  document.getElementById("skip").addEventListener("click", () =>
    finish("/skip", () => ({ reason: document.getElementById("reason").value })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    finish("/answer", () => ({ answer: answer() }));
  });
  restore(JSON.parse(form.dataset.state).draft);
  show();
}

if (form) start();
