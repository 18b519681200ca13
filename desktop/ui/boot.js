// Apart from the page, whose policy lets no script stand in it. What it needs is imported here, so that a failure to get
// it is seen: while a new version is rolled out, a server can lack the files that another one's page names.
try {
  const { default: init } = await import("/console/{{glue}}");
  await init({ module_or_path: "/console/{{wasm}}" });
} catch (error) {
  console.error(error);
  const main = document.createElement("main");
  main.className = "alone";
  const box = document.createElement("div");
  box.className = "empty";
  box.setAttribute("role", "alert");
  const title = document.createElement("h1");
  title.textContent = "The console could not be started";
  const text = document.createElement("p");
  text.textContent = "A new version may be on its way. Reload the page to try again.";
  const button = document.createElement("button");
  button.className = "button first";
  button.textContent = "Reload";
  button.addEventListener("click", () => location.reload());
  box.append(title, text, button);
  main.append(box);
  document.body.append(main);
}
