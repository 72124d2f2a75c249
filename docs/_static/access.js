// What assistive technology and the keyboard need and the theme leaves out.
"use strict";

function label() {
  for (const caption of document.querySelectorAll("p.caption[role=heading]")) caption.setAttribute("aria-level", "2");
  document.querySelector("aside.sidebar-drawer")?.setAttribute("aria-label", "All pages");
  document.querySelector("aside.toc-drawer")?.setAttribute("aria-label", "On this page");
}

// What is wider than the page at its present width scrolls, by the arrow keys, too, once it can be focused.
function letScroll() {
  for (const part of document.querySelectorAll(".table-wrapper, .highlight pre, .cell_output")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", label);
window.addEventListener("load", letScroll);
window.addEventListener("resize", letScroll);
