"use strict";
const list = document.getElementById("entries"), filter = document.getElementById("filter");
const order = document.getElementById("order"), count = document.getElementById("count");
const entries = [...list.children].map(node => ({ node, text: node.textContent.toLowerCase() }));
const number = (entry, key) => Number(entry.node.dataset[key]);
function show() {
  const wanted = filter.value.trim().toLowerCase();
  let shown = 0;
  for (const entry of entries) {
    entry.node.hidden = !entry.text.includes(wanted);
    shown += !entry.node.hidden;
  }
  count.textContent = shown === entries.length ? shown + " entries" : shown + " of " + entries.length + " entries";
}
function sort() {
  const key = order.value, sign = key === "spread" ? -1 : 1;
  entries.sort((a, b) => sign * (number(a, key) - number(b, key)) || number(a, "index") - number(b, "index"));
  list.append(...entries.map(entry => entry.node));
}
filter.addEventListener("input", show);
order.addEventListener("change", sort);
show(); // a browser may keep what was typed over a reload
sort();
