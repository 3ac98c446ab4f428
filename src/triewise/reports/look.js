// What the report and the service's page share. Titles are untrusted: text is set as text, never as markup.
"use strict";

// An element: its classes stand after dots in the name; then attributes, then children, of which null is left out.
function el(name, given, ...inside) {
  const [tag, ...css] = name.split("."), node = document.createElement(tag);
  if (css.length) node.className = css.join(" ");
  for (const [key, value] of Object.entries(given || {}))
    if (key.startsWith("on")) node[key] = value;
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  node.append(...inside.flat().filter((one) => one !== null));
  return node;
}

// A probability for people: two digits, never a false 0 or 100 %.
function percent(p) {
  const value = 100 * p;
  if (value > 0 && value < 0.01) return "<0.01\u00a0%";
  if (value >= 99.5 && value < 100) return Math.min(value, 99.9).toFixed(1) + "\u00a0%";
  return value.toFixed(value >= 9.95 || value === 0 ? 0 : value >= 0.995 ? 1 : 2) + "\u00a0%";
}

// A piece of a title: a decision is shaded, the more the less probable it was; what was forced is grey.
function piece(text, p, decided) {
  if (!decided) return el("span.f", null, text);
  const word = text.trimStart() || text;
  const shade = 1 + [0.9, 0.5, 0.2, 0.05].filter((edge) => p < edge).length;
  const end = el("i.stop", {role: "img", "aria-label": "end of the title"});
  return [text.slice(0, text.length - word.length), el("span.d" + shade, {title: percent(p)}, word || end)];
}
