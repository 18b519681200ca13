// Adds a copy button to each command and configuration. Without this script, users can still select the text.
for (const box of document.querySelectorAll(".copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  const status = document.createElement("span");
  status.className = "status";
  status.setAttribute("role", "status");
  button.addEventListener("click", async () => {
    const text = box.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied";
    } catch {
      status.textContent = "Couldn't copy. Select the text.";
    }
    setTimeout(() => (status.textContent = ""), 2000);
  });
  box.append(button, status);
}
