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
  Promise.all(drawn).then(() => { root.dataset.charts = "drawn"; });
})();
