// What scrolls sideways in a box of its own can be reached, and scrolled, from the keyboard.
(() => {
  const boxes = ".bd-article :is(mjx-container, div.math, pre, .pst-scrollable-table-container, .output)";
  const mark = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const own = getComputedStyle(box).overflowX;
      const scrolls = box.scrollWidth > box.clientWidth + 1 && (own === "auto" || own === "scroll");
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    mark();
    new ResizeObserver(mark).observe(document.querySelector(".bd-article") ?? document.body);
  });
})();
