// Apart from the page, whose policy lets no script stand in it.
import init from "/console/{{glue}}";

init({ module_or_path: "/console/{{wasm}}" }).catch((error) => {
  console.error(error);
  const text = document.createElement("p");
  text.textContent = "The console could not be started. Reload the page.";
  document.body.append(text);
});
