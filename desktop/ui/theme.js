// Before the first paint, so that nothing flashes.
try {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "system";
} catch {
  // Without storage the system's theme is the one.
}
