// Runs before the first paint, so that the page does not flash in the wrong theme.
try {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "system";
} catch {
  // If storage is not available, use the system's theme.
}
