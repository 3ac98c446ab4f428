// The service's page: histories typed with completion, answers with their proof. It asks this service alone.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const MEANING = {
    exact: "Finds the best titles with a proof that none is missing.",
    catalogue: "Scores every title of the catalogue.",
    beam: "Keeps the best beginnings only: little work, and no proof in general.",
    grounding: "Writes freely, and returns the titles nearest to that: the probabilities do not give the order.",
  };
  const COSTS = {
    token_forwards: "tokens run", prompt_tokens: "– of the prompt", tree_tokens: "– of titles",
    shared_prompt_tokens: "tokens that prompts share", expansions: "beginnings tried", rounds: "rounds",
    head_rows: "rows of the head", cache_bytes_peak: "cache at most, MiB", users: "users decoded together",
  };
  const state = {history: [], excluded: [], model: null, key: "", unknown: new Set(), answered: false};
  const number = (n) => n.toLocaleString("en");

  // --- asking ---

  class Refused extends Error {}

  // JSON of an answer; what went wrong is said in words.
  async function ask(path, body, signal) {
    const headers = {};
    if (state.key) headers["X-API-Key"] = state.key;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The service does not answer. Is it still running?");
    }
    let values = null;
    try { values = await response.json(); } catch (error) { if (error.name === "AbortError") throw error; }
    if (response.ok && values) return values;
    const told = (values && values.error && values.error.message) || `It answered with status ${response.status}.`;
    if (response.status === 401) {
      $("keys").hidden = false;
      $("key").focus();
      throw new Refused(state.key ? "The service does not know this key." : "This service asks for an API key.");
    }
    if (response.status === 429 || response.status === 503) {
      const wait = response.headers.get("retry-after");
      throw new Refused(`The service is busy: ${told}` + (wait ? ` Try again in ${wait} s.` : ""));
    }
    throw new Refused(told);
  }

  function complain(error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    const again = el("button.pill", {type: "button", onclick: begin}, "Try again");
    $("alert").replaceChildren(el("div.alert", null, el("div", null, error.message), again));
    $("status").textContent = "";
  }

  // --- the model ---

  async function begin() {
    try {
      if (!state.model) {
        const models = await ask("v1/models");
        state.model = models.data[0];
        describe(state.model);
        await suggest();
      }
      $("alert").replaceChildren();
      $("keys").hidden = $("keys").hidden || Boolean(state.key);
      if (state.answered || state.history.length) await recommend();
    } catch (error) { complain(error); }
  }

  function describe(model) {
    $("model").textContent = `${model.id} · ${number(model.n_items)} items · catalogue ${model.catalog_version}`;
    const choices = model.searches.map((name) => el("label.choice", null,
      el("input", {type: "radio", name: "search", value: name, checked: name === model.search, onchange: () => { explainSearch(); recommend(); }}),
      el("span", null, name)));
    $("searches").replaceChildren($("searches").firstElementChild, ...choices);
    $("how-searched").hidden = model.searches.length < 2;
    explainSearch();
  }

  const search = () => (document.querySelector("[name=search]:checked") || {}).value;
  const other = () => (search() === "beam" ? "exact" : "beam");
  const compares = () => state.model.searches.length > 1 && $("compare").checked;

  function explainSearch() {
    $("meaning").textContent = MEANING[search()] || "";
    $("against").textContent = other() === "beam" ? "beam search" : "exact search";
  }

  async function suggest() {
    const {items} = await ask("v1/catalog?limit=4");
    $("start").replaceChildren("Try ", ...items.map((item) =>
      el("button.pill", {type: "button", onclick: () => add(item.title)}, el("bdi", null, item.title))));
    $("start").hidden = state.history.length > 0;
  }

  // --- the history ---

  function add(title) {
    state.history.push(title);
    listed();
    recommend();
  }

  function listed() {
    $("history").replaceChildren(...state.history.map((title, i) => {
      const unknown = state.unknown.has(title);
      const away = el("button.icon", {type: "button", "aria-label": `Take ${title} away`, onclick: () => remove(i)}, "×");
      return el("li" + (unknown ? ".unknown" : ""), null, el("bdi", null, title),
        unknown ? el("small", null, "not in the catalogue") : null, away);
    }));
    $("excluded").replaceChildren(...state.excluded.map((item) => el("li", null, el("bdi", null, item.title),
      el("button.icon", {type: "button", "aria-label": `Allow ${item.title} again`, onclick: () => allow(item)}, "↺"))));
    $("without").hidden = !state.excluded.length;
    $("start").hidden = state.history.length > 0;
  }

  function remove(i) {
    state.history.splice(i, 1);
    listed();
    const left = $("history").querySelectorAll("button");
    (left[Math.min(i, left.length - 1)] || $("title")).focus();
    recommend();
  }

  function exclude(item) {
    state.excluded.push(item);
    listed();
    recommend(`${item.title} left out. `);
  }

  function allow(item) {
    state.excluded = state.excluded.filter((one) => one !== item);
    listed();
    ($("excluded").querySelector("button") || $("title")).focus();
    recommend();
  }

  // --- completion: a combobox with a list (ARIA Authoring Practices) ---

  const box = $("title"), list = $("matches");
  let found = [], active = -1, typing = 0, looking = null;

  function show(items) {
    found = items;
    mark(-1);
    const typed = box.value.trim();
    const options = found.map((item, i) => el("li", {role: "option", id: `match-${i}`, "aria-selected": "false",
      onmousedown: (event) => event.preventDefault(), onclick: () => take(item.title)}, ...lit(item.title, typed)));
    const none = el("li.none", {role: "option", "aria-disabled": "true", "aria-selected": "false"}, "No title starts so.");
    list.replaceChildren(...(options.length ? options : [none]));
    open(Boolean(typed));
  }

  // A title with what was typed in bold.
  function lit(title, typed) {
    const at = title.toLowerCase().indexOf(typed.toLowerCase());
    if (at < 0 || title.toLowerCase().length !== title.length) return [el("bdi", null, title)];
    const end = at + typed.length;
    return [el("bdi", null, title.slice(0, at), el("b", null, title.slice(at, end)), title.slice(end))];
  }

  function open(wanted) {
    list.hidden = !wanted;
    box.setAttribute("aria-expanded", String(wanted));
    if (!wanted) mark(-1);
  }

  function mark(i) {
    active = i;
    for (const [n, option] of [...list.children].entries()) option.setAttribute("aria-selected", String(n === i));
    if (i < 0) box.removeAttribute("aria-activedescendant");
    else {
      box.setAttribute("aria-activedescendant", `match-${i}`);
      list.children[i].scrollIntoView({block: "nearest"});
    }
  }

  function take(title) {
    clearTimeout(typing);
    if (looking) looking.abort();
    box.value = "";
    open(false);
    add(title);
    box.focus();
  }

  async function look() {
    if (looking) looking.abort();
    const typed = box.value.trim();
    if (!typed) return show([]);
    looking = new AbortController();
    try {
      const page = await ask(`v1/catalog?limit=8&starts=${encodeURIComponent(typed)}`, null, looking.signal);
      show(page.items);
    } catch (error) { complain(error); }
  }

  box.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(look, 100);
  });
  box.addEventListener("blur", () => open(false));
  box.addEventListener("keydown", (event) => {
    const last = found.length - 1, shown = !list.hidden;
    if (event.isComposing) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!shown) return void look();
      if (found.length) mark(event.key === "ArrowDown" ? (active >= last ? 0 : active + 1) : (active <= 0 ? last : active - 1));
    } else if (event.key === "Enter" && box.value.trim()) {
      event.preventDefault();
      const typed = box.value.trim();
      const same = found.find((item) => item.title.toLowerCase() === typed.toLowerCase());
      take(active >= 0 ? found[active].title : same ? same.title : typed);
    } else if (event.key === "Escape") {
      if (shown) open(false);
      else box.value = "";
    } else if (event.key === "Backspace" && !box.value && state.history.length) {
      remove(state.history.length - 1);
      box.focus();
    }
  });

  // --- the answer ---

  let running = null;

  async function recommend(before = "") {
    if (!state.model) return begin();
    if (running) running.abort();
    const mine = running = new AbortController(), model = state.model;
    const common = {histories: [{titles: state.history}], k: Math.min(10, model.max_k || 10), exclude: state.excluded.map((item) => item.id)};
    const asked = model.searches.length > 1 ? {...common, search: search()} : common;
    document.body.classList.add("busy");
    $("status").textContent = before + "Recommending…";
    try {
      const answer = await ask("v1/recommend", {...asked, explain: model.explains}, mine.signal);
      // The other search is asked afterwards, so that each cost is its own.
      const beside = compares() ? await ask("v1/recommend", {...asked, search: other()}, mine.signal) : null;
      if (mine !== running) return;
      state.answered = true;
      $("alert").replaceChildren();
      tell(answer, beside, before);
    } catch (error) {
      if (mine === running) complain(error);
    } finally {
      if (mine === running) document.body.classList.remove("busy");
    }
  }

  function tell(answer, beside, before) {
    const [result] = answer.results, against = beside && beside.results[0];
    state.unknown = new Set(result.unknown);
    listed();
    const [n, left] = [result.items.length, result.unknown.length];
    const notes = left ? ` ${left} ${left > 1 ? "titles are" : "title is"} not in the catalogue and left out.` : "";
    $("status").textContent = `${before}${n} titles in ${took(answer)} ms.${notes}`;
    const there = against && new Set(against.items.map((item) => item.id));
    const shown = result.items.map((item) => ({...item, whole: item.tokens && item.tokens.reduce((p, token) => p * token.probability, 1)}));
    const most = Math.max(...shown.map((item) => item.whole || 0));
    const opened = new Set([...document.querySelectorAll(".recs details[open]")].map((details) => details.dataset.id));
    const rows = shown.map((item, i) => row(item, i, there && !there.has(item.id), most, opened));
    const place = document.activeElement.dataset.place;
    $("results").replaceChildren(proof(result),
      el("ol.recs", null, ...(rows.length ? rows : [el("li.empty", null, "Nothing is left to recommend.")])),
      n ? legend() : "",
      el("div.facts", null, against ? compared(result, against) : null, cost(answer, beside)));
    if (place) (document.querySelector(`[data-place="${place}"]`) || $("answer")).focus({preventScroll: true});
  }

  const took = (answer) => answer.took_ms.toFixed(answer.took_ms < 10 ? 1 : 0);

  function proof(result) {
    const tied = result.tied ? ` The last ${result.tied} places are ties: other titles may stand there as well.` : "";
    return result.certified
      ? el("p.proof", null, el("b", null, "✓ Certified"), el("span", null, `No better title is missing from this list.${tied}`))
      : el("p.proof.open", null, el("b", null, "○ Not certified"), el("span", null, `Better titles may be missing from this list.${tied}`));
  }

  // Decisions and runs of forced tokens of a title.
  function steps(tokens) {
    const joined = [];
    for (const token of tokens) {
      const last = joined[joined.length - 1];
      if (!token.decided && last && !last.decided) {
        last.text += token.text;
        last.probability *= token.probability;
      } else joined.push({...token});
    }
    return joined.filter((step) => step.decided || step.text);
  }

  function row(item, i, missed, most, opened) {
    const parts = item.tokens ? steps(item.tokens) : null;
    const name = el("bdi", null, ...(parts ? parts.map((part) => piece(part.text, part.probability, part.decided)) : [item.title]));
    if (parts && parts.map((part) => part.text).join("") !== item.title) name.append(" ", item.title);
    const said = `missed by ${other()} search`;
    if (missed) name.append(el("em.off", {role: "img", "aria-label": said, title: said}, "○"));
    const value = el("span.val", null, parts ? percent(item.whole) : item.score.toFixed(2), parts ? bar(item.whole / most) : null);
    const head = [el("b", null, String(i + 1)), name, value];
    const tool = (sign, label, title, place, onclick) =>
      el("button.icon", {type: "button", "aria-label": label, title, "data-place": place + i, onclick}, sign);
    return el("li", null,
      parts ? el("details", {"data-id": item.id, open: opened.has(item.id)}, el("summary", {"data-place": "way" + i}, ...head), way(parts, item.whole))
        : el("div.head", null, ...head),
      el("div.tools", null,
        tool("+", `Add ${item.title} to the history`, "Add to the history", "add", () => add(item.title)),
        tool("×", `Leave ${item.title} out`, "Leave out", "out", () => exclude({id: item.id, title: item.title}))));
  }

  function bar(part) {
    const filled = el("i");
    filled.style.width = Math.max(100 * part, 1.5) + "%";
    return el("span.bar", {"aria-hidden": "true"}, filled);
  }

  function way(parts, whole) {
    const rows = parts.map((part) => {
      if (!part.decided) return el("li.forced", null, el("i.node"), el("bdi.f", null, part.text.trim()), el("small", null, "forced"));
      const line = el("li", null, el("i.node"), el("bdi", null, part.text.trim() || "(end)"),
        el("span.val", null, percent(part.probability), bar(part.probability)));
      line.style.setProperty("--thick", 1.5 + 5 * Math.sqrt(part.probability) + "px");
      return line;
    });
    return el("div.way", null, el("ol", null, ...rows,
      el("li.leaf", null, el("i.node"), el("bdi", null, "whole title"), el("span.val", null, percent(whole)))));
  }

  function legend() {
    if (!state.model.explains) return el("p.legend", null, "This model scores every item. Its scores have no scale of their own.");
    const shades = [["over 90", 0.95], ["50 to 90", 0.7], ["20 to 50", 0.3], ["5 to 20", 0.1], ["under 5", 0.01]];
    return el("p.legend", null, "Probability of a decision: ", ...shades.flatMap(([said, p]) => [piece(`${said}\u00a0%`, p, true), " "]).flat(),
      el("span.f", null, "grey letters were forced."), " A title opens its way through the tree of all titles.");
  }

  function compared(result, against) {
    const [here, there] = [result.items, against.items].map((items) => new Set(items.map((item) => item.id)));
    const both = result.items.filter((item) => there.has(item.id)).length;
    const only = against.items.filter((item) => !here.has(item.id));
    const name = other() === "beam" ? "Beam search" : "Exact search";
    return el("section", null, el("h3", null, `${name} beside it`),
      el("p.big", null, `${both} of ${result.items.length} `, el("small", null, "titles the same")),
      both === result.items.length && !only.length ? el("p", null, `${name} returns the same titles.`)
        : el("p", null, el("em.off", null, "○"), ` above: what ${name.toLowerCase()} missed. It returns instead:`),
      el("ol.chips", null, ...only.map((item) => el("li", null, el("bdi", null, item.title)))));
  }

  function cost(answer, beside) {
    const both = beside ? [answer, beside] : [answer];
    const names = Object.keys(COSTS).filter((name) => both.some((one) => one.counters[name]));
    const shown = (name, value = 0) => name.includes("bytes") ? (value / 2 ** 20).toFixed(1) : number(value);
    const rows = names.map((name) => el("tr", null, el("th", {scope: "row"}, COSTS[name]),
      ...both.map((one) => el("td", null, shown(name, one.counters[name])))));
    const heads = ["", search() || "this", ...(beside ? [other()] : [])];
    const times = both.map((one) => el("td", null, took(one)));
    return el("section", null, el("h3", null, "What it cost"), el("p.big", null, took(answer), " ", el("small", null, "ms")),
      el("table", null, el("thead", null, el("tr", null, ...heads.map((head) => el("th", {scope: "col"}, head)))),
        el("tbody", null, el("tr", null, el("th", {scope: "row"}, "ms in the service"), ...times), ...rows)));
  }

  // --- the rest ---

  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (document.activeElement === $("key")) return $("unlock").click();
    state.answered = true;
    if (document.activeElement === $("go")) $("answer").scrollIntoView();
    recommend();
  });
  $("unlock").addEventListener("click", () => {
    state.key = $("key").value.trim();
    begin();
  });
  $("compare").addEventListener("change", () => recommend());
  $("results").append(el("p.empty", null, "Add titles somebody took: ten titles follow, with the tokens that decided, what each was worth, and whether the list is proven. Without a history, Recommend shows what the model says to a new user."));
  begin();
})();
