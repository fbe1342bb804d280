// The playground: what the server says of itself.

const status = document.querySelector("[role=status]");
const info = await (await fetch("info")).json();
status.textContent = `${info.model_id} answers.`;
