// Every page works without this script; it adds copy buttons and keys.
"use strict";
(() => {
  const copyButtons = (root) => {
    for (const block of root.querySelectorAll("pre.copy:not([data-copy])")) {
      block.dataset.copy = "";
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy-button";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        const text = block.querySelector("code").textContent;
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(block.querySelector("code"));
          button.textContent = "Selected";
        }
        setTimeout(() => (button.textContent = "Copy"), 1500);
      });
      block.append(button);
    }
  };

  const typing = (target) => target.closest("input, textarea, select, [contenteditable]") !== null;

  // "/" goes to the search, j and k from paper to paper.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    if (event.key === "/") {
      (document.getElementById("q") ?? document.getElementById("find")).focus();
      event.preventDefault();
    } else if (event.key === "j" || event.key === "k") {
      const links = [...document.querySelectorAll(".card h2 a, .card h3 a")];
      if (!links.length) return;
      const at = links.findIndex((link) => link.closest(".card").contains(document.activeElement));
      const next = at < 0 ? 0 : Math.min(links.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)));
      links[next].focus();
      links[next].closest(".card").scrollIntoView({ block: "nearest" });
    }
  });

  // An answer that refuses says why, where a silent page would leave the reader guessing.
  document.addEventListener("htmx:responseError", (event) => {
    const place = document.getElementById("said") ?? document.createElement("p");
    place.id = "said";
    place.setAttribute("role", "alert");
    place.className = "callout bad said";
    place.textContent = event.detail.xhr.responseText.slice(0, 300) || "The server did not answer as it should.";
    document.body.append(place);
    setTimeout(() => place.remove(), 8000);
  });
  document.addEventListener("htmx:load", (event) => copyButtons(event.detail.elt));
  copyButtons(document);
})();
