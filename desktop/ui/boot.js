// The page's content security policy forbids inline scripts, so this script is a separate file. It loads the console,
// and shows an error if loading fails: during a rollout, one replica's page can refer to files that another replica
// does not have.
try {
  const { default: init } = await import("/console/{{glue}}");
  await init({ module_or_path: "/console/{{wasm}}" });
  document.getElementById("loading")?.remove();
} catch (error) {
  console.error(error);
  document.getElementById("loading")?.remove();
  const main = document.createElement("main");
  main.className = "standalone";
  const box = document.createElement("div");
  box.className = "empty";
  box.setAttribute("role", "alert");
  const title = document.createElement("h1");
  title.textContent = "Couldn't load the console";
  const text = document.createElement("p");
  text.textContent = "A new version may be rolling out. Reload the page to try again.";
  const button = document.createElement("button");
  button.className = "button primary";
  button.textContent = "Reload";
  button.addEventListener("click", () => location.reload());
  box.append(title, text, button);
  main.append(box);
  document.body.append(main);
}
