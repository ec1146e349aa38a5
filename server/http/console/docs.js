// The API's documentation: Swagger UI, with the key that this tab's console has.
"use strict";

const KEY = "tinsmith-key";
const form = document.getElementById("key");

async function show() {
  const key = sessionStorage.getItem(KEY);
  if (!key && document.documentElement.dataset.key === "required") {
    form.hidden = false;
    return;
  }
  const headers = key ? { "X-API-Key": key } : {};
  const answer = await fetch("/openapi.json", { headers });
  if (!answer.ok) {
    form.hidden = false;
    document.getElementById("why").textContent = key ? (await answer.json()).detail : "";
    return;
  }
  SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#swagger",
    deepLinking: true,
    docExpansion: "list",
    validatorUrl: null,
    requestInterceptor: (request) => {
      if (key && !request.headers["X-API-Key"]) request.headers["X-API-Key"] = key;
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, new FormData(form).get("key").trim());
  show();
});
show();
