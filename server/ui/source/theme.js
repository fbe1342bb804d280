// Light or dark: as the system has it, unless the person has chosen. No module, so that it runs before the page shows.

(() => {
  const PLACE = "pytgi/theme";
  const THEMES = ["system", "light", "dark"];

  function remembered() {
    try {
      const theme = localStorage.getItem(PLACE);
      return THEMES.includes(theme) ? theme : "system";
    } catch {
      return "system";
    }
  }

  function remember(theme) {
    try {
      localStorage.setItem(PLACE, theme);
    } catch {
      // the choice holds until the page is left
    }
  }

  document.documentElement.dataset.theme = remembered();
  document.addEventListener("DOMContentLoaded", () => {
    const choice = document.getElementById("theme");
    choice.value = remembered();
    choice.addEventListener("change", () => {
      document.documentElement.dataset.theme = choice.value;
      remember(choice.value);
    });
  });
})();
