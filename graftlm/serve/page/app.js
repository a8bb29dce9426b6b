// The start: what the server has, the key, the colors, and which view is shown.

import { call, key, setKey } from "./api.js";
import { availableModels, Chat } from "./chat.js";
import { Data } from "./data.js";
import { byId } from "./dom.js";
import { Runs } from "./runs.js";

const THEME = "graft-theme";

function theme() {
  const choice = byId("theme");
  choice.value = localStorage.getItem(THEME) ?? "auto";
  const apply = () => (document.documentElement.dataset.theme = choice.value);
  choice.addEventListener("change", () => {
    localStorage.setItem(THEME, choice.value);
    apply();
  });
  apply();
}

function dialogs() {
  const dialog = byId("key-dialog");
  byId("open-key").addEventListener("click", () => {
    byId("key").value = key();
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    setKey(byId("key").value.trim());
    location.reload();
  });
  byId("key").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // the first button of the form would be pressed, which cancels
    dialog.close("save");
  });
  byId("close-code").addEventListener("click", () => byId("code-dialog").close());
  byId("copy-code").addEventListener("click", () => {
    byId("code").select();
    navigator.clipboard?.writeText(byId("code").value).catch(() => {}); // it is selected: Ctrl+C copies too
  });
}

function views(others) {
  const show = () => {
    const wanted = location.hash.slice(1);
    const now = others[wanted] ? wanted : "chat";
    for (const name of ["chat", ...Object.keys(others)]) {
      byId(name).hidden = name !== now;
      if (name === now) byId(`to-${name}`).setAttribute("aria-current", "page");
      else byId(`to-${name}`).removeAttribute("aria-current");
    }
    document.title = `${byId(`to-${now}`).textContent} \u2013 graft serve`;
    others[now]?.refresh();
  };
  for (const [name, view] of Object.entries(others)) byId(`to-${name}`).hidden = !view;
  addEventListener("hashchange", show);
  show();
}

async function start() {
  theme();
  dialogs();
  try {
    new Chat(await availableModels());
    const found = await call("/runs");
    // null: started without --runs, without --data
    views({ runs: found.runs && new Runs(found), data: (await call("/data")).source && new Data() });
  } catch (error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
    if (error.status === 401) byId("open-key").click();
  }
}

start();
