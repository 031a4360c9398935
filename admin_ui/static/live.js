// Keeps the refreshed part of a page honest: it holds still under the hand, and says so when it is out of date.
// Pages work without it; htmx does the fetching (hx-get on #live).
(() => {
  "use strict";
  document.documentElement.classList.add("scripted");
  const live = () => document.getElementById("live");
  const stale = document.getElementById("stale");

  // A row that moves between looking and clicking retries the wrong job. A mouse at rest holds nothing up, nor does a touch.
  let moved = -Infinity;
  const inHand = () => {
    const selection = getSelection();
    const selecting = selection && !selection.isCollapsed && live()?.contains(selection.anchorNode);
    return Boolean(selecting || (performance.now() - moved < 10000 && live()?.querySelector("button:hover")));
  };
  const showPause = () => document.body.classList.toggle("paused", inHand());
  document.addEventListener("selectionchange", showPause);
  document.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") moved = performance.now();
    showPause();
  });

  document.addEventListener("htmx:before:request", (event) => {
    showPause();
    if (document.hidden || inHand()) event.preventDefault();
  });

  const say = (why) => {
    const seen = live()?.querySelector(".updated time")?.textContent;
    stale.textContent = why && `What you see is from ${seen}: ${why}. Trying again every few seconds.`;
    stale.hidden = !why;
    document.body.classList.toggle("behind", Boolean(why));
  };
  document.addEventListener("htmx:response:error", ({ detail }) => {
    const status = detail.ctx.response.status;
    say(status === 503 ? "the database is away" : `the server answered ${status}`);
  });
  document.addEventListener("htmx:error", () => say("the server can't be reached"));
  document.addEventListener("htmx:after:swap", ({ detail }) => {
    if (detail.ctx.response.status < 400) say("");
  });

  // One click, one request.
  document.addEventListener("submit", (event) => {
    if (event.target.method === "post") setTimeout(() => { if (event.submitter) event.submitter.disabled = true; });
  });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  // What a button did is said once: a reload doesn't repeat it.
  const address = new URL(location.href);
  if (address.searchParams.has("done")) {
    address.searchParams.delete("done");
    address.searchParams.delete("of");
    history.replaceState(null, "", address);
  }
})();
