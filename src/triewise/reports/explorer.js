// Shows the users that the page holds as JSON.
(() => {
  const data = JSON.parse(document.getElementById("explored").textContent);
  const section = document.getElementById("explorer");
  const wide = matchMedia("(min-width:48rem)");
  let kind = -1, shown = data.users, at = 0, chosen = null;

  const apart = (text) => `\u2068${text}\u2069`; // written from right to left it would take along what is beside it
  const title = (number) => el("bdi", null, data.titles[number]);
  const count = (n) => n.toLocaleString("en");
  const decides = (step) => Array.isArray(step) && step.length > 2;

  function written(found) {
    if (!found.way) return title(found.t);
    const marks = found.way.map((step) => {
      const [text, p] = [].concat(step);
      return piece(text, Math.exp(p), decides(step));
    });
    return el("bdi", null, ...marks, found.coded ? " " + data.titles[found.t] : null);
  }

  // One step of the way: a decision with its alternatives, probability and gain, or a run of forced tokens.
  function step(one, most) {
    const [text, p, ways, gain] = [].concat(one);
    if (!decides(one)) {
      const lost = p === undefined ? "" : `, ${percent(Math.exp(p))} stay on titles`;
      return el("li.forced", null, el("i.node"), el("bdi.f", null, text.trim()), el("small", null, "forced" + lost));
    }
    const bar = (css, part) => {
      const filled = el("i." + css, {"aria-hidden": "true"});
      filled.style.width = Math.max(100 * part, 1.5) + "%";
      return el("span.bar", null, filled);
    };
    const row = el("li", null,
      el("b.node", {title: `${count(ways)} ways to go on`}, count(ways)),
      el("bdi", null, text.trim() || (text ? "␣" : "(end)")),
      el("span.val", null, percent(Math.exp(p)), bar("likely", Math.exp(p))),
      el("span.val", null, gain.toFixed(2), bar("told", gain / most)));
    row.style.setProperty("--thick", 1.5 + 5 * Math.exp(p / 2) + "px");
    return row;
  }

  function way(found, note) {
    const most = Math.max(...found.way.map((one) => (decides(one) ? one[3] : 0)), 1e-9);
    return el("div.way", null,
      el("ol", null,
        el("li.heads", {"aria-hidden": "true"}, el("span", null, "ways"), el("span", null, "token"),
          el("span", null, "probability"), el("span", null, "gain, nats")),
        ...found.way.map((one) => step(one, most)),
        el("li.leaf", null, el("i.node"), el("bdi", null, "whole title"), el("span.val", null, percent(Math.exp(found.p))))),
      note ? el("p.note", null, note) : null);
  }

  // What the other search returned and this ranking does not have.
  function otherwise(of, method, missed) {
    if (!of.other) return null;
    const several = method.other.endsWith("beams");
    const here = new Set(of.found.map((found) => found.t));
    const only = of.other.filter((number) => !here.has(number));
    if (!only.length && !missed) return el("p.other", null, `✓ ${method.other} ${several ? "find" : "finds"} the same titles`);
    return el("div.other", null,
      el("p", null, el("em.off", null, "○"), ` ${missed} of these ${of.found.length} missed by ${method.other}`,
        only.length ? `, which ${several ? "return" : "returns"} instead` : ""),
      el("ol.chips", null, ...only.map((number) => el("li", null, title(number)))));
  }

  function line(found, number, method, missed, focus) {
    const inside = [
      el("b", null, number), written(found),
      missed ? el("em.off", {role: "img", "aria-label": `missed by ${method.other}`}, "○") : null,
      found.p === undefined ? null : el("span", null, percent(Math.exp(found.p))),
      found.hit ? el("em.hit", null, "✓ true next title") : null,
    ];
    if (!found.way) return el("li", null, ...inside);
    const key = method.name + " " + found.t;
    const pick = () => { chosen = found.t; draw(key); };
    return el("li", null, el("button", {type: "button", "aria-pressed": String(found === focus), "data-key": key, onclick: pick}, ...inside),
      found === focus ? way(found, method.note) : null);
  }

  function column(of, method) {
    const all = of.target ? [...of.found, of.target] : of.found;
    const writes = all.some((found) => found.way);
    const focus = writes ? all.find((found) => found.t === chosen) || all[0] : null;
    const other = of.other && new Set(of.other);
    const missed = of.found.map((found) => Boolean(other) && !other.has(found.t));
    const lines = of.found.map((found, i) => line(found, count(i + 1), method, missed[i], focus));
    if (of.target) lines.push(line(of.target, of.rank < 0 ? "–" : count(of.rank + 1), method, false, focus));
    const place = of.rank < 0 ? "not ranked" : `at place ${count(of.rank + 1)}`;
    return el("details.method" + (writes ? ".writes" : ""), {open: wide.matches || writes},
      el("summary", null, el(`i.key.${method.colour}`), el("b", null, method.name), el("span", null, place)),
      el("ol.recs", null, ...(lines.length ? lines : [el("li", null, "nothing")])),
      otherwise(of, method, missed.filter(Boolean).length));
  }

  function card(user) {
    const titles = user.history.map((number) => el("li", null, title(number)));
    const earlier = titles.slice(0, -5), recent = titles.slice(-5);
    return el("article", null,
      el("h3", null, "User ", el("bdi", null, user.user), ...user.kinds.map((k) => el("span.tag", null, data.kinds[k]))),
      el("h4", null, "History, oldest first"),
      earlier.length ? el("details", null, el("summary", null, `${earlier.length} earlier`), el("ol.chips", null, ...earlier)) : null,
      el("ol.chips", null, ...(recent.length ? recent : [el("li", null, "nothing yet")])),
      el("h4", null, "True next title"), el("p.next", null, title(user.target)),
      el("h4", null, "Where it stands, and what stands first"),
      el("div.methods", null, ...user.ranked.map((of, i) => column(of, data.methods[i]))));
  }

  const picker = el("select", {"aria-label": "User", onchange: () => go(picker.selectedIndex)});
  const before = el("button.pill", {type: "button", "aria-label": "Previous user", onclick: () => go(at - 1)}, "←");
  const after = el("button.pill", {type: "button", "aria-label": "Next user", onclick: () => go(at + 1)}, "→");
  const of = (k) => data.users.filter((user) => k < 0 || user.kinds.includes(k));
  const filters = ["all", ...data.kinds].map((name, i) => el("button.pill", {type: "button", "data-kind": i - 1,
    disabled: !of(i - 1).length, onclick: () => narrow(i - 1)}, name, " ", el("span", null, String(of(i - 1).length))));
  const stage = el("div");

  function go(place) {
    at = Math.min(Math.max(place, 0), shown.length - 1);
    chosen = shown[at].target;
    draw();
  }

  function narrow(to) {
    kind = to;
    shown = of(kind);
    picker.replaceChildren(...shown.map((user) => el("option", null, `User ${apart(user.user)}: ${apart(data.titles[user.target])}`)));
    for (const button of filters) button.setAttribute("aria-pressed", String(Number(button.dataset.kind) === kind));
    go(0);
  }

  // Draws the user anew; the button with a key has the focus afterwards, as it had before.
  function draw(key) {
    picker.selectedIndex = at;
    before.disabled = at === 0;
    after.disabled = at === shown.length - 1;
    stage.replaceChildren(card(shown[at]));
    for (const button of key ? stage.querySelectorAll("button") : []) if (button.dataset.key === key) button.focus();
  }

  section.append(el("div.kinds", {role: "group", "aria-label": "Kinds of users"}, ...filters),
    el("div.pick", null, before, picker, after), stage);
  narrow(-1);
  section.hidden = false;
})();
