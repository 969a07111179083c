"use strict";
// The studio page: pick a person, see what they took, draw for them, say what is good. Text is only ever set as text.

const $ = (id) => document.getElementById(id);

async function ask(name, form) {
  const answer = await fetch("/" + name, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(form),
  });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error || "status " + answer.status);
  return value;
}

function say(sentence) {
  $("message").textContent = sentence;
  $("message").hidden = !sentence;
}

function tile(png, caption, title) {
  const item = document.createElement("li");
  item.className = "tile";
  const picture = document.createElement("img");
  picture.src = "data:image/png;base64," + png;
  picture.alt = caption;
  const words = document.createElement("p");
  words.textContent = caption;
  item.title = title;
  item.append(picture, words);
  return item;
}

function thumbs(user, picture) {
  const row = document.createElement("div");
  row.className = "thumbs";
  const buttons = [["like", 1], ["dislike", -1]].map(([kind, value]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = kind;
    button.append($("thumb").content.cloneNode(true));
    button.title = kind;
    button.setAttribute("aria-label", kind);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => {
      buttons.forEach((other) => { other.disabled = true; });
      try {
        await ask("feedback", { user_id: user, generation_id: picture.id, kind, value });
        button.setAttribute("aria-pressed", "true");
        say("");
      } catch (error) {
        buttons.forEach((other) => { other.disabled = false; });
        say(error.message);
      }
    });
    return button;
  });
  row.append(...buttons);
  return row;
}

async function showHistory(user) {
  const known = await ask("history", { user_id: user });
  $("history-note").textContent = known.items.length + " favourites of " + user;
  $("attribution").textContent = known.attribution;
  $("history").replaceChildren(
    ...known.items.map((item) => tile(item.png, item.title, item.item_id + ", " + item.age_days + " days ago")),
  );
}

async function draw() {
  const user = $("user").value.trim();
  if (!user) return;
  $("draw").disabled = true;
  try {
    await showHistory(user);
    const began = performance.now();
    const answer = await ask("generate", {
      user_id: user,
      n: Number($("n").value),
      guidance: Number($("guidance").value),
      temperature: Number($("temperature").value),
      seed: Number($("seed").value),
    });
    $("pictures-note").textContent =
      answer.pictures.length + " in " + Math.round(performance.now() - began) + " ms, seed " + $("seed").value;
    $("pictures").replaceChildren(
      ...answer.pictures.map((picture) => {
        const item = tile(picture.png, picture.nearest.title, "nearest real item: " + picture.nearest.item_id);
        item.append(thumbs(user, picture));
        return item;
      }),
    );
    say("");
  } catch (error) {
    say(error.message);
  } finally {
    $("draw").disabled = false;
  }
}

async function begin() {
  const [version, people] = await Promise.all([ask("version", {}), ask("people", { limit: 200 })]);
  $("model").textContent = (version.bento || version.bundle) + " · " + people.total + " people";
  $("users").replaceChildren(...people.users.map((user) => new Option(user, user)));
  const someone = () => {
    $("user").value = people.users[Math.floor(Math.random() * people.users.length)];
    return draw();
  };
  $("someone").addEventListener("click", someone);
  $("user").value = people.users[0];
  await draw();
}

for (const name of ["n", "guidance", "temperature"]) {
  const show = () => {
    $(name + "-value").textContent = name === "n" ? $(name).value : Number($(name).value).toFixed(name === "guidance" ? 1 : 2);
  };
  $(name).addEventListener("input", show);
  $(name).addEventListener("change", draw);
  show();
}
$("seed").addEventListener("change", draw);
$("user").addEventListener("change", draw);
$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
begin().catch((error) => say(error.message));
