// Draws the charts that the page carries, and switches between light and dark. Colours are CSS variables: a chart that
// was drawn once follows the scheme by itself. `vegaEmbed` is put in when the page is made.
(() => {
  const root = document.documentElement;
  const buttons = document.querySelectorAll(".schemes button");

  function choose(scheme) {
    if (scheme === "auto") delete root.dataset.scheme; else root.dataset.scheme = scheme;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.value === scheme)));
    try { localStorage.setItem("paged-kv-scheme", scheme); } catch { /* a file may have no storage */ }
  }

  let before = "auto";
  try { before = localStorage.getItem("paged-kv-scheme") ?? "auto"; } catch { /* as above */ }
  choose(["light", "dark"].includes(before) ? before : "auto");
  buttons.forEach((button) => button.addEventListener("click", () => choose(button.value)));

  const options = { renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const drawn = Object.entries(charts).map(([name, spec]) => {
    const box = document.getElementById(name);
    return vegaEmbed(box, spec, options).catch((error) => {
      box.textContent = `This chart could not be drawn: ${error.message}`;
      throw error;
    });
  });

  // Vega shows tooltips where a pointer moves: let a finger that taps be one.
  document.addEventListener("click", (event) => {
    if (event.pointerType !== "touch") return;
    const { clientX, clientY, target } = event;
    if (!target.closest(".chart svg")) document.getElementById("vg-tooltip-element")?.classList.remove("visible");
    else target.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX, clientY }));
  });
  Promise.all(drawn).then(() => { root.dataset.charts = "drawn"; });
})();
