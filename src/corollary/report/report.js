// The pages read without this script; it adds the scoreboard's filter and the copy buttons.
"use strict";
(() => {
  const form = document.getElementById("filter");
  const board = document.getElementById("board");

  const setUpFilter = () => {
    const shown = document.getElementById("shown");
    const none = document.getElementById("none");
    const papers = [...board.tBodies].map((body) => {
      const head = body.rows[0];
      return {
        body,
        package: body.dataset.package,
        words: (head.textContent + " " + body.dataset.words).toLowerCase(),
        claims: [...body.rows].slice(1).map((row) => ({ row, words: row.textContent.toLowerCase() })),
      };
    });
    const total = papers.reduce((n, paper) => n + paper.claims.length, 0);
    const fields = ["q", "package", "verdict"];

    const has = (words, text) => words.every((word) => text.includes(word));
    const inState = (row, verdict) =>
      !verdict ||
      (verdict === "stale" ? "stale" in row.dataset : verdict === "defect" ? "defect" in row.dataset : row.dataset.state === verdict);

    const apply = () => {
      const words = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = form.elements.package.value;
      const verdict = form.elements.verdict.value;
      let claims = 0;
      let seen = 0;
      for (const paper of papers) {
        const fits = !wanted || paper.package === wanted;
        const whole = has(words, paper.words);
        let any = fits && whole && !verdict && paper.claims.length === 0;
        for (const claim of paper.claims) {
          const show = fits && inState(claim.row, verdict) && (whole || has(words, paper.words + " " + claim.words));
          claim.row.hidden = !show;
          claims += show;
          any = any || show;
        }
        paper.body.hidden = !any;
        seen += any;
      }
      shown.value = `${claims} of ${total} claims, ${seen} of ${papers.length} papers`;
      board.hidden = seen === 0;
      none.hidden = seen > 0;
    };

    const keep = () => {
      const hash = new URLSearchParams();
      for (const name of fields) if (form.elements[name].value) hash.set(name, form.elements[name].value);
      const text = hash.toString();
      history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
    };

    const recall = () => {
      const text = location.hash.slice(1);
      if (text && !text.includes("=")) return; // a link to a place on the page
      const hash = new URLSearchParams(text);
      for (const name of fields) {
        const field = form.elements[name];
        field.value = hash.get(name) || "";
        if (field.selectedIndex === -1) field.value = "";
      }
      apply();
    };

    form.addEventListener("input", () => { apply(); keep(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { apply(); keep(); form.elements.q.focus(); }));
    addEventListener("hashchange", () => {
      recall();
      if (location.hash.includes("=")) form.scrollIntoView({ block: "start" });
    });
    form.hidden = false;
    recall();
    apply();
  };

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea"); // where the clipboard's own interface is refused
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };

  if (form && board) setUpFilter();
  for (const block of document.querySelectorAll("pre.copy")) {
    const text = block.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy-button";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy: " + text.split("\n")[0]);
    button.addEventListener("click", async () => {
      await copy(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    block.append(button);
  }
})();
