// The page of a server that is starting: how far it is, until the page that was asked for is there.

const POLL_MS = 1000;
const status = document.querySelector("[role=status]");
const bar = document.querySelector("progress");

function show(start) {
  if (status.textContent !== start.message) {
    status.textContent = start.message; // only then: it is read out
  }
  document.getElementById("elapsed").textContent = `The start began ${Math.round(start.elapsed_s)} s ago.`;
  if (start.progress === null) {
    bar.removeAttribute("value");
  } else {
    bar.value = start.progress;
  }
}

async function poll() {
  try {
    const response = await fetch("readyz", { cache: "no-store" });
    if (response.ok) {
      location.reload();
      return;
    }
    show(await response.json());
  } catch {
    status.textContent = "The server does not answer. If it has ended, its log says why.";
    bar.removeAttribute("value");
  }
  setTimeout(poll, POLL_MS);
}

poll();
